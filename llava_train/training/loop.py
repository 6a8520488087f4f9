"""The step loop: read it from top to bottom."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch

from llava_train.data.batch import COUNTS, Batch
from llava_train.data.plan import Plan
from llava_train.errors import StoppedError, TrainingError
from llava_train.model.tuning import Group
from llava_train.recipe import Recipe
from llava_train.training.checkpoints.saving import Saver
from llava_train.training.engines.base import Engine
from llava_train.training.monitor import Monitor
from llava_train.training.schedule import rate_factor
from llava_train.training.signals import StopRequest
from llava_train.training.state import RunState, seed_step
from llava_train.training.watch import Watch


@dataclass(frozen=True)
class Hooks:
    """What the loop calls but does not know: checkpoints, the best model, being asked to stop, telling of a failure,
    and the watch over ranks that hang."""

    saver: Saver
    keep_best: Callable[[RunState], None]
    stop: StopRequest
    failed: Callable[[Failure], str]
    watch: Watch


@dataclass(frozen=True)
class Failure:
    """A loss or gradient norm that is not finite, with the samples of this rank that may be to blame."""

    step: int
    what: str
    value: float
    samples: tuple[str, ...]


@dataclass(frozen=True)
class Course:
    """The material of a run: its plan, the steps in order, and the held-out batches."""

    plan: Plan
    steps: Generator[list[Batch], None, None]
    validation: Callable[[], Iterator[Batch]] | None


def run_loop(
    recipe: Recipe, engine: Engine, groups: list[Group], course: Course, state: RunState, monitor: Monitor, hooks: Hooks
) -> None:
    """Train from `state.step` to the end of the plan.

    Raises TrainingError before the update of a step whose loss or gradient is not finite, naming its samples, and
    StoppedError after a checkpoint when a rank was asked to stop.
    """
    total, saver, watch = course.plan.total_steps, hooks.saver, hooks.watch
    watch.at(state.step + 1, "reading its samples")
    ready = time.perf_counter()
    for micro_batches in course.steps:
        watch.at(state.step + 1, "forward and backward")
        started = time.perf_counter()
        seed_step(recipe.seed, state.step, engine.ranks.rank)
        factor = rate_factor(state.step, total, recipe.optimization)
        signs = [float(hooks.stop()), float(saver.written)]
        loss, (stops, written), counts = _forward_backward(engine, micro_batches, state.step, signs, hooks)
        watch.at(state.step + 1, "update")
        norm = engine.clip(recipe.optimization.max_grad_norm)
        if not engine.skips_overflow:
            _require_finite("gradient norm", norm, state.step, micro_batches, hooks)
        engine.update([group.learning_rate * factor for group in groups])
        state.step += 1
        finished = time.perf_counter()
        monitor.step(
            {
                "step": state.step,
                "epoch": course.plan.epoch_at(state.step - 1),
                "loss": loss,
                "learning_rate": recipe.optimization.learning_rate * factor,
                "grad_norm": norm,
                **counts,
                "seconds": finished - started,
                "stall": (started - ready) / (finished - ready),
            }
        )
        with watch.patient():
            if written == engine.ranks.world_size:
                saver.commit()
            if course.validation and _due(state.step, recipe.monitor.eval_every, total):
                _evaluate(engine, course.validation(), state, monitor, hooks)
            is_best = recipe.checkpoint.keep_best and state.best_step == state.step
            every = recipe.checkpoint.save_every
            if stops or is_best or (every and _due(state.step, every, total)):
                monitor.sync()
                saver.save(state)
            if stops:
                saver.finish()
                raise StoppedError(state.step, hooks.stop.number or signal.SIGTERM)
        watch.at(state.step + 1, "reading its samples")
        ready = time.perf_counter()
    with watch.patient():
        saver.finish()


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)


def _forward_backward(
    engine: Engine, micro_batches: list[Batch], step: int, signs: list[float], hooks: Hooks
) -> tuple[float, list[float], dict[str, int]]:
    """The step's loss over all ranks with its gradients in place, sums of the ranks' `signs`, and the counts."""
    shares: list[torch.Tensor] = []
    for index, batch in enumerate(micro_batches):
        with engine.accumulate(last=index == len(micro_batches) - 1):
            share = engine.module(batch.to(engine.ranks.device))
            engine.backward(share)
        shares.append(share.detach().double())
    counts = [sum(batch.counts[kind] for batch in micro_batches) for kind in COUNTS]
    loss, *totals = engine.ranks.total([float(sum(shares)), *signs, *counts])
    if not math.isfinite(loss):
        blamed = [batch for batch, share in zip(micro_batches, shares) if not math.isfinite(share)]
        _require_finite("loss", loss, step, blamed, hooks)
    return loss, totals[: len(signs)], dict(zip(COUNTS, map(int, totals[len(signs) :])))


def _require_finite(what: str, value: float, step: int, micro_batches: list[Batch], hooks: Hooks) -> None:
    if not math.isfinite(value):
        with hooks.watch.patient():
            hooks.saver.finish()  # every rank comes here: what was being written is not lost
        samples = tuple(name for batch in micro_batches for name in batch.ids)
        raise TrainingError(hooks.failed(Failure(step + 1, what, value, samples)))


def _evaluate(engine: Engine, batches: Iterator[Batch], state: RunState, monitor: Monitor, hooks: Hooks) -> None:
    """Mean loss a supervised token over the held-out part, each rank its share; keeps the best model."""
    loss, count = validation_loss(engine, batches)
    monitor.evaluation({"step": state.step, "eval/loss": loss, "eval/tokens": count})
    if state.best_loss is None or loss < state.best_loss:
        state.best_loss, state.best_step = loss, state.step
        hooks.keep_best(state)


def validation_loss(engine: Engine, batches: Iterator[Batch]) -> tuple[float, int]:
    """(mean nll of a supervised token, number of them) over all ranks, each of which brings as many batches."""
    total, count = 0.0, 0
    with engine.evaluating() as module:
        for batch in batches:
            total += float(module(batch.to(engine.ranks.device)))
            count += batch.counts["supervised_tokens"]
    total, counted = engine.ranks.total([total, count])
    return total / max(1.0, counted), int(counted)
