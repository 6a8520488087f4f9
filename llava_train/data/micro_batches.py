"""A step -> micro-batches of each rank. Pure: it never changes what a step computes, only how fast.

Padded: as many samples as `Cut.size`, neighbours in length. Packed: as many positions as `Cut.budget`, best fit first;
samples that begin alike (the same system prompt and picture) stay together and carry their beginning once.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from llava_train.data.plan import Plan


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through the model together, and the weight of each one's tokens in the step's loss."""

    samples: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Sizes:
    """What cutting knows of each sample of a set; arrays of (set size,).

    Attributes:
        lengths: tokens.
        supervised: positions that carry loss.
        images: pictures.
        prefixes: tokens up to the last picture before the first answer, 0 where there is none.
        prefix_images: pictures in them.
        prefix_keys: equal where those tokens and pictures are the same; 0 where there are none.
    """

    lengths: np.ndarray
    supervised: np.ndarray
    images: np.ndarray
    prefixes: np.ndarray
    prefix_images: np.ndarray
    prefix_keys: np.ndarray

    @classmethod
    def text(cls, lengths: np.ndarray, supervised: np.ndarray) -> Sizes:
        """Samples that share nothing."""
        none = np.zeros(len(lengths), dtype=int)
        return cls(lengths, supervised, none, none, none, none)


@dataclass(frozen=True)
class Cut:
    """How a step is cut.

    Attributes:
        size: samples of a padded micro-batch; under `micro_batch` normalization the unit that counts alike.
        normalization: `tokens` (every token of the step counts alike), `samples` (every sample alike) or
            `micro_batch` (every padded micro-batch alike, its tokens alike: what averaging over devices and
            accumulation does in the original).
        budget: positions of a packed micro-batch at most; None pads.
        share: whether samples that begin alike carry their beginning once.
        pair_cost: cost of a query-key pair of attention, in positions.
        image_cost: cost of a picture's encoding, in positions.
    """

    size: int
    normalization: Literal["tokens", "samples", "micro_batch"] = "tokens"
    budget: int | None = None
    share: bool = False
    pair_cost: float = 0.0
    image_cost: float = 0.0


def deal(samples: Sequence[int], sizes: Sizes, world_size: int, cut: Cut) -> list[list[MicroBatch]]:
    """For each rank its micro-batches, as many as every other rank's.

    The loss of the step is the sum of weight * nll over all of them, however it is cut. Where samples do not suffice
    a rank repeats one with weight 0, so that collective operations stay in step.
    """
    padded = _padded(samples, sizes, world_size, cut.size)
    weights = _weights(padded, sizes.supervised, cut.normalization)
    if cut.budget is None:
        return _dealt(padded, weights, sizes, world_size)
    weight_of: dict[int, list[float]] = {}
    for bucket, own in zip(padded, weights):
        for sample, weight in zip(bucket, own):
            weight_of.setdefault(sample, []).append(weight)
    packed = _packed(samples, sizes, world_size, cut, cut.budget)
    given = [tuple(weight_of[sample].pop() for sample in bucket) for bucket in packed]
    return _dealt(packed, given, sizes, world_size)


def _dealt(
    buckets: list[list[int]], weights: list[tuple[float, ...]], sizes: Sizes, world_size: int
) -> list[list[MicroBatch]]:
    """Bucket n goes to rank n modulo the world size, every second round the other way: the largest come first."""
    rows = [sample for bucket in buckets for sample in bucket]
    shortest = rows[int(sizes.lengths[rows].argmin())]
    batches = [
        MicroBatch(tuple(bucket), weight) if bucket else MicroBatch((shortest,), (0.0,))
        for bucket, weight in zip(buckets, weights)
    ]
    rounds = [batches[start : start + world_size] for start in range(0, len(batches), world_size)]
    rounds = [each[::-1] if number % 2 else each for number, each in enumerate(rounds)]
    return [[each[rank] for each in rounds] for rank in range(world_size)]


def _padded(samples: Sequence[int], sizes: Sizes, world_size: int, size: int) -> list[list[int]]:
    """Buckets of at most `size` samples that are neighbours in length, the longest first."""
    rows = np.array(samples)
    ordered = rows[np.lexsort((rows, -sizes.lengths[rows]))]
    count = math.ceil(len(ordered) / (world_size * size)) * world_size
    # The cut is even, so no bucket is left nearly empty.
    return [part.tolist() for part in np.array_split(ordered, count)]


