"""Which checkpoints go: the rules, whatever the steps."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llava_train.recipe import CheckpointSettings
from llava_train.training.checkpoints.retention import superfluous

STEPS = st.sets(st.integers(1, 60), min_size=1)


def test_the_rules_one_by_one() -> None:
    steps = range(3, 31, 3)
    assert superfluous(steps, None, CheckpointSettings(keep_last=2)) == [3, 6, 9, 12, 15, 18, 21, 24]
    assert superfluous(steps, None, CheckpointSettings(keep_last=1, keep_every=6)) == [3, 9, 15, 21, 27]
    assert superfluous(steps, 9, CheckpointSettings(keep_last=8, keep_best=True)) == [3, 6]
    assert superfluous(steps, 6, CheckpointSettings(keep_last=8, keep_best=True)) == [3]
    assert superfluous(steps, 6, CheckpointSettings(keep_last=8)) == [3, 6]
    assert superfluous([], 6, CheckpointSettings(keep_best=True)) == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(STEPS, st.none() | st.integers(1, 60), st.integers(1, 5), st.integers(0, 7), st.booleans())
def test_what_goes_is_what_no_rule_keeps(steps: set[int], best: int | None, last: int, every: int, keep: bool) -> None:
    rules = CheckpointSettings(keep_last=last, keep_every=every, keep_best=keep)
    gone = superfluous(steps, best, rules)
    assert gone == sorted(set(gone)) and set(gone) <= steps
    left = steps - set(gone)
    assert max(steps) in left
    for step in steps:
        newer = sum(other > step for other in steps)
        wanted = newer < last or (every > 0 and step % every == 0) or (keep and step == best)
        assert (step in left) == wanted
    assert superfluous(left, best, rules) == []
