import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_train.data.mixture import Mixture
from llava_train.data.plan import Plan, deal, padding_share


@given(samples=st.integers(1, 200), batch=st.integers(1, 64), seed=st.integers(0, 5), epoch=st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_every_sample_once_an_epoch(samples: int, batch: int, seed: int, epoch: int) -> None:
    plan = Plan.of(Mixture.whole(samples), batch, 4, None, seed)
    first = epoch * plan.steps_per_epoch
    seen = [sample for step in range(first, first + plan.steps_per_epoch) for sample in plan.step(step)]
    assert sorted(seen) == list(range(samples))


@given(
    samples=st.integers(1, 40),
    world=st.integers(1, 5),
    micro=st.integers(1, 9),
    normalization=st.sampled_from(["tokens", "samples", "micro_batch"]),
)
@settings(deadline=None, max_examples=80)
def test_dealing_keeps_samples_counts_and_weights(samples: int, world: int, micro: int, normalization: str) -> None:
    rng = np.random.default_rng(samples)
    lengths, supervised = rng.integers(5, 90, samples), rng.integers(1, 5, samples)
    dealt = deal(range(samples), lengths, supervised, world, micro, normalization)
    assert len({len(batches) for batches in dealt}) == 1
    flat = [batch for batches in dealt for batch in batches]
    assert all(len(batch.samples) <= micro for batch in flat)
    real = [(s, w) for batch in flat for s, w in zip(batch.samples, batch.weights) if w]
    assert sorted(s for s, _ in real) == list(range(samples))
    # Whatever the normalisation, a loss of 1 at every token is a loss of 1.
    assert sum(w * supervised[s] for s, w in real) == pytest.approx(1.0)


@pytest.mark.parametrize("normalization", ["tokens", "samples"])
def test_weights_do_not_depend_on_the_cut(normalization: str) -> None:
    lengths, supervised = np.arange(10, 30), np.arange(1, 21)
    weights = [
        {
            s: w
            for batches in deal(range(20), lengths, supervised, world, micro, normalization)
            for b in batches
            for s, w in zip(b.samples, b.weights)
            if w
        }
        for world, micro in ((1, 20), (1, 3), (4, 2))
    ]
    assert weights[0] == weights[1] == weights[2]


def test_steps_depend_on_seed_and_batch_alone() -> None:
    plan = Plan.of(Mixture.whole(100), 8, 2, None, 1)
    assert plan.step(20) == Plan.of(Mixture.whole(100), 8, 2, None, 1).step(20)
    assert plan.step(0) != Plan.of(Mixture.whole(100), 8, 2, None, 2).step(0)
    assert plan.step(0) != plan.step(13)
    assert plan.total_steps == 26
    assert plan.epoch_at(12) == 1.0
    assert len(plan.step(12)) == 4
    assert Plan.of(Mixture.whole(100), 8, 2, 5, 1).total_steps == 5


@pytest.mark.parametrize("normalization", ["tokens", "samples", "micro_batch"])
def test_a_sample_that_comes_twice_in_a_step_counts_twice(normalization: str) -> None:
    lengths, supervised = np.array([9, 5, 7]), np.array([4, 2, 3])
    (batches,) = deal([0, 1, 2, 0], lengths, supervised, 1, 2, normalization)
    assert sorted(s for batch in batches for s in batch.samples) == [0, 0, 1, 2]
    assert sum(w * supervised[s] for b in batches for s, w in zip(b.samples, b.weights)) == pytest.approx(1.0)


def test_planned_padding_is_less_than_random() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 512).astype(int) + 1
    shares = padding_share(Plan.of(Mixture.whole(512), 128, 1, None, 0), lengths, lengths, 16)
    assert 0 < shares["planned"] < shares["random"] < 1
    assert padding_share(Plan.of(Mixture.whole(8), 8, 1, None, 0), np.full(8, 5), np.full(8, 1), 3)["planned"] == 0


def test_any_step_of_665_thousand_records_is_found_at_once() -> None:
    """A resumed run seeks, whatever step it goes on from (CPU time: the machine may be busy)."""
    records = 665_298
    lengths = np.random.default_rng(0).integers(20, 2048, records)
    steps = Plan.of(Mixture.whole(records), 128, 3, None, 42).total_steps
    for step in (0, steps - 1, *(random.Random(0).sample(range(steps), 6))):
        plan = Plan.of(Mixture.whole(records), 128, 3, None, 42)
        started = time.process_time()
        deal(plan.step(step), lengths, lengths // 5, 8, 16, "tokens")
        assert time.process_time() - started < 2
