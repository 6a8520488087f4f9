"""DeepSpeed's ZeRO: stage 1 spreads the optimizer's state over ranks, 2 the gradients too, 3 the weights as well.

The step's boundary is set by us: the engine's own accumulation is 1. Its masters (float32) are what checkpoints hold;
they are found by the links that DeepSpeed keeps for its own universal checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llava_train.model.tuning import PRECISIONS, Group
from llava_train.recipe import OptimizationSettings, Recipe
from llava_train.training.engines.base import Engine, Fragment, cast, units
from llava_train.training.engines.ranks import Ranks
from llava_train.training.engines.zero_config import zero_config
from llava_train.training.objective import Objective

_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Zero(Engine):
    """ZeRO-1 and ZeRO-2: weights are whole on every rank, float32 masters and moments are spread."""

    def __init__(self, recipe: Recipe, ranks: Ranks, stage: int) -> None:
        super().__init__(recipe, ranks)
        self.config = zero_config(recipe, ranks, stage)
        self.stage, self.offload = stage, _offload(self.config)
        self.spreads = ("optimizer", "gradients", "weights")[:stage]
        _join_deepspeed(ranks)

    @property
    def description(self) -> str:
        """One line for the table at start."""
        away = f", {self.offload} offloaded to the CPU" if self.offload else ""
        return f"DeepSpeed ZeRO-{self.stage} over {self.ranks.world_size} processes{away}"

    def dtypes(self, planned: dict[str, torch.dtype]) -> dict[str, torch.dtype]:
        """All weights in the precision of the run: the masters are DeepSpeed's."""
        return dict.fromkeys(planned, PRECISIONS[self.precision])

    def place(self, objective: Objective, dtypes: dict[str, torch.dtype]) -> None:
        """Cast in place; DeepSpeed moves the model in `attach`."""
        cast(objective, dtypes)

    def attach(self, objective: nn.Module, groups: list[Group], optimization: OptimizationSettings) -> None:
        """Hand module and optimizer to DeepSpeed."""
        import deepspeed

        optimizer = self._adamw(objective, groups, optimization)
        self.module, self.optimizer, *_ = deepspeed.initialize(
            model=objective, optimizer=optimizer, config=self.config, dist_init_required=False
        )

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Gradients are reduced as they come; `last` closes the step."""
        self.module.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a share of the loss; DeepSpeed averages over ranks, hence the factor."""
        self.module.backward(loss * self.ranks.world_size, scale_wrt_gas=False)

    def clip(self, max_norm: float) -> float:
        """The norm of the gradients; DeepSpeed clips in `update`, to the same bound."""
        return float(self._scaled_norm()) / float(self.optimizer.loss_scale)

    def _scaled_norm(self) -> torch.Tensor:
        return self.optimizer.scaled_global_norm()

    def _step(self) -> None:
        self.module.step()  # which clears the gradients, too

    @property
    def saves(self) -> bool:
        """Each rank holds masters of its own."""
        return True

    def fragments(self) -> list[Fragment]:
        """The parts of trained weights that lie in this rank's flat masters."""
        found = []
        for name, parameter in self.trained.items():
            link = parameter._hp_mapping  # type: ignore[attr-defined]
            if link is not None:
                owner = self.optimizer.single_partition_of_fp32_groups[link.param_group_index]
                lies = link.hp_fragment_address
                found.append(Fragment(name, link.lp_fragment_address.start, lies.numel, owner, lies.start))
        return found

    def refresh(self) -> None:
        """Weights from masters, on every rank."""
        self.optimizer.update_lp_params()

    def whole(self, parameter: torch.Tensor) -> torch.Tensor:
        """The float32 master, gathered; a frozen weight as it is."""
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        return (parameter.detach() if master is None else master).cpu()

    def scale_state(self) -> dict[str, Any]:
        """State of DeepSpeed's loss scale."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        found = {key: getattr(scaler, key) for key in _SCALE if hasattr(scaler, key)}
        return {"scale": found["cur_scale"], **found} if self.skips_overflow and "cur_scale" in found else {}

    def load_scale_state(self, state: dict[str, Any]) -> None:
        """Go on with the scale of a checkpoint (of another engine: its scale alone)."""
        if self.skips_overflow and "scale" in state:
            for key, value in {**state, "cur_scale": state["scale"]}.items():
                if key in _SCALE:
                    setattr(self.optimizer.loss_scaler, key, value)


class Zero3(Zero):
    """ZeRO-3: every weight is spread, too, and gathered by the module that uses it."""

    shards_weights = True

    def place(self, objective: Objective, dtypes: dict[str, torch.dtype]) -> None:
        """Cast and spread a layer at a time: no rank ever holds a second copy of more than one."""
        for prefix, unit in units(objective):
            # A copy: what is spread is broadcast first, and writing into a weight read from a file would keep the
            # written pages for as long as any weight of that file lives.
            cast(unit, dtypes, prefix, copy=True)
            self._spread(unit)
        cast(objective, dtypes, copy=True, spread=lambda parameter: hasattr(parameter, "ds_id"))
        self._spread(objective)

    def _spread(self, module: nn.Module) -> None:
        from deepspeed import zero

        zero.Init(module=module, config_dict_or_path=self.config, dtype=PRECISIONS[self.precision])

    def _scaled_norm(self) -> torch.Tensor:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return combine_grad_norm_groups(self.optimizer._get_norm_groups())

    def fragments(self) -> list[Fragment]:
        """This rank's part of each trained weight; the last rank's is shorter by the padding."""
        found = []
        for name, parameter in self.trained.items():
            group, offset, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            start = self.ranks.rank * size
            count = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
            if count > 0:
                owner = self.optimizer.fp32_partitioned_groups_flat[group]
                found.append(Fragment(name, start, count, owner, offset))
        return found

    def refresh(self) -> None:
        """Weights from masters, on every rank."""
        for group in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        kept = self.optimizer.persistent_parameters
        if kept:
            kept[0].partition(param_list=kept, has_been_updated=False)
            kept[0].all_gather(kept)

    def whole(self, parameter: torch.Tensor) -> torch.Tensor:
        """The float32 master of a trained weight, a frozen one as it is: gathered."""
        from deepspeed import zero

        if parameter.requires_grad:
            return super().whole(parameter)
        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone().cpu()


def _offload(config: dict[str, Any]) -> str:
    zero = config["zero_optimization"]
    away = [
        word
        for key, word in (("offload_optimizer", "optimizer"), ("offload_param", "weights"))
        if (zero.get(key) or {}).get("device", "none") != "none"
    ]
    return " and ".join(away)


def _join_deepspeed(ranks: Ranks) -> None:
    import deepspeed

    if ranks.device.type == "cpu":
        # Its shared-memory kernels are compiled at first use (minutes) and only save a copy: gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")
    else:
        deepspeed.init_distributed()
