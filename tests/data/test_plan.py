import itertools
import random
import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_train.data.micro_batches import Cut, Sizes, deal
from llava_train.data.mixture import Mixture, Part
from llava_train.data.plan import Plan, gathered


@given(samples=st.integers(1, 200), batch=st.integers(1, 64), seed=st.integers(0, 5), epoch=st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_every_sample_once_an_epoch(samples: int, batch: int, seed: int, epoch: int) -> None:
    plan = Plan.of(Mixture.whole(samples), batch, 4, None, seed)
    first = epoch * plan.steps_per_epoch
    seen = [sample for step in range(first, first + plan.steps_per_epoch) for sample in plan.step(step)]
    assert sorted(seen) == list(range(samples))


@given(
    groups=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    repeat=st.integers(1, 3),
    batch=st.integers(1, 16),
    epoch=st.integers(0, 2),
)
@settings(deadline=None, max_examples=80)
def test_grouping_keeps_every_sample_and_brings_groups_together(
    groups: list[int], repeat: int, batch: int, epoch: int
) -> None:
    numbers = np.array(groups)
    mixture = Mixture((Part(np.arange(len(groups)), repeat * len(groups)),))
    plain, grouped = (Plan.of(mixture, batch, 3, None, 1, each) for each in (None, numbers))
    first = epoch * plain.steps_per_epoch
    steps = range(first, first + plain.steps_per_epoch)
    before, after = ([row for step in steps for row in plan.step(step)] for plan in (plain, grouped))
    assert sorted(before) == sorted(after)
    for number in set(groups) - {0}:
        size = groups.count(number)
        places = [place for place, row in enumerate(after) if groups[row] == number]
        runs = 1 + sum(b - a > 1 for a, b in itertools.pairwise(places))
        assert len(places) == size * repeat and runs <= repeat  # the second pass over a group is a group of its own
    if not any(groups):
        assert before == after


def test_grouping_moves_no_sample_that_is_alone() -> None:
    rows = np.array([4, 2, 0, 3, 1])
    assert gathered(rows, np.array([0, 7, 0, 0, 7])).tolist() == [4, 1, 2, 0, 3]
    assert gathered(np.array([1, 1, 4]), np.array([0, 7, 0, 0, 7])).tolist() == [1, 4, 1]


def test_steps_depend_on_seed_and_batch_alone() -> None:
    plan = Plan.of(Mixture.whole(100), 8, 2, None, 1)
    assert plan.step(20) == Plan.of(Mixture.whole(100), 8, 2, None, 1).step(20)
    assert plan.step(0) != Plan.of(Mixture.whole(100), 8, 2, None, 2).step(0)
    assert plan.step(0) != plan.step(13)
    assert plan.total_steps == 26
    assert plan.epoch_at(12) == 1.0
    assert len(plan.step(12)) == 4
    assert Plan.of(Mixture.whole(100), 8, 2, 5, 1).total_steps == 5


def test_any_step_of_665_thousand_records_is_found_at_once() -> None:
    """A resumed run seeks, whatever step it goes on from, and packs it (CPU time: the machine may be busy)."""
    records = 665_298
    lengths = np.random.default_rng(0).integers(20, 2048, records)
    groups = np.random.default_rng(1).integers(0, records // 2, records)
    sizes = Sizes(lengths, lengths // 5, groups > 0, lengths // 3, groups > 0, groups)
    cut = Cut(16, "tokens", 16 * 1034, True, 1e-4, 20.0)
    steps = Plan.of(Mixture.whole(records), 128, 3, None, 42).total_steps
    for step in (0, steps - 1, *random.Random(0).sample(range(steps), 4)):
        plan = Plan.of(Mixture.whole(records), 128, 3, None, 42, groups)
        started = time.process_time()
        deal(plan.step(step), sizes, 8, cut)
        assert time.process_time() - started < 2
