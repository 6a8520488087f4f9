"""Padded or packed, a batch holds the same tokens, each predicted by the one before it in its own sample."""

from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_train.data.collate import Collated, pack, pad
from llava_train.data.encode import IGNORE


class Row(NamedTuple):
    input_ids: np.ndarray
    labels: np.ndarray


@st.composite
def groups(draw: st.DrawFn) -> list[tuple[int, list[Row]]]:
    """Samples by what they begin with; ids are unlike one another, but for that."""
    made, next_id = [], 1000
    for _ in range(draw(st.integers(1, 4))):
        prefix = draw(st.integers(0, 5))
        begin = list(range(next_id, next_id + prefix))
        next_id += prefix
        rows = []
        for _ in range(draw(st.integers(1, 3)) if prefix else 1):
            size = draw(st.integers(1 if prefix else 2, 7))
            ids = np.array(begin + list(range(next_id, next_id + size)))
            next_id += size
            said = [draw(st.booleans()) and place >= prefix for place in range(len(ids))]
            rows.append(Row(ids, np.where(said, ids, IGNORE)))
        made.append((prefix, rows))
    return made


def expected(rows: list[Row], weights: list[float]) -> list[tuple[int, int, float]]:
    """(token before, supervised token, weight) in order."""
    return [
        (int(row.input_ids[place - 1]), int(row.labels[place]), weight)
        for row, weight in zip(rows, weights)
        for place in range(1, len(row.labels))
        if row.labels[place] != IGNORE
    ]


def found(made: Collated) -> list[tuple[int, int, float]]:
    before = made.input_ids.reshape(-1)[made.predictors]
    return list(zip(before.tolist(), made.targets.tolist(), made.weights.tolist()))


@given(groups())
@settings(deadline=None, max_examples=100)
def test_packed_rows_hold_every_sample_with_its_beginning_once(parts: list[tuple[int, list[Row]]]) -> None:
    rows = [row for _, members in parts for row in members]
    weights = [float(number + 1) for number in range(len(rows))]
    made = pack(parts, weights)
    assert made.attention_mask is None
    assert made.input_ids.shape == made.position_ids.shape == (1, made.lengths.sum())
    assert len(set(made.input_ids[0].tolist())) == made.input_ids.size  # nothing stands there twice
    assert found(made) == expected(rows, weights)
    stretches = np.split(made.input_ids[0], np.cumsum(made.lengths)[:-1])
    places = np.split(made.position_ids[0], np.cumsum(made.lengths)[:-1])
    seen = [
        [*(stretches[parent].tolist() if parent >= 0 else []), *stretches[number].tolist()]
        for number, parent in enumerate(made.parents)
    ]
    for row in rows:  # what the last token of a sample sees is the sample
        own = next(number for number, each in enumerate(stretches) if row.input_ids[-1] in each)
        assert seen[own] == row.input_ids.tolist()
        assert places[own][-1] == len(row.input_ids) - 1
        assert (np.diff(places[own]) == 1).all()
    assert all(parent < number for number, parent in enumerate(made.parents))


@given(groups())
@settings(deadline=None, max_examples=50)
def test_padded_rows_are_the_samples(parts: list[tuple[int, list[Row]]]) -> None:
    rows = [row for _, members in parts for row in members]
    weights = [float(number + 1) for number in range(len(rows))]
    made = pad(rows, weights, pad_id=7)
    assert found(made) == expected(rows, weights)
    for row, ids, mask in zip(rows, made.input_ids, made.attention_mask):
        size = len(row.input_ids)
        assert ids[:size].tolist() == row.input_ids.tolist()
        assert (ids[size:] == 7).all()
        assert mask.tolist() == [1] * size + [0] * (len(mask) - size)
    assert not len(made.lengths)


def test_one_position_predicts_the_next_token_of_several() -> None:
    begin, one, two = [5, 6], [10], [11, 12]
    rows = [Row(np.array(begin + own), np.array([IGNORE, IGNORE, *own])) for own in (one, two)]
    made = pack([(2, rows)], [1.0, 2.0])
    assert made.predictors.tolist() == [1, 1, 3]
    assert made.targets.tolist() == [10, 11, 12]
    assert made.weights.tolist() == [1.0, 2.0, 2.0]
