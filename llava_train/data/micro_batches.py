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
from typing import Literal

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
    shortest = min((sample for bucket in buckets for sample in bucket), key=lambda sample: int(sizes.lengths[sample]))
    batches = [
        MicroBatch(tuple(bucket), weight) if bucket else MicroBatch((shortest,), (0.0,))
        for bucket, weight in zip(buckets, weights)
    ]
    rounds = [batches[start : start + world_size] for start in range(0, len(batches), world_size)]
    rounds = [each[::-1] if number % 2 else each for number, each in enumerate(rounds)]
    return [[each[rank] for each in rounds] for rank in range(world_size)]


def _padded(samples: Sequence[int], sizes: Sizes, world_size: int, size: int) -> list[list[int]]:
    """Buckets of at most `size` samples that are neighbours in length, the longest first."""
    ordered = sorted(samples, key=lambda sample: (-int(sizes.lengths[sample]), sample))
    count = math.ceil(len(ordered) / (world_size * size)) * world_size
    # The cut is even, so no bucket is left nearly empty.
    return [part.tolist() for part in np.array_split(np.array(ordered), count)]


def _weights(buckets: list[list[int]], supervised: np.ndarray, normalization: str) -> list[tuple[float, ...]]:
    """The weight of each sample's tokens, bucket by bucket (a mixture may repeat a sample within a step)."""
    tokens = [[int(supervised[sample]) for sample in bucket] for bucket in buckets]
    total, count = sum(map(sum, tokens)), sum(map(len, buckets))
    filled = sum(bool(bucket) for bucket in buckets)
    of = {
        "tokens": lambda own, bucket: 1.0 / total,
        "samples": lambda own, bucket: 1.0 / (count * own),
        "micro_batch": lambda own, bucket: 1.0 / (filled * sum(bucket)),
    }[normalization]
    return [tuple(of(own, bucket) for own in bucket) for bucket in tokens]


@dataclass(frozen=True)
class _Unit:
    """Samples that share their beginning (or one sample), the positions they take and what they cost."""

    samples: tuple[int, ...]
    positions: int
    cost: float


def _packed(samples: Sequence[int], sizes: Sizes, world_size: int, cut: Cut, budget: int) -> list[list[int]]:
    """Buckets of at most `budget` positions, their number a multiple of the world size, the costliest first.

    Best fit decreasing finds how many are needed; the units are then spread over that many by cost, if they fit.
    """
    units = _units(samples, sizes, cut, budget)
    bins = _best_fit(units, budget)
    bins += [[] for _ in range(-len(bins) % world_size)]
    bins = _spread(units, len(bins), budget) or bins
    bins.sort(key=lambda units: -sum(unit.cost for unit in units))
    return [[sample for unit in units for sample in unit.samples] for units in bins]


def _units(samples: Sequence[int], sizes: Sizes, cut: Cut, budget: int) -> list[_Unit]:
    groups: dict[int | tuple[int, int], list[int]] = {}
    for place, sample in enumerate(samples):
        key = int(sizes.prefix_keys[sample]) if cut.share else 0
        groups.setdefault(key or (place, sample), []).append(sample)
    return [_unit(part, sizes, cut) for group in groups.values() for part in _fitting(group, sizes, budget)]


def _fitting(group: list[int], sizes: Sizes, budget: int) -> list[list[int]]:
    """A group cut so that each part takes at most `budget` positions (a longer sample is alone)."""
    parts: list[list[int]] = []
    room = 0
    for sample in group:
        length, prefix = int(sizes.lengths[sample]), int(sizes.prefixes[sample])
        if not parts or length - prefix > room:
            parts.append([])
            room = budget - prefix
        parts[-1].append(sample)
        room -= length - prefix
    return parts


def _unit(samples: list[int], sizes: Sizes, cut: Cut) -> _Unit:
    prefix, pictures = int(sizes.prefixes[samples[0]]), int(sizes.prefix_images[samples[0]])
    positions, pairs, images = prefix, prefix * (prefix + 1) / 2, pictures
    for sample in samples:
        own = int(sizes.lengths[sample]) - prefix
        positions += own
        pairs += own * prefix + own * (own + 1) / 2
        images += int(sizes.images[sample]) - pictures
    return _Unit(tuple(samples), positions, positions + cut.pair_cost * pairs + cut.image_cost * images)


def _best_fit(units: list[_Unit], budget: int) -> list[list[_Unit]]:
    bins: list[list[_Unit]] = []
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


def _spread(units: list[_Unit], count: int, budget: int) -> list[list[_Unit]] | None:
    """The units over `count` bins, the costliest first, each to the cheapest bin with room; None if one finds none."""
    bins: list[list[_Unit]] = [[] for _ in range(count)]
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
