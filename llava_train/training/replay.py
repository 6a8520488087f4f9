"""A step that stopped a run, looked at again sample by sample: which are not finite, and where in the model it begins.

Reads the run folder and writes nothing into it. One process does it, whatever the run was made with: a step's samples
do not depend on the number of ranks, and checkpoints are read by any number of them.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from llava_train.data.batch import Batch, StepDataset, load_steps
from llava_train.data.micro_batches import MicroBatch
from llava_train.errors import RecipeError, RecordError, TrainingError
from llava_train.files import read_json
from llava_train.model.tuning import PARTS, part_of
from llava_train.recipe import EngineSettings, Recipe, load_recipe
from llava_train.training.engines.ranks import join_ranks
from llava_train.training.failure import FOLDER
from llava_train.training.material import readers_of
from llava_train.training.monitor import METRICS, read_rows, say
from llava_train.training.origin import first_backward, first_module
from llava_train.training.run import RECIPE
from llava_train.training.schedule import rate_factor
from llava_train.training.setup import Setup, set_up
from llava_train.training.state import seed_step

_SHOWN = 16


@dataclass(frozen=True)
class Look:
    """One sample of the step by itself: its mean nll of a supervised token, and the norm of that loss's gradient."""

    sample: str
    finite: bool
    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int

    def row(self) -> dict[str, Any]:
        """As JSON holds it: a value that is not finite is a string."""
        return {key: _json(value) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Found:
    """What a look brought: samples, those that are not finite first, and what is to be said about them."""

    looks: tuple[Look, ...]
    summary: str


def replay(
    folder: Path,
    step: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    allowed: Sequence[str] = (),
) -> Found:
    """Make a run's steps again from the newest checkpoint before `step`, and look at `step` before its update.

    `step` counts from 1, as messages and metrics do; without one it is the run's last failed step. `device` and
    `precision` take the place of the run's; `allowed` names what may have changed since the checkpoint. Raises
    RecipeError, DataError, CheckpointError or TrainingError.
    """
    recipe = _recipe_of(folder, device, precision)
    step = _last_failed(folder) if step is None else step
    ranks = join_ranks(recipe)
    if recipe.optimization.precision == "fp16" and ranks.device.type == "cpu":
        raise RecipeError(f"{folder}: the run is in fp16, which needs a GPU; look at it with --precision bf16 or fp32")
    changes = [*allowed, "optimization.precision", "data.feature_cache"] if precision else allowed
    try:
        setup = set_up(recipe, ranks, folder, changes, before=step)
        if not 1 <= step <= setup.plan.total_steps:
            raise RecipeError(f"--step {step}: the run has steps 1 to {setup.plan.total_steps:,}")
        return _Replay(recipe, setup, folder, step).look()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"{folder}: one {ranks.device.type} device holds all weights and moments here, and they do not fit; "
            "look with --device cpu"
        ) from error