def _weights(buckets: list[list[int]], supervised: np.ndarray, normalization: str) -> list[tuple[float, ...]]:
    """The weight of each sample's tokens, bucket by bucket (a mixture may repeat a sample within a step)."""
    tokens = [supervised[bucket].tolist() if bucket else [] for bucket in buckets]
    total, count = sum(map(sum, tokens)), sum(map(len, buckets))
    filled = sum(bool(bucket) for bucket in buckets)
    of = {
        "tokens": lambda own, bucket: 1.0 / total,
        "samples": lambda own, bucket: 1.0 / (count * own),
        "micro_batch": lambda own, whole: 1.0 / (filled * whole),
    }[normalization]
    return [tuple(of(own, whole) for own in bucket) for bucket, whole in zip(tokens, map(sum, tokens))]


class _Unit(NamedTuple):
    """Samples that share their beginning (or one sample), the positions they take and what they cost."""

    samples: tuple[int, ...]
    positions: int
    cost: float


class _Sample(NamedTuple):
    """A row of the set: positions of its beginning and of the rest, and what either costs."""

    row: int
    prefix: int
    own: int
    begun: float
    cost: float


_Bins = list[list[_Unit]]
_SWEEPS, _LOOKED_AT = 3, 8


def _packed(samples: Sequence[int], sizes: Sizes, world_size: int, cut: Cut, budget: int) -> list[list[int]]:
    """Buckets of at most `budget` positions, their number a multiple of the world size, the costliest first.

    Samples that share a beginning stay together, unless they are more than a micro-batch's share of the step and all
    ranks are done sooner with the beginning computed twice.
    """
    bins = _balanced(_units(samples, sizes, cut, budget), world_size, budget)
    units = [unit for own in bins for unit in own]
    share = math.ceil(sum(unit.positions for unit in units) / len(bins))
    if any(unit.positions > share and len(unit.samples) > 1 for unit in units):
        apart = _balanced(_units(samples, sizes, cut, share), world_size, budget)
        bins = min(bins, apart, key=lambda bins: (len(bins), sum(map(_cost, bins[::world_size]))))
    return [[sample for unit in own for sample in unit.samples] for own in bins]


def _units(samples: Sequence[int], sizes: Sizes, cut: Cut, budget: int) -> list[_Unit]:
    """Each group of samples that begin alike, cut so that a part takes at most `budget` positions."""
    rows = np.array(samples)
    prefixes, pictures = sizes.prefixes[rows], sizes.prefix_images[rows]
    own = sizes.lengths[rows] - prefixes
    begun = prefixes + cut.pair_cost * prefixes * (prefixes + 1) / 2 + cut.image_cost * pictures
    costs = own + cut.pair_cost * own * (prefixes + (own + 1) / 2) + cut.image_cost * (sizes.images[rows] - pictures)
    keys = sizes.prefix_keys[rows].tolist() if cut.share else [0] * len(rows)
    groups: dict[int | tuple[int], list[_Sample]] = {}
    for place, (key, *known) in enumerate(zip(keys, *(each.tolist() for each in (rows, prefixes, own, begun, costs)))):
        groups.setdefault(key or (place,), []).append(_Sample(*known))
    return [_unit(part) for group in groups.values() for part in _fitting(group, budget)]


def _fitting(group: list[_Sample], budget: int) -> list[list[_Sample]]:
    """A group cut so that each part takes at most `budget` positions (a longer sample is alone)."""
    parts: list[list[_Sample]] = []
    room = 0
    for sample in group:
        if not parts or sample.own > room:
            parts.append([])
            room = budget - sample.prefix
        parts[-1].append(sample)
        room -= sample.own
    return parts


def _unit(samples: list[_Sample]) -> _Unit:
    rows, _, own, _, costs = zip(*samples)
    return _Unit(rows, samples[0].prefix + sum(own), samples[0].begun + sum(costs))


def _cost(units: list[_Unit]) -> float:
    return sum(unit.cost for unit in units)


def _balanced(units: list[_Unit], world_size: int, budget: int) -> _Bins:
    """The units over as few bins as do, a multiple of the world size, of like cost; the costliest bin first."""
    fewest = math.ceil(sum(unit.positions for unit in units) / budget)
    bins = _spread(units, fewest + -fewest % world_size, budget)
    if bins is None:
        bins = _best_fit(units, budget)
        bins += [[] for _ in range(-len(bins) % world_size)]
        bins = _spread(units, len(bins), budget) or bins
    _even(bins, budget)
    return sorted(bins, key=_cost, reverse=True)


