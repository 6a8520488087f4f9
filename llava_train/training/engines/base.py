"""What every engine can do. The loop, the checkpoints and the model folder know no more of it than this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llava_train.model.tuning import Group
from llava_train.recipe import OptimizationSettings, Recipe
from llava_train.training.engines.ranks import Ranks
from llava_train.training.objective import Objective


@dataclass(frozen=True)
class Fragment:
    """A run of elements of one trained weight that this rank holds: the currency of checkpoints.

    Every engine cuts weights into runs of the flattened weight: DDP holds them whole, ZeRO a part of a flat buffer,
    FSDP2 rows.

    Attributes:
        name: the weight's name in the model.
        start: first element, in the flattened weight.
        count: number of elements.
        owner: the tensor that the optimizer updates, float32; several fragments may lie in one.
        offset: first element, in the flattened owner.
    """

    name: str
    start: int
    count: int
    owner: torch.Tensor
    offset: int = 0

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This fragment's elements (count,) of the owner, or of a tensor of its shape: a view."""
        local = tensor.detach()
        if isinstance(local, DTensor):
            local = local.to_local()
        return local.view(-1)[self.offset : self.offset + self.count]


class Engine(ABC):
    """Losses are shares of the step's weighted sum, so gradients are added over ranks, never averaged.

    A run calls `place`, then `attach`; then for each step `backward` for each micro-batch, `clip`, `update`.
    """

    shards_weights = False
    """Whether frozen weights are spread over ranks too, so that every rank must run the same modules in step."""
    spreads: tuple[str, ...] = ()
    """Which of "weights", "gradients" and "optimizer" are spread over ranks"""
    autocast: torch.dtype | None = None
    """What forward computes in where weights are kept in more"""
    module: Any
    """The wrapped objective: a batch in, its share of the step's loss out"""
    optimizer: Any
    """What stands between the loop and torch's optimizer"""
    trained: dict[str, nn.Parameter]
    """Trained weights by name, in the order of their groups"""

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        self.ranks = ranks
        self.precision = recipe.optimization.precision
        self.fused = recipe.speed.fused_optimizer

    @property
    @abstractmethod
    def description(self) -> str:
        """One line for the table at start."""

    def dtypes(self, planned: dict[str, torch.dtype]) -> dict[str, torch.dtype]:
        """The precision of each weight on this engine, given the one that autocast wants."""
        return planned

    def seen(self, dtypes: dict[str, torch.dtype]) -> dict[str, torch.dtype]:
        """The precision of each weight as forward sees it, given `dtypes`."""
        return dtypes

    @abstractmethod
    def place(self, objective: Objective, dtypes: dict[str, torch.dtype]) -> None:
        """Bring the weights of a model on the CPU into their precision, onto the device, and into shards."""

    @abstractmethod
    def attach(self, objective: nn.Module, groups: list[Group], optimization: OptimizationSettings) -> None:
        """Make the optimizer over placed weights and wrap the module for forward and backward."""

    @abstractmethod
    def accumulate(self, last: bool) -> Any:
        """A context around forward and backward of a micro-batch; gradients meet over ranks in the `last` one."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a share of the loss."""

    @abstractmethod
    def clip(self, max_norm: float) -> float:
        """Scale gradients down to `max_norm`, now or in `update`; the norm before, which may not be finite."""

    def update(self, rates: list[float]) -> None:
        """One optimizer step at a rate a parameter group, then gradients are cleared."""
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate
        self._step()

    def _step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    @abstractmethod
    def fragments(self) -> list[Fragment]:
        """What this rank holds of the trained weights; the optimizer's state of each is that of its owner."""

    @property
    def saves(self) -> bool:
        """Whether this rank's fragments go into a checkpoint (rank 0 alone where all hold the same)."""
        return self.ranks.is_main

    @property
    def stepped(self) -> torch.optim.Optimizer:
        """The torch optimizer whose `state` is keyed by owners."""
        stepped: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return stepped

    def refresh(self) -> None:  # noqa: B027  (nothing to do where weights are their own masters)
        """Carry values written into fragments over to the weights that forward reads. Every rank calls it."""

    def whole(self, parameter: torch.Tensor) -> torch.Tensor:
        """A weight whole on the CPU, in float32 where it trains. Every rank calls it, for the same weight."""
        return parameter.detach().cpu()

    @property
    def skips_overflow(self) -> bool:
        """Whether an update whose gradients overflowed is skipped and tried again at a smaller scale (fp16)."""
        return self.precision == "fp16"

    def scale_state(self) -> dict[str, Any]:
        """What the loss scale of fp16 remembers, as JSON values."""
        return {}

    def load_scale_state(self, state: dict[str, Any]) -> None:  # noqa: B027  (only fp16 has one)
        """Go on with a loss scale of `scale_state`."""

    def _adamw(self, objective: nn.Module, groups: list[Group], settings: OptimizationSettings) -> torch.optim.AdamW:
        """AdamW over the placed weights that `groups` name, which are `trained` from now on."""
        named = {name.removeprefix("model."): parameter for name, parameter in objective.named_parameters()}
        self.trained = {name: named[name] for group in groups for name in group.names}
        return torch.optim.AdamW(
            [
                {"params": [named[name] for name in g.names], "lr": g.learning_rate, "weight_decay": g.weight_decay}
                for g in groups
            ],
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            fused=self.fused,
        )

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The module for forward alone: no dropout, no gradients."""
        self.module.eval()
        try:
            with torch.no_grad():
                yield self.module
        finally:
            self.module.train()


def units(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The layers of a model with their names, each to be spread and gathered as one: members of its module lists."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.ModuleList):
            found += [(f"{path}.{number}", layer) for number, layer in enumerate(child)]
        else:
            found += units(child, path)
    return found


def cast(
    module: nn.Module,
    dtypes: dict[str, torch.dtype],
    prefix: str = "",
    copy: bool = False,
    spread: Callable[[nn.Parameter], bool] = lambda parameter: False,
) -> None:
    """Put the weights of a module, which the objective calls `prefix`, into their precision, in place.

    Those that are `spread` already are left alone. By name: a table of the weights themselves would keep them alive
    while they are spread.
    """
    for name, parameter in module.named_parameters(prefix=prefix):
        if not spread(parameter):
            parameter.data = parameter.data.to(dtypes[name.removeprefix("model.")], copy=copy)
