"""The plan: which samples make step n, and how they are dealt to ranks. Pure, O(1) to any step.

A step is a set of samples: it depends on the seed and the global batch size alone. How its samples are cut
into micro-batches is a second function, so the number of devices never changes what a step trains on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llava_train.data.mixture import Mixture


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of a run: every sample of the mixture once an epoch, the last step of an epoch may be smaller.

    Attributes:
        mixture: which rows make an epoch.
        global_batch_size: samples a step.
        total_steps: steps of the run.
        seed: seed of the order.
    """

    mixture: Mixture
    global_batch_size: int
    total_steps: int
    seed: int
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, mixture: Mixture, global_batch_size: int, epochs: float, max_steps: int | None, seed: int) -> Plan:
        """A plan for `epochs` passes, or for `max_steps` if that is given."""
        per_epoch = math.ceil(mixture.size / global_batch_size)
        total = max_steps if max_steps is not None else max(1, math.ceil(per_epoch * epochs))
        return cls(mixture, global_batch_size, total, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the data."""
        return math.ceil(self.mixture.size / self.global_batch_size)

    def epoch_at(self, step: int) -> float:
        """Passes over the data when `step` (from 0) is done."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch + min(1.0, (within + 1) * self.global_batch_size / self.mixture.size)

    def step(self, index: int) -> list[int]:
        """Rows of the samples of step `index`, in their order."""
        epoch, within = divmod(index, self.steps_per_epoch)
        if epoch not in self._orders:
            self._orders.clear()  # one epoch is 8 bytes a sample; the next one is made when it begins
            self._orders[epoch] = self.mixture.epoch(self.seed, epoch)
        start = within * self.global_batch_size
        order: list[int] = self._orders[epoch][start : start + self.global_batch_size].tolist()
        return order


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through the model together, and the weight of each one's tokens in the step's loss."""

    samples: tuple[int, ...]
    weights: tuple[float, ...]


def deal(
    samples: Sequence[int],
    lengths: np.ndarray,
    supervised: np.ndarray,
    world_size: int,
    micro_batch_size: int,
    normalization: str,
) -> list[list[MicroBatch]]:
    """Cut a step into micro-batches, the same number on every rank.

    Samples are sorted by length, so that one micro-batch pads little, and dealt round-robin, so that ranks
    carry alike. Where samples do not suffice a rank repeats one with weight 0: collective operations stay
    in step and the loss is unchanged.

    Args:
        samples: the step's samples.
        lengths: tokens of each sample of the set, (set size,).
        supervised: positions that carry loss of each sample of the set, (set size,).
        normalization: `tokens` (every token of the step counts alike), `samples` (every sample alike) or
            `micro_batch` (every micro-batch alike, its tokens alike: what averaging over devices and
            accumulation does in the original).

    Returns:
        For each rank its micro-batches. The loss of the step is the sum of weight * nll over all of them.
    """
    ordered = sorted(samples, key=lambda sample: (-int(lengths[sample]), sample))
    count = math.ceil(len(ordered) / (world_size * micro_batch_size))
    buckets: list[list[int]] = [[] for _ in range(count * world_size)]
    # Neighbours in length share a micro-batch; the cut is even, so no bucket is left nearly empty.
    for index, part in enumerate(np.array_split(np.array(ordered), len(buckets))):
        buckets[index] = part.tolist()
    weights = _weights(buckets, supervised, normalization)
    batches = [
        MicroBatch(tuple(bucket), weight) if bucket else MicroBatch((ordered[-1],), (0.0,))
        for bucket, weight in zip(buckets, weights)
    ]
    return [batches[rank::world_size] for rank in range(world_size)]


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


def padding_share(plan: Plan, lengths: np.ndarray, supervised: np.ndarray, micro_batch_size: int) -> dict[str, float]:
    """Share of positions that are padding: `random` cuts a step as it comes, `planned` as `deal` does.

    Measured on up to 64 steps spread over the first epoch, on one device.
    """
    steps = np.unique(np.linspace(0, plan.steps_per_epoch - 1, 64).astype(int)).tolist()
    tokens = padded_random = padded_planned = 0
    for step in steps:
        rows = plan.step(step)
        cuts = [rows[start : start + micro_batch_size] for start in range(0, len(rows), micro_batch_size)]
        (planned,) = deal(rows, lengths, supervised, 1, micro_batch_size, "tokens")
        tokens += int(lengths[rows].sum())
        padded_random += sum(int(lengths[cut].max()) * len(cut) for cut in cuts)
        padded_planned += sum(int(lengths[list(m.samples)].max()) * len(m.samples) for m in planned)
    return {"random": 1 - tokens / padded_random, "planned": 1 - tokens / padded_planned}
