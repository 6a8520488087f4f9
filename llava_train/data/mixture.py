"""A mixture: how often each source's samples come in an epoch. Pure.

A source takes part with `count` places an epoch: its size, times `repeat`, or its share by `weight`. Whole passes
come first; what is left over is a window that moves on from epoch to epoch, so that every sample has its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_train.errors import RecipeError


@dataclass(frozen=True, eq=False)
class Part:
    """A source in a mixture: the rows it may give, (rows,), and the places it has in an epoch."""

    rows: np.ndarray
    count: int


@dataclass(frozen=True)
class Share:
    """What a recipe says of one source: `cap` samples of it at most, then `repeat` times, or by `weight`."""

    cap: int | None = None
    repeat: float = 1.0
    weight: float | None = None


@dataclass(frozen=True, eq=False)
class Mixture:
    """Sources with their places in an epoch."""

    parts: tuple[Part, ...]

    @classmethod
    def whole(cls, rows: int | np.ndarray) -> Mixture:
        """Every row once."""
        rows = np.arange(rows) if isinstance(rows, int) else rows
        return cls((Part(rows, len(rows)),))

    @property
    def size(self) -> int:
        """Samples of an epoch."""
        return sum(part.count for part in self.parts)

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Rows of one epoch in their order, (size,)."""
        rows = np.concatenate([_drawn(part, seed, epoch, index) for index, part in enumerate(self.parts)])
        return rows[np.random.default_rng((seed, epoch)).permutation(len(rows))]


def _drawn(part: Part, seed: int, epoch: int, index: int) -> np.ndarray:
    passes, rest = divmod(part.count, len(part.rows))
    if not rest:
        return np.tile(part.rows, passes)
    order = np.random.default_rng((seed, index, 1)).permutation(len(part.rows))
    window = (np.arange(rest) + epoch * rest) % len(order)
    return np.concatenate([np.tile(part.rows, passes), part.rows[order[window]]])


def mix(rows: Sequence[np.ndarray], shares: Sequence[Share], seed: int) -> Mixture:
    """The mixture of sources by their rows and shares.

    Weights divide an epoch that is as long as all (capped) sources together. Raises RecipeError where only
    some sources have a weight, or a source is left without a place.
    """
    taken = [capped(part, share.cap, seed, index) for index, (part, share) in enumerate(zip(rows, shares))]
    weights = [share.weight for share in shares]
    if any(weight is not None for weight in weights):
        if any(weight is None for weight in weights):
            raise RecipeError("data.train: give every source a weight, or none")
        total, whole = sum(map(len, taken)), sum(weight or 0.0 for weight in weights)
        counts = [round(total * (weight or 0.0) / whole) for weight in weights]
    else:
        counts = [round(len(part) * share.repeat) for part, share in zip(taken, shares)]
    for index, count in enumerate(counts):
        if count < 1 or not len(taken[index]):
            raise RecipeError(f"data.train.{index}: this source has no sample in an epoch; raise its weight or repeat")
    return Mixture(tuple(Part(part, count) for part, count in zip(taken, counts)))


def capped(rows: np.ndarray, cap: int | None, seed: int, index: int) -> np.ndarray:
    """At most `cap` rows of source number `index`, by chance, always the same for a seed."""
    if cap is None or len(rows) <= cap:
        return rows
    return np.sort(np.random.default_rng((seed, index, 2)).permutation(rows)[:cap])
