"""The plan: which samples make step n. Pure, O(1) to any step.

A step is a set of samples: it depends on the seed and the global batch size alone. How its samples are cut into
micro-batches is another room (`micro_batches`), so the number of devices never changes what a step trains on.
"""

from __future__ import annotations

import math
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
        groups: samples with the same number come one after another, (set size,), 0 where it does not matter; or None.
    """

    mixture: Mixture
    global_batch_size: int
    total_steps: int
    seed: int
    groups: np.ndarray | None = None
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        mixture: Mixture,
        global_batch_size: int,
        epochs: float,
        max_steps: int | None,
        seed: int,
        groups: np.ndarray | None = None,
    ) -> Plan:
        """A plan for `epochs` passes, or for `max_steps` if that is given."""
        per_epoch = math.ceil(mixture.size / global_batch_size)
        total = max_steps if max_steps is not None else max(1, math.ceil(per_epoch * epochs))
        return cls(mixture, global_batch_size, total, seed, groups)

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
            rows = self.mixture.epoch(self.seed, epoch)
            self._orders[epoch] = rows if self.groups is None else gathered(rows, self.groups)
        start = within * self.global_batch_size
        order: list[int] = self._orders[epoch][start : start + self.global_batch_size].tolist()
        return order


def gathered(rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The rows of an epoch with the members of a group behind the first of them, (rows,).

    A row that comes twice stays twice: its second coming belongs to a second group, so that no step is given the
    same sample twice for that.
    """
    order = np.argsort(rows, kind="stable")
    starts = np.flatnonzero(np.diff(rows[order], prepend=-1))
    coming = np.empty(len(rows), dtype=np.int64)  # 0 for the first time a row comes, 1 for the second, ...
    coming[order] = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
    own = groups[rows]
    keys = np.where(own == 0, -1 - np.arange(len(rows)), own * (coming.max(initial=0) + 1) + coming)
    _, first, member = np.unique(keys, return_index=True, return_inverse=True)
    return rows[np.argsort(first[member], kind="stable")]
