"""PyTorch's FSDP2: every weight is spread over the ranks by rows, a layer is gathered when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llava_train.model.tuning import PRECISIONS, Group
from llava_train.recipe import OptimizationSettings, Recipe
from llava_train.training.engines.base import Engine, Fragment, cast, units
from llava_train.training.engines.ranks import Ranks
from llava_train.training.objective import Objective


class Fsdp2(Engine):
    """`fully_shard` on each layer, then on what is left. Trained weights are float32 and gathered in the precision."""

    shards_weights = True
    spreads = ("weights", "gradients", "optimizer")

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        super().__init__(recipe, ranks)
        self.mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        dtype = PRECISIONS[self.precision]
        self.policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)

    @property
    def description(self) -> str:
        """One line for the table at start."""
        return f"FSDP2 over {self.ranks.world_size} processes"

    def seen(self, dtypes: dict[str, torch.dtype]) -> dict[str, torch.dtype]:
        """What layers are gathered in."""
        return dict.fromkeys(dtypes, PRECISIONS[self.precision])

    def place(self, objective: Objective, dtypes: dict[str, torch.dtype]) -> None:
        """Cast and shard a layer at a time: no rank ever holds a second copy of more than one."""
        inner = MixedPrecisionPolicy(self.policy.param_dtype, self.policy.reduce_dtype)
        idle = {*objective.idle_layers}  # FSDP2 fails on what never runs
        for prefix, unit in units(objective):
            cast(unit, dtypes, prefix)
            if unit not in idle:
                fully_shard(unit, mesh=self.mesh, mp_policy=inner)
        cast(objective, dtypes, spread=lambda parameter: isinstance(parameter, DTensor))
        whole = {parameter for layer in idle for parameter in layer.parameters()}
        fully_shard(objective, mesh=self.mesh, mp_policy=self.policy, ignored_params=whole)

    def attach(self, objective: nn.Module, groups: list[Group], optimization: OptimizationSettings) -> None:
        """The optimizer over the shards."""
        self.module, self.optimizer = objective, self._adamw(objective, groups, optimization)

    def accumulate(self, last: bool) -> Any:
        """Gradients meet over ranks in every backward pass: those of a micro-batch would be whole until then."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a share of the loss. Ranks are averaged by FSDP, hence the factor."""
        (loss * self.ranks.world_size).backward()

    def clip(self, max_norm: float) -> float:
        """Scale gradients down to `max_norm`; the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    @property
    def saves(self) -> bool:
        """Each rank holds rows of its own."""
        return True

    def fragments(self) -> list[Fragment]:
        """This rank's rows of each trained weight: `torch.chunk` along the first dimension."""
        found = []
        for name, parameter in self.trained.items():
            assert isinstance(parameter, DTensor)
            row = prod(parameter.shape[1:])
            first = -(-parameter.shape[0] // self.ranks.world_size) * self.ranks.rank
            count = parameter.to_local().numel()
            if count:
                found.append(Fragment(name, first * row, count, parameter))
        return found

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """As for all; the outermost weights, which stay gathered in the run's precision, are let go afterwards."""
        with super().evaluating() as module:
            yield module
        self.module.reshard()

    def whole(self, parameter: torch.Tensor) -> torch.Tensor:
        """Gathered from all ranks."""
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        return whole.detach().cpu()
