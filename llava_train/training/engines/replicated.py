"""Every rank holds every weight: one process, or DDP where several were launched. Accelerate does the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from llava_train.model.tuning import PRECISIONS, Group
from llava_train.recipe import OptimizationSettings, Recipe
from llava_train.training.engines.base import Engine, Fragment, cast
from llava_train.training.engines.ranks import Ranks
from llava_train.training.objective import Objective


class Replicated(Engine):
    """One process, or DDP. The forward pass runs in autocast, trained weights stay in float32."""

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        super().__init__(recipe, ranks)
        self.autocast = None if self.precision == "fp32" else PRECISIONS[self.precision]
        # Accelerate keeps one precision a process; a second run in this process may want another.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            cpu=ranks.device.type == "cpu",
            mixed_precision="no" if self.precision == "fp32" else self.precision,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
        )

    @property
    def description(self) -> str:
        """One line for the table at start."""
        count = self.ranks.world_size
        return "one process" if count == 1 else f"DDP over {count} processes"

    def place(self, objective: Objective, dtypes: dict[str, torch.dtype]) -> None:
        """Cast in place; Accelerate moves the model in `attach`."""
        cast(objective, dtypes)

    def attach(self, objective: nn.Module, groups: list[Group], optimization: OptimizationSettings) -> None:
        """Wrap for autocast and DDP."""
        objective.to(self.ranks.device)
        optimizer = self._adamw(objective, groups, optimization)
        self.module, self.optimizer = self.accelerator.prepare(objective, optimizer)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Gradients meet over ranks in the backward pass of the last micro-batch."""
        if last or self.ranks.world_size == 1:
            yield
        else:
            with self.accelerator.no_sync(self.module):
                yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a share of the loss. Ranks are averaged by DDP, hence the factor."""
        self.accelerator.backward(loss * self.ranks.world_size)

    def clip(self, max_norm: float) -> float:
        """Scale gradients down to `max_norm`; the norm before."""
        return float(self.accelerator.clip_grad_norm_(list(self.trained.values()), max_norm))

    def fragments(self) -> list[Fragment]:
        """Every trained weight, whole."""
        return [Fragment(name, 0, p.numel(), p) for name, p in self.trained.items()]

    def scale_state(self) -> dict[str, Any]:
        """State of the gradient scaler."""
        return dict(self.accelerator.scaler.state_dict()) if self.accelerator.scaler else {}

    def load_scale_state(self, state: dict[str, Any]) -> None:
        """Go on with the scale of a checkpoint (of another engine: its scale alone)."""
        if self.accelerator.scaler and state:
            self.accelerator.scaler.load_state_dict({**self.accelerator.scaler.state_dict(), **state})
