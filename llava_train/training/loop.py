"""The step loop: read it from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from llava_train.data.batch import Batch
from llava_train.data.encode import IGNORE
from llava_train.data.plan import Plan
from llava_train.errors import TrainingError
from llava_train.model.tuning import Group
from llava_train.recipe import Recipe
from llava_train.training.engine import Engine
from llava_train.training.monitor import Monitor
from llava_train.training.objective import Objective, token_losses
from llava_train.training.schedule import rate_factor
from llava_train.training.state import RunState, seed_step


@dataclass(frozen=True)
class Hooks:
    """What the loop calls but does not know: saving a checkpoint, keeping the best model, being asked to stop."""

    save: Callable[[RunState], None]
    keep_best: Callable[[RunState], None]
    stop_asked: Callable[[], bool]


@dataclass(frozen=True)
class Course:
    """The material of a run: its plan, the steps in order, and the held-out batches."""

    plan: Plan
    steps: Iterator[list[Batch]]
    validation: Callable[[], Iterator[Batch]] | None


def run_loop(
    recipe: Recipe, engine: Engine, groups: list[Group], course: Course, state: RunState, monitor: Monitor, hooks: Hooks
) -> None:
    """Train from `state.step` to the end of the plan.

    Raises TrainingError before the update of a step whose loss or gradient is not finite, naming its samples, and
    KeyboardInterrupt after a checkpoint when a rank was asked to stop.
    """
    total = course.plan.total_steps
    for micro_batches in course.steps:
        started = time.perf_counter()
        seed_step(recipe.seed, state.step, engine.rank)
        factor = rate_factor(state.step, total, recipe.optimization)
        loss, stop, counts = _forward_backward(engine, micro_batches, state.step, hooks.stop_asked())
        norm = engine.clip(recipe.optimization.max_grad_norm)
        if not engine.skips_overflow:
            _require_finite("gradient norm", norm, state.step, micro_batches)
        engine.update([group.learning_rate * factor for group in groups])
        known_late = engine.last_grad_norm()
        state.step += 1
        monitor.step(
            {
                "step": state.step,
                "epoch": course.plan.epoch_at(state.step - 1),
                "loss": loss,
                "learning_rate": recipe.optimization.learning_rate * factor,
                "grad_norm": norm if known_late is None else known_late,
                **counts,
                "seconds": time.perf_counter() - started,
            }
        )
        if course.validation and _due(state.step, recipe.monitor.eval_every, total):
            _evaluate(engine, course.validation(), state, monitor, hooks)
        if stop or (recipe.checkpoint.save_every and _due(state.step, recipe.checkpoint.save_every, total)):
            hooks.save(state)
        if stop:
            raise KeyboardInterrupt


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)


def _forward_backward(
    engine: Engine, micro_batches: list[Batch], step: int, stop: bool
) -> tuple[float, bool, dict[str, int]]:
    """The step's loss over all ranks with its gradients in place, whether any rank is to stop, and the counts."""
    shares: list[torch.Tensor] = []
    for index, batch in enumerate(micro_batches):
        with engine.accumulate(last=index == len(micro_batches) - 1):
            share = engine.module(batch.to(engine.device))
            engine.backward(share)
        shares.append(share.detach().double())
    samples, tokens, supervised = _count(micro_batches)
    loss, stops, *counts = engine.total([float(sum(shares)), float(stop), samples, tokens, supervised])
    _require_finite("loss", loss, step, micro_batches)
    return loss, stops > 0, dict(zip(("samples", "tokens", "supervised_tokens"), map(int, counts)))


def _count(micro_batches: list[Batch]) -> tuple[int, int, int]:
    """Samples, tokens and supervised tokens, without the weightless filling of an uneven step."""
    samples = tokens = supervised = 0
    for batch in micro_batches:
        real = batch.weights > 0
        samples += int(real.sum())
        tokens += int(batch.attention_mask[real].sum())
        supervised += int((batch.labels[real, 1:] != IGNORE).sum())
    return samples, tokens, supervised


def _require_finite(what: str, value: float, step: int, micro_batches: list[Batch]) -> None:
    if not math.isfinite(value):
        names = [name for batch in micro_batches for name in batch.ids]
        shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
        raise TrainingError(
            f"step {step + 1}: the {what} is {value}; stopped before the update. Samples of this rank: {shown}. "
            "Try a lower learning rate, or precision bf16 instead of fp16"
        )


def _evaluate(engine: Engine, batches: Iterator[Batch], state: RunState, monitor: Monitor, hooks: Hooks) -> None:
    """Mean loss a supervised token over the held-out part, each rank its share; keeps the best model."""
    loss, count = validation_loss(engine, batches)
    monitor.evaluation({"step": state.step, "eval/loss": loss, "eval/tokens": count})
    if state.best_loss is None or loss < state.best_loss:
        state.best_loss, state.best_step = loss, state.step
        hooks.keep_best(state)


def validation_loss(engine: Engine, batches: Iterator[Batch]) -> tuple[float, int]:
    """(mean nll of a supervised token, number of them) over all ranks."""
    objective = engine.unwrapped
    assert isinstance(objective, Objective)
    objective.eval()
    total, count = 0.0, 0
    with torch.inference_mode(), engine.accelerator.autocast():
        for batch in batches:
            nll_S, _ = token_losses(objective.model, batch.to(engine.device))
            total += float(nll_S.double().sum())
            count += len(nll_S)
    objective.train()
    total, counted = engine.total([total, count])
    return total / max(1.0, counted), int(counted)
