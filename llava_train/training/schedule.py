"""Learning rates as a pure function of the step: nothing to save, nothing to drift on resume."""

from __future__ import annotations

import math

from llava_train.recipe import OptimizationSettings


def rate_factor(step: int, total_steps: int, optimization: OptimizationSettings) -> float:
    """The factor on every base rate at `step` (from 0): linear warm-up, then the schedule.

    The same curve as transformers' `get_cosine_schedule_with_warmup` and `get_linear_schedule_with_warmup`,
    which the original uses (warm-up steps rounded up).
    """
    warmup = math.ceil(total_steps * optimization.warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if optimization.schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if optimization.schedule == "linear":
        return max(0.0, 1.0 - progress)
    return 1.0
