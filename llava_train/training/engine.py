"""Who runs the step: one process, DDP, or DeepSpeed, behind five verbs. Accelerate does the work.

The loop calls `backward` for each micro-batch of a step, then `clip`, then `update`. Losses are shares of the
step's weighted sum, so gradients are added over ranks, never averaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs
from torch import nn

from llava_train.errors import RecipeError
from llava_train.files import read_json
from llava_train.recipe import Recipe

_PATIENCE = timedelta(hours=2)


class Engine:
    """One process, or DDP when several were launched."""

    def __init__(self, recipe: Recipe) -> None:
        state = start_processes(recipe)
        # Accelerate keeps one precision a process; a second run in this process may want another.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            cpu=state.device.type == "cpu",
            mixed_precision=_mixed_precision(recipe),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self.accelerator.device

    @property
    def rank(self) -> int:
        """This process, from 0."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def description(self) -> str:
        """One line for the table at start."""
        kind = "one process" if self.world_size == 1 else f"DDP over {self.world_size} processes"
        return f"{kind} on {self.device.type}, precision {self.accelerator.mixed_precision}"

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take module and optimizer over (device, wrapping, precision)."""
        self.unwrapped = module
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch; gradients meet over ranks after the `last` one."""
        if last or self.world_size == 1:
            yield
        else:
            with self.accelerator.no_sync(self.module):
                yield

    @property
    def skips_overflow(self) -> bool:
        """Whether an update whose gradients overflowed is skipped and tried again at a smaller scale (fp16)."""
        return self.accelerator.scaler is not None

    def last_grad_norm(self) -> float | None:
        """The gradient norm where only the update itself computes it; None where `clip` gave it."""
        return None

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a share of the loss. Ranks are averaged by DDP, hence the factor."""
        self.accelerator.backward(loss * self.world_size)

    def clip(self, max_norm: float) -> float:
        """Scale gradients down to `max_norm`; the norm before."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        return float(self.accelerator.clip_grad_norm_(parameters, max_norm))

    def update(self, rates: list[float]) -> None:
        """One optimizer step at a rate a parameter group, then gradients are cleared."""
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def total(self, values: list[float]) -> list[float]:
        """Sums over ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.accelerator.reduce(tensor, reduction="sum").tolist()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Leave the process group in order."""
        self.accelerator.end_training()


class ZeroEngine(Engine):
    """DeepSpeed ZeRO. The step's boundary is set by us: the engine's own accumulation is 1."""

    def __init__(self, recipe: Recipe) -> None:
        config = read_json(Path(str(recipe.engine.deepspeed_config)))
        if config.get("zero_optimization", {}).get("stage", 0) not in (1, 2):
            raise RecipeError(
                f"{recipe.engine.deepspeed_config}: ZeRO stages 1 and 2 are supported; stage 3 is not yet"
            )
        if "WORLD_SIZE" not in os.environ:
            raise RecipeError("engine.kind: deepspeed runs under a launcher: deepspeed scripts/train.py RECIPE")
        config |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": recipe.optimization.max_grad_norm,
            "bf16": {"enabled": recipe.optimization.precision == "bf16"},
            "fp16": {"enabled": recipe.optimization.precision == "fp16"},
            "zero_allow_untested_optimizer": True,
        }
        self._stage = config["zero_optimization"]["stage"]
        start_processes(recipe)
        _join_deepspeed()
        AcceleratorState._reset_state()
        # The device was chosen by start_processes; `cpu=True` here would make Accelerate forget DeepSpeed.
        self.accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))

    @property
    def description(self) -> str:
        """One line for the table at start."""
        return f"DeepSpeed ZeRO-{self._stage} over {self.world_size} processes on {self.device.type}"

    @property
    def _zero(self) -> Any:
        return self.accelerator.deepspeed_engine_wrapped.engine

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Gradients are reduced as they come; `last` closes the step."""
        self._zero.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a share of the loss; DeepSpeed averages over ranks, hence the factor."""
        self._zero.backward(loss * self.world_size, scale_wrt_gas=False)

    def clip(self, max_norm: float) -> float:
        """DeepSpeed clips inside its step; the norm is known only after it."""
        return 0.0

    def update(self, rates: list[float]) -> None:
        """One engine step at a rate a parameter group."""
        for group, rate in zip(self._zero.optimizer.param_groups, rates):
            group["lr"] = rate
        self._zero.step()

    def last_grad_norm(self) -> float | None:
        """Norm before clipping of the step just made."""
        return float(self._zero.get_global_grad_norm() or 0.0)

    def save(self, folder: Path) -> None:
        """DeepSpeed's own shards, a file a rank (pickles: read back only when our manifest lists them)."""
        self._zero.save_checkpoint(str(folder / "zero"), tag="state", exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """What `save` wrote; the caller has verified the files."""
        self._zero.load_checkpoint(str(folder / "zero"), tag="state", load_module_strict=False)


def make_engine(recipe: Recipe) -> Engine:
    """The engine that the recipe asks for."""
    return ZeroEngine(recipe) if recipe.engine.kind == "deepspeed" else Engine(recipe)


def start_processes(recipe: Recipe) -> PartialState:
    """Join the launch this process belongs to, if any, on the device that the recipe wants."""
    if recipe.engine.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("engine.device: cuda is asked for, but torch sees no GPU")
    cpu = recipe.engine.device == "cpu" or not torch.cuda.is_available()
    # One OpenMP pool a process: ranks on one machine would otherwise fight over the cores.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and cpu:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    # Rank 0 may prepare data for longer than the ten minutes that waiting ranks have by default.
    return PartialState(cpu=cpu, timeout=_PATIENCE)


def _join_deepspeed() -> None:
    try:
        import deepspeed
    except ImportError as error:
        raise RecipeError("engine.kind: deepspeed is not installed; pip install 'llava-train[deepspeed]'") from error
    if PartialState().device.type == "cpu":
        # Its shared-memory kernels are compiled at first use (minutes) and only save a copy: gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")
    else:
        deepspeed.init_distributed()


def _mixed_precision(recipe: Recipe) -> str:
    precision = recipe.optimization.precision
    return "no" if precision == "fp32" else precision
