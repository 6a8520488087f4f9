from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_train.data.mixture import Mixture, Share, mix
from llava_train.errors import RecipeError

ROWS = [np.arange(10), np.arange(10, 40), np.arange(40, 45)]


def counts(mixture: Mixture, seed: int = 0, epoch: int = 0) -> list[int]:
    rows = mixture.epoch(seed, epoch)
    assert len(rows) == mixture.size
    return [int(np.isin(rows, part).sum()) for part in ROWS]


def test_without_shares_every_row_comes_once() -> None:
    rows = mix(ROWS, [Share()] * 3, 0).epoch(1, 0)
    assert sorted(rows) == list(range(45))
    assert rows.tolist() == Mixture.whole(45).epoch(1, 0).tolist()


def test_repeat_and_cap() -> None:
    mixture = mix(ROWS, [Share(repeat=2), Share(cap=7), Share(repeat=0.4)], 0)
    assert counts(mixture) == [20, 7, 2]
    assert set(Counter(r for r in mixture.epoch(0, 0) if r < 10).values()) == {2}
    capped = [set(mixture.epoch(0, epoch)) & set(ROWS[1]) for epoch in range(3)]
    assert capped[0] == capped[1] == capped[2], "a cap keeps the same samples in every epoch"
    assert capped[0] != set(range(10, 17)), "and takes them by chance"


def test_weights_divide_the_epoch() -> None:
    assert counts(mix(ROWS, [Share(weight=1), Share(weight=1), Share(weight=1)], 0)) == [15, 15, 15]
    assert counts(mix(ROWS, [Share(weight=3), Share(weight=1), Share(weight=5, cap=1)], 0)) == [14, 5, 23]


@given(size=st.integers(1, 30), repeat=st.floats(0.1, 3.5), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_what_is_left_over_goes_round(size: int, repeat: float, seed: int) -> None:
    """Over the epochs no sample comes twice more often than another."""
    if round(size * repeat) < 1:
        return
    mixture = mix([np.arange(size)], [Share(repeat=repeat)], seed)
    seen: Counter[int] = Counter()
    for epoch in range(7):
        rows = mixture.epoch(seed, epoch).tolist()
        assert rows == mixture.epoch(seed, epoch).tolist()
        seen.update(rows)
        assert max(seen.values()) - min(seen[row] for row in range(size)) <= 1


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([Share(weight=1), Share(), Share()], "every source a weight, or none"),
        ([Share(repeat=0.01), Share(), Share()], r"data\.train\.0: this source has no sample"),
        ([Share(weight=1e-9), Share(weight=1), Share(weight=1)], r"data\.train\.0"),
    ],
)
def test_shares_that_make_no_sense(shares: list[Share], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        mix(ROWS, shares, 0)
