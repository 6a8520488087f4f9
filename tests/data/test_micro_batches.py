"""However a step is cut, it is the same step: samples, weights, counts; and the cut is a good one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_train.data.micro_batches import Cut, MicroBatch, Sizes, deal, positions_of, waste
from llava_train.data.mixture import Mixture
from llava_train.data.plan import Plan

NORMALIZATIONS = ["tokens", "samples", "micro_batch"]


def make_sizes(count: int, pictures: int, seed: int = 0) -> Sizes:
    """Samples about `pictures` pictures; every seventh is text alone."""
    rng = np.random.default_rng(seed)
    keys = np.where(np.arange(count) % 7 == 6, 0, rng.integers(1, pictures + 1, count))
    prefixes = np.where(keys > 0, 20 + keys % 5, 0)
    supervised = rng.integers(1, 5, count)
    lengths = prefixes + rng.integers(5, 90, count)
    return Sizes(lengths, supervised, (keys > 0).astype(int), prefixes, (keys > 0).astype(int), keys)


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    return Cut(
        draw(st.integers(1, 9)),
        draw(st.sampled_from(NORMALIZATIONS)),
        draw(st.none() | st.integers(115, 600)),
        draw(st.booleans()),
        draw(st.sampled_from([0.0, 0.01])),
        draw(st.sampled_from([0.0, 30.0])),
    )


@given(samples=st.integers(1, 60), pictures=st.integers(1, 30), world=st.integers(1, 6), cut=cuts())
@settings(deadline=None, max_examples=200)
def test_a_cut_keeps_samples_counts_and_weights(samples: int, pictures: int, world: int, cut: Cut) -> None:
    sizes = make_sizes(samples, pictures)
    dealt = deal(range(samples), sizes, world, cut)
    assert len({len(batches) for batches in dealt}) == 1
    flat = [batch for batches in dealt for batch in batches]
    real = [(s, w) for batch in flat for s, w in zip(batch.samples, batch.weights) if w]
    assert sorted(s for s, _ in real) == list(range(samples))
    # Whatever the normalisation, a loss of 1 at every token is a loss of 1.
    assert sum(w * sizes.supervised[s] for s, w in real) == pytest.approx(1.0)
    for batch in flat:
        if cut.budget is None:
            assert len(batch.samples) <= cut.size
        else:
            assert positions_of([batch], sizes, cut) <= cut.budget
    assert deal(range(samples), sizes, world, cut) == dealt


@given(samples=st.integers(1, 60), cut=cuts(), world=st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_packing_gives_each_sample_the_weight_it_has_when_padded(samples: int, cut: Cut, world: int) -> None:
    sizes = make_sizes(samples, 9)
    weights = [
        {s: w for batches in deal(range(samples), sizes, world, each) for b in batches for s, w in zip(*_of(b)) if w}
        for each in (Cut(cut.size, cut.normalization), cut)
    ]
    assert weights[0] == weights[1]


def _of(batch: MicroBatch) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return batch.samples, batch.weights


@pytest.mark.parametrize("normalization", ["tokens", "samples"])
def test_weights_do_not_depend_on_the_number_of_devices(normalization) -> None:
    sizes = make_sizes(20, 5)
    weights = [
        {s: w for batches in deal(range(20), sizes, world, cut) for b in batches for s, w in zip(*_of(b)) if w}
        for world, cut in (
            (1, Cut(20, normalization)),
            (1, Cut(3, normalization)),
            (4, Cut(2, normalization)),
            (4, Cut(2, normalization, 200, True)),
        )
    ]
    assert all(each == weights[0] for each in weights)


@pytest.mark.parametrize("budget", [None, 40])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_sample_that_comes_twice_in_a_step_counts_twice(normalization, budget: int | None) -> None:
    sizes = Sizes.text(np.array([9, 5, 7]), np.array([4, 2, 3]))
    (batches,) = deal([0, 1, 2, 0], sizes, 1, Cut(2, normalization, budget, True))
    assert sorted(s for batch in batches for s in batch.samples) == [0, 0, 1, 2]
    assert sum(w * sizes.supervised[s] for b in batches for s, w in zip(*_of(b))) == pytest.approx(1.0)


def test_what_begins_alike_stays_together_and_counts_once() -> None:
    keys, ones = np.array([1, 2, 1, 2, 1]), np.ones(5, dtype=int)
    sizes = Sizes(np.full(5, 110), ones, ones, 100 * ones, ones, keys)
    (batches,) = deal(range(5), sizes, 1, Cut(5, "tokens", 240, True))
    assert sorted(batch.samples for batch in batches) == [(0, 2, 4), (1, 3)]
    assert positions_of(batches, sizes, Cut(5, "tokens", 240, True)) == 2 * 100 + 5 * 10
    # A group that is longer than a micro-batch is cut, and each part has the beginning.
    (cut,) = deal(range(5), sizes, 1, Cut(5, "tokens", 121, True))
    assert sorted(len(batch.samples) for batch in cut) == [1, 2, 2]


def test_ranks_have_alike_to_do() -> None:
    """A step of the LLaVA mix's lengths on 8 devices: cost within 8 % of even; lengths alone would be far off."""
    rng = np.random.default_rng(0)
    text = rng.lognormal(np.log(225) - 0.32, 0.8, 1024).astype(int) + 1
    pictures = (rng.random(1024) > 0.06).astype(int)
    sizes = Sizes(text + 610 * pictures, text, pictures, 0 * text, 0 * text, 0 * text)
    cut = Cut(16, "tokens", 16384, False, 1 / 24700, 28.0)
    dealt = deal(range(1024), sizes, 8, cut)

    def cost(batch: MicroBatch) -> float:
        rows = list(batch.samples)
        lengths = sizes.lengths[rows]
        pairs = (lengths * (lengths + 1) / 2).sum()
        return float(lengths.sum() + pairs * cut.pair_cost + sizes.images[rows].sum() * cut.image_cost)

    totals = [sum(map(cost, batches)) for batches in dealt]
    assert max(totals) / np.mean(totals) < 1.02
    rounds = [[cost(batch) for batch in each] for each in zip(*dealt)]
    assert np.mean([max(each) / np.mean(each) for each in rounds]) < 1.08


def test_padding_is_less_by_length_and_none_when_packed() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 512).astype(int) + 1
    shares = waste(Plan.of(Mixture.whole(512), 128, 1, None, 0), Sizes.text(lengths, lengths), Cut(16, "tokens", 8192))
    assert 0 < shares["planned"] < shares["random"] < 1
    assert shares["packed"] == 1
    even = Sizes.text(np.full(8, 5), np.full(8, 1))
    assert waste(Plan.of(Mixture.whole(8), 8, 1, None, 0), even, Cut(3))["planned"] == 0
