"""Rows -> what one forward pass reads: padded, a row a sample, or packed end to end into one row. Pure.

    padded   A A A A .    packed   A A A A B B C C C      packed, A and B sharing p   p p A A B B C C C
             B B . . .    lengths  4 2 3                   lengths                     2 2 2 3
             C C C . .    parents  -1 -1 -1                parents                     -1 0 0 -1

A stretch of a packed row sees itself and its parent; a padded row has no stretches. What predicts a supervised token is
the position before it, wherever that lies: in a shared beginning one position may predict the next token of several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llava_train.data.encode import IGNORE


class Tokens(Protocol):
    """What collating needs of a row: both arrays (tokens,) int64."""

    @property
    def input_ids(self) -> np.ndarray: ...  # noqa: D102
    @property
    def labels(self) -> np.ndarray: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class Collated:
    """Arrays of int64 unless said otherwise; B rows, T columns, S supervised tokens, N stretches.

    Attributes:
        input_ids: (B, T).
        attention_mask: (B, T), 1 where a token stands; None where all do.
        position_ids: (B, T), each sample's own.
        lengths, parents: of each stretch its tokens and the number of the one it sees besides itself, -1: none, (N,);
            empty where a row is a sample.
        predictors: index into the flattened (B, T) of what predicts each supervised token, (S,).
        targets: those tokens, (S,).
        weights: their weights in the step's loss, float32 (S,).
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray | None
    position_ids: np.ndarray
    lengths: np.ndarray
    parents: np.ndarray
    predictors: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def pad(rows: Sequence[Tokens], weights: Sequence[float], pad_id: int) -> Collated:
    """A row a sample, filled up on the right to the longest."""
    width = max(len(row.input_ids) for row in rows)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    supervised = []
    for index, row in enumerate(rows):
        input_ids[index, : len(row.input_ids)] = row.input_ids
        mask[index, : len(row.input_ids)] = 1
        supervised.append(_supervised(row, weights[index], 0, 0, index * width))
    positions = np.broadcast_to(np.arange(width), input_ids.shape).copy()
    none = np.zeros(0, dtype=np.int64)
    return Collated(input_ids, mask, positions, none, none, *_joined(supervised))


def pack(groups: Sequence[tuple[int, Sequence[Tokens]]], weights: Sequence[float]) -> Collated:
    """Samples end to end. Each group says how many tokens all its rows begin with; they stand there once."""
    ids, positions, lengths, parents, supervised = [], [], list[int](), list[int](), []
    given = iter(weights)
    offset = 0

    def stretch(tokens: np.ndarray, first: int, parent: int) -> int:
        nonlocal offset
        ids.append(tokens)
        positions.append(np.arange(first, first + len(tokens)))
        lengths.append(len(tokens))
        parents.append(parent)
        offset += len(tokens)
        return offset - len(tokens)

    for prefix, rows in groups:
        begins, parent = offset, -1
        if prefix:
            stretch(rows[0].input_ids[:prefix], 0, -1)
            parent = len(lengths) - 1
        for row in rows:
            start = stretch(row.input_ids[prefix:], prefix, parent)
            supervised.append(_supervised(row, next(given), prefix, begins, start))
    return Collated(
        np.concatenate(ids)[None],
        None,
        np.concatenate(positions)[None],
        np.array(lengths),
        np.array(parents),
        *_joined(supervised),
    )


def _supervised(
    row: Tokens, weight: float, prefix: int, begins: int, start: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictors, targets and weights of a row whose first `prefix` tokens lie at `begins`, the others at `start`."""
    before = np.flatnonzero(row.labels[1:] != IGNORE)
    predictors = np.where(before < prefix, begins + before, start + before - prefix)
    return predictors, row.labels[before + 1], np.full(len(before), weight, dtype=np.float32)


def _joined(parts: Sequence[tuple[np.ndarray, ...]]) -> Iterator[np.ndarray]:
    return (np.concatenate(part) for part in zip(*parts))
