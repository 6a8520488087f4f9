"""Which checkpoints may go."""

from __future__ import annotations

from collections.abc import Iterable

from llava_train.recipe import CheckpointSettings


def superfluous(steps: Iterable[int], best_step: int | None, settings: CheckpointSettings) -> list[int]:
    """Steps whose checkpoints no rule keeps: not among the last, no multiple of `keep_every`, not the best."""
    ordered = sorted(steps)
    kept = set(ordered[-settings.keep_last :])
    if settings.keep_every:
        kept |= {step for step in ordered if step % settings.keep_every == 0}
    if settings.keep_best and best_step is not None:
        kept.add(best_step)
    return [step for step in ordered if step not in kept]