def _recipe_of(folder: Path, device: str | None, precision: str | None) -> Recipe:
    """The run's recipe, for one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("replay looks from one process, whatever the run was made with: start it without a launcher")
    if not (folder / RECIPE).is_file():
        raise RecipeError(f"{folder}: holds no {RECIPE}; name the folder of a run (key `output` of its recipe)")
    recipe = load_recipe(folder / RECIPE)
    where: Any = device or ("cpu" if recipe.engine.device == "cpu" else "auto")
    wanted: Any = precision or recipe.optimization.precision
    cached = recipe.data.feature_cache and wanted == recipe.optimization.precision  # or the tower is looked at, too
    return replace(
        recipe,
        data=replace(recipe.data, feature_cache=cached),
        engine=EngineSettings(kind="ddp", device=where),
        optimization=replace(recipe.optimization, precision=wanted),
    )


def _failures(folder: Path, step: int | None = None) -> list[Path]:
    """What the ranks of a failed step left, the newest last."""
    found = (folder / FOLDER).glob(f"step-{'*' if step is None else step}-rank-*.json")
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _last_failed(folder: Path) -> int:
    files = _failures(folder)
    if not files:
        raise RecipeError(f"{folder / FOLDER}: tells of no failed step; name one with --step N")
    return int(read_json(files[-1])["step"])


class EveryRank(StepDataset):
    """Item `step * world_size + rank` is what that rank of the run had in that step."""

    def __len__(self) -> int:
        return super().__len__() * self.world_size

    def __getitem__(self, item: int) -> list[Batch] | RecordError:
        step, self.rank = divmod(item, self.world_size)
        return super().__getitem__(step)


class _Replay:
    """A run set up before the step to look at."""

    def __init__(self, recipe: Recipe, setup: Setup, folder: Path, step: int) -> None:
        self.recipe, self.setup, self.folder, self.step = recipe, setup, folder, step
        self.engine, self.model, self.begun = setup.engine, setup.assembly.model, setup.state.step
        self.failures = [read_json(path) for path in _failures(folder, step)]
        world_size = 1 + max((int(each["rank"]) for each in self.failures), default=0)
        self.reader, _ = readers_of(recipe, setup.assembly, setup.prepared, setup.costs)
        self.dataset = EveryRank(self.reader, setup.plan, 0, world_size)

    def look(self) -> Found:
        """Make the steps before again, then look."""
        loss, norm = self._make_again()
        supervised = self.setup.prepared.train.supervised
        samples = list(dict.fromkeys(self.setup.plan.step(self.step - 1)))  # a mixture may bring one twice
        looks: list[Look] = []
        origin: list[str] = []
        for sample in tqdm(samples, "samples", unit="sample", dynamic_ncols=True, file=sys.stderr):
            micro_batch = MicroBatch((sample,), (1.0 / int(supervised[sample]),))
            batch = self.reader(micro_batch).to(self.engine.ranks.device)
            looks.append(self._alone(batch, int(supervised[sample])))
            if not looks[-1].finite and not origin:
                forward = partial(self._forward, batch)
                in_forward = not math.isfinite(looks[-1].loss)
                found = first_module(self.model, forward) if in_forward else first_backward(forward, self._grads)
                origin.append(f"{looks[-1].sample}: {found}")
        verdict = _verdict(looks, self._goes_on(loss, norm))
        told = [self._headline(loss, norm), *verdict, *origin, *self._rates(), *self._largest_weights()]
        return Found(tuple(sorted(looks, key=lambda each: each.finite)), "\n".join(told))

    def _make_again(self) -> tuple[float, float]:
        """Loss and gradient norm of the step to look at, after the updates of those before it.

        A step before it that is not finite is the one to look at instead.
        """
        first = self.begun * self.dataset.world_size
        steps = load_steps(self.dataset, first, self.recipe.data.num_workers)
        for index in tqdm(range(self.begun, self.step - 1), "again", unit="step", dynamic_ncols=True, file=sys.stderr):
            loss, norm = self._gradients(steps, index)
            if not self._goes_on(loss, norm):
                say(f"step {index + 1} is not finite already: looking at it instead of step {self.step}")
                self.step = index + 1
                return loss, norm
            factor = rate_factor(index, self.setup.plan.total_steps, self.recipe.optimization)
            self.engine.update([group.learning_rate * factor for group in self.setup.groups])
        return self._gradients(steps, self.step - 1)

    def _gradients(self, steps: Iterator[list[Batch]], index: int) -> tuple[float, float]:
        """Loss and gradient norm of a step, its gradients in place: what each rank had, as it had it, in turn."""
        shares = []
        for rank in range(self.dataset.world_size):
            micro_batches = next(steps)  # before the seed: a loader that begins draws a number
            seed_step(self.recipe.seed, index, rank)
            for batch in micro_batches:
                share = self.engine.module(batch.to(self.engine.ranks.device))
                self.engine.backward(share)
                shares.append(share.detach().double())
        return float(sum(shares)), self.engine.clip(self.recipe.optimization.max_grad_norm)

    def _goes_on(self, loss: float, norm: float) -> bool:
        """Whether a run makes the update; in fp16 it skips one whose scaled gradients overflow, and goes on."""
        return math.isfinite(loss) and (math.isfinite(norm) or self.engine.skips_overflow)

    def _forward(self, batch: Batch) -> torch.Tensor:
        """The loss of a sample, no gradients of another left; the same random numbers each time."""
        self.engine.optimizer.zero_grad()
        seed_step(self.recipe.seed, self.step - 1, 0)
        loss: torch.Tensor = self.engine.module(batch)
        return loss

    def _alone(self, batch: Batch, supervised: int) -> Look:
        loss = self._forward(batch)
        loss.backward()  # without the loss scale of fp16: an overflow of scaled gradients stops no run
        value, norm = float(loss.detach()), float(get_total_norm([grad for _, grad in self._grads()]))
        finite = math.isfinite(value) and math.isfinite(norm)
        return Look(batch.ids[0], finite, value, norm, batch.counts["tokens"], supervised)

    def _grads(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, weight.grad) for name, weight in self.engine.trained.items() if weight.grad is not None]

    def _headline(self, loss: float, norm: float) -> str:
        start = f"checkpoint step-{self.begun}" if self.begun else "the beginning"
        again, total = self.step - 1 - self.begun, self.setup.plan.total_steps
        told = f"step {self.step} of {total:,}, from {start} with {again} steps made again ({self.engine.precision} on "
        told += f"{self.engine.ranks.device.type}): loss {loss:.6g}, gradient norm {norm:.6g}"
        return told + "".join(f"; in the run the {each['what']} was {each['value']}" for each in self.failures[-1:])

    def _rates(self) -> Iterator[str]:
        """What the run says of the steps before, and the learning rates of this one."""
        path = self.folder / METRICS
        rows = [row for row in read_rows(path) if "loss" in row and row["step"] < self.step] if path.is_file() else []
        for row in rows[-4:]:
            yield (
                f"in the run, step {row['step']}: loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}, "
                f"learning rate {row['learning_rate']:.3g}"
            )
        factor = rate_factor(self.step - 1, self.setup.plan.total_steps, self.recipe.optimization)
        rates = {group.part: group.learning_rate * factor for group in self.setup.groups}
        yield f"learning rates of step {self.step}: " + ", ".join(f"{part} {rate:.3g}" for part, rate in rates.items())

    def _largest_weights(self) -> Iterator[str]:
        sizes = [(float(weight.detach().abs().max()), name) for name, weight in self.model.named_parameters()]
        for part in PARTS:
            own = [pair for pair in sizes if part_of(pair[1]) == part]
            if own:
                value, name = max(own, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
                yield f"largest weight of {part}: {value:.4g}, in {name}"


def _verdict(looks: list[Look], whole: bool) -> Iterator[str]:
    """Which samples are to blame; `whole` says whether the step as the run made it is finite."""
    bad = [each for each in looks if not each.finite]
    if bad:
        yield f"{len(bad)} of {len(looks)} samples are not finite by themselves:"
        for each in bad[:_SHOWN]:
            yield f"  {each.sample}: loss {each.loss:.4g}, gradient norm {each.grad_norm:.4g}"
        yield from [f"  and {len(bad) - _SHOWN} more"] * (len(bad) > _SHOWN)
        if len(bad) == len(looks):
            yield "All of them: look at the learning rates and weights below rather than at the data."
    elif not whole:
        yield f"All {len(looks)} samples are finite by themselves; only their sum is not."
    else:
        yield f"All {len(looks)} samples are finite, by themselves and together: nothing here would stop a run."
        yield "Another --device or --precision may show what did."


def _json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