def _best_fit(units: list[_Unit], budget: int) -> _Bins:
    bins: _Bins = []
    rooms: list[tuple[int, int]] = []  # (positions left, bin), the least first
    for unit in sorted(units, key=lambda unit: -unit.positions):
        place = bisect_left(rooms, (unit.positions, -1))
        if place == len(rooms):
            bins.append([])
            rooms.append((max(budget, unit.positions), len(bins) - 1))
            place = len(rooms) - 1
        room, number = rooms.pop(place)
        bins[number].append(unit)
        insort(rooms, (room - unit.positions, number))
    return bins


def _spread(units: list[_Unit], count: int, budget: int) -> _Bins | None:
    """The units over `count` bins, the costliest first, each to the cheapest bin with room; None if one finds none."""
    bins: _Bins = [[] for _ in range(count)]
    loads = [(0.0, number) for number in range(count)]
    rooms = [budget] * count
    for unit in sorted(units, key=lambda unit: -unit.cost):
        place = next((i for i, (_, number) in enumerate(loads) if unit.positions <= rooms[number]), None)
        if place is None:
            return None
        cost, number = loads.pop(place)
        bins[number].append(unit)
        rooms[number] -= unit.positions
        insort(loads, (cost + unit.cost, number))
    return bins


def _even(bins: _Bins, budget: int) -> None:
    """Costly bins swap units with cheap ones, the costliest with the cheapest, then with others."""
    half = len(bins) // 2
    for sweep in range(_SWEEPS):
        bins.sort(key=_cost)
        cheap = bins[sweep:half] + bins[:sweep]
        for one, other in zip(reversed(bins), cheap):
            _swap(one, other, budget)


def _swap(dear: list[_Unit], cheap: list[_Unit], budget: int) -> None:
    """Exchange the two units that bring the costs of two bins nearest to one another, if both have room for it."""
    gap = (_cost(dear) - _cost(cheap)) / 2
    if gap <= 0.001 * _cost(dear):
        return
    room, own_room = (budget - sum(unit.positions for unit in own) for own in (cheap, dear))
    pairs = (
        (abs(one.cost - other.cost - gap), i, j)
        for i, one in enumerate(dear[:_LOOKED_AT])
        for j, other in enumerate(cheap[:_LOOKED_AT])
        if -own_room <= one.positions - other.positions <= room
    )
    left, i, j = min(pairs, default=(gap, 0, 0))
    if left < gap:
        dear[i], cheap[j] = cheap[j], dear[i]


def positions_of(micro_batches: Sequence[MicroBatch], sizes: Sizes, cut: Cut) -> int:
    """Positions that go through the language model: padding counts, a shared beginning once."""
    if cut.budget is None:
        return sum(int(sizes.lengths[list(each.samples)].max()) * len(each.samples) for each in micro_batches)
    whole = sys.maxsize  # what is in one micro-batch stays together
    return sum(unit.positions for each in micro_batches for unit in _units(each.samples, sizes, cut, whole))


def waste(plan: Plan, sizes: Sizes, cut: Cut) -> dict[str, float]:
    """What cutting costs and saves, on one device: measured on up to 64 steps spread over the first epoch.

    Returns:
        `random` and `planned`: share of positions that are padding where steps are cut as they come and where
        samples of like length share a micro-batch; `packed`: positions as this cut makes them, for each token.
    """
    padded = Cut(cut.size, cut.normalization)
    tokens = random = planned = positions = 0
    for step in np.unique(np.linspace(0, plan.steps_per_epoch - 1, 64).astype(int)).tolist():
        rows = plan.step(step)
        tokens += int(sizes.lengths[rows].sum())
        slices = [tuple(rows[start : start + cut.size]) for start in range(0, len(rows), cut.size)]
        random += positions_of([MicroBatch(each, ()) for each in slices], sizes, padded)
        planned += positions_of(deal(rows, sizes, 1, padded)[0], sizes, padded)
        positions += positions_of(deal(rows, sizes, 1, cut)[0], sizes, cut)
    return {"random": 1 - tokens / random, "planned": 1 - tokens / planned, "packed": positions / tokens}
