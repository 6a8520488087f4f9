import pytest
import torch
from transformers import get_scheduler

from llava_train.recipe import OptimizationSettings
from llava_train.training.schedule import rate_factor


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "ratio"), [(97, 0.03), (10, 0.0), (1, 0.03), (40, 0.5)])
def test_the_curve_is_that_of_transformers(schedule: str, total: int, ratio: float) -> None:
    settings = OptimizationSettings(schedule=schedule, warmup_ratio=ratio)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = -(-total * ratio // 1)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=int(warmup), num_training_steps=total)
    for step in range(total):
        assert rate_factor(step, total, settings) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
