"""A step -> micro-batches of each rank. Pure: it never changes what a step computes, only how fast.

Padded: as many samples as `Cut.size`, neighbours in length. Packed: at most `Cut.budget` positions, all ranks of like
cost; samples that begin alike (the same system prompt and picture) stay together and carry their beginning once.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np

from llava_train.data.plan import Plan

_SWEEPS, _LOOKED_AT = 6, 8
"""Of evening out: rounds of swaps, and how many units of a bin are looked at (the costliest)"""


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
        "tokens": lambda own, whole: 1.0 / total,
        "samples": lambda own, whole: 1.0 / (count * own),
        "micro_batch": lambda own, whole: 1.0 / (filled * whole),
    }[normalization]
    return [tuple(of(own, whole) for own in bucket) for bucket, whole in zip(tokens, map(sum, tokens))]


class _Units(NamedTuple):
    """Samples that share their beginning (or one sample each), the positions they take and what they cost."""

    samples: list[tuple[int, ...]]
    positions: np.ndarray
    costs: np.ndarray


def _packed(samples: Sequence[int], sizes: Sizes, world_size: int, cut: Cut, budget: int) -> list[list[int]]:
    """Buckets of at most `budget` positions, their number a multiple of the world size, the costliest first.

    Samples that begin alike stay together, unless they are more than one bucket's share of the step and all ranks are
    done sooner where that beginning is computed twice.
    """
    units = _units(samples, sizes, cut, budget)
    bins = _balanced(units, world_size, budget)
    share = math.ceil(units.positions.sum() / len(bins))
    if cut.share and units.positions.max() > share:
        smaller = _units(samples, sizes, cut, share)
        more = _balanced(smaller, world_size, budget)
        if (len(more), _slowest(more, smaller, world_size)) < (len(bins), _slowest(bins, units, world_size)):
            units, bins = smaller, more
    keys = sizes.prefix_keys[[members[0] for members in units.samples]].tolist()
    ordered = [sorted(own, key=lambda unit: (keys[unit], unit)) for own in bins]  # neighbours begin alike
    return [[sample for unit in own for sample in units.samples[unit]] for own in ordered]


def _slowest(bins: list[list[int]], units: _Units, world_size: int) -> int:
    """What the costliest bins of all rounds cost; ranks wait for one another."""
    return sum(int(units.costs[own].sum()) for own in bins[::world_size])


def _units(samples: Sequence[int], sizes: Sizes, cut: Cut, budget: int) -> _Units:
    """The units of a step (or of a micro-batch), each of at most `budget` positions."""
    rows = np.array(samples)
    lengths, prefixes = sizes.lengths[rows], sizes.prefixes[rows]
    own = lengths - prefixes
    keys = sizes.prefix_keys[rows] if cut.share else np.zeros(len(rows), dtype=int)
    parts = _parts(keys.tolist(), prefixes.tolist(), own.tolist(), budget)
    places = np.array(list(chain.from_iterable(parts)))
    starts = np.cumsum([0, *map(len, parts[:-1])])
    first = places[starts]
    begun = _cost(prefixes, sizes.prefix_images[rows], cut)
    costs = _cost(lengths, sizes.images[rows], cut) - begun
    names = rows.tolist()
    return _Units(
        [tuple(names[place] for place in part) for part in parts],
        prefixes[first] + np.add.reduceat(own[places], starts),
        begun[first] + np.add.reduceat(costs[places], starts),
    )


def _cost(positions: np.ndarray, images: np.ndarray, cut: Cut) -> np.ndarray:
    """Of samples, or of what they begin with, in whole positions: every position sees itself and those before it.

    Integers, because all ranks must come to the same bins, on whatever machine.
    """
    return np.rint(positions + cut.pair_cost * positions * (positions + 1) / 2 + cut.image_cost * images).astype(int)


def _parts(keys: list[int], prefixes: list[int], own: list[int], budget: int) -> list[list[int]]:
    """Places with the same key together, as long as they take at most `budget` positions; those of key 0 alone."""
    parts: list[list[int]] = []
    last: dict[int, list[int]] = {}
    rooms: dict[int, int] = {}
    for place, key in enumerate(keys):
        if key and own[place] <= rooms.get(key, -1):
            last[key].append(place)
        else:
            parts.append([place])
            last[key], rooms[key] = parts[-1], budget - prefixes[place]
        rooms[key] -= own[place]
    return parts


def _balanced(units: _Units, world_size: int, budget: int) -> list[list[int]]:
    """The units over as few bins as do, a multiple of the world size, of like cost; the costliest bin first."""
    fewest = math.ceil(units.positions.sum() / budget)
    bins = _spread(units, fewest + -fewest % world_size, budget)
    if bins is None:
        bins = _best_fit(units.positions.tolist(), budget)
        bins += [[] for _ in range(-len(bins) % world_size)]
        bins = _spread(units, len(bins), budget) or bins
    bins = _even(bins, units, budget)
    return sorted(bins, key=lambda own: -int(units.costs[own].sum()))


def _best_fit(positions: list[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (positions left, bin), the least first
    for unit in sorted(range(len(positions)), key=lambda unit: -positions[unit]):
        place = bisect_left(rooms, (positions[unit], -1))
        if place == len(rooms):
            bins.append([])
            rooms.append((max(budget, positions[unit]), len(bins) - 1))
            place = len(rooms) - 1
        room, number = rooms.pop(place)
        bins[number].append(unit)
        insort(rooms, (room - positions[unit], number))
    return bins


def _spread(units: _Units, count: int, budget: int) -> list[list[int]] | None:
    """The units over `count` bins, the costliest first, each to the cheapest bin with room; None if one finds none."""
    positions, costs = units.positions.tolist(), units.costs.tolist()
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    rooms = [budget] * count
    for unit in sorted(range(len(costs)), key=lambda unit: -costs[unit]):
        place = next((i for i, (_, number) in enumerate(loads) if positions[unit] <= rooms[number]), None)
        if place is None:
            return None
        cost, number = loads.pop(place)
        bins[number].append(unit)
        rooms[number] -= positions[unit]
        insort(loads, (cost + costs[unit], number))
    return bins


def _even(bins: list[list[int]], units: _Units, budget: int) -> list[list[int]]:
    """The bins after costly ones have swapped units with cheap ones: the costliest with the cheapest, then others."""
    width, half = max(map(len, bins)), len(bins) // 2
    held = np.array([own + [-1] * (width - len(own)) for own in bins])  # unit -1 is none, and may be swapped, too
    positions, costs = np.append(units.positions, 0), np.append(units.costs, 0)
    for sweep in range(_SWEEPS if half else 0):
        loads, taken = costs[held].sum(axis=1), positions[held].sum(axis=1)
        order = np.argsort(loads, kind="stable")
        dear, cheap = order[::-1][:half], np.roll(order[:half], -sweep)
        one, other = held[dear, :_LOOKED_AT, None], held[cheap, None, :_LOOKED_AT]
        more = positions[one] - positions[other]
        fits = (taken[cheap, None, None] + more <= budget) & (taken[dear, None, None] - more <= budget)
        gap = (loads[dear] - loads[cheap])[:, None, None]
        left = np.where(fits, np.abs(gap - 2 * (costs[one] - costs[other])), gap)
        best = left.reshape(half, -1).argmin(axis=1)
        better = np.flatnonzero(left.min(axis=(1, 2)) < gap[:, 0, 0])
        i, j = np.divmod(best[better], left.shape[2])
        dear, cheap = dear[better], cheap[better]
        held[dear, i], held[cheap, j] = held[cheap, j], held[dear, i]
    return [own[own >= 0].tolist() for own in held]


def positions_of(micro_batches: Sequence[MicroBatch], sizes: Sizes, cut: Cut) -> int:
    """Positions that go through the language model: padding counts, a shared beginning once."""
    if cut.budget is None:
        return sum(int(sizes.lengths[list(each.samples)].max()) * len(each.samples) for each in micro_batches)
    whole = sys.maxsize  # what is in one micro-batch stays together
    return sum(int(_units(each.samples, sizes, cut, whole).positions.sum()) for each in micro_batches)


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
