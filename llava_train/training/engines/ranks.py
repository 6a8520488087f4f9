"""The processes of a run: which of them this is, on which device, and what they say to one another."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState

from llava_train.errors import RecipeError
from llava_train.recipe import Recipe

_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process among those of a launch."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes for all."""
        return self.rank == 0

    def total(self, values: list[float]) -> list[float]:
        """Sums over ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def agree(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        return int(self.total([float(value) if self.is_main else 0.0])[0])

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            self.total([0.0])


def leave_ranks() -> None:
    """Leave the process group in order, at the end of a process that trained."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_ranks() -> int:
    """Processes of the launch on this machine, as torchrun or DeepSpeed says it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def join_ranks(recipe: Recipe) -> Ranks:
    """Join the launch this process belongs to, if any, on the device that the recipe wants."""
    if recipe.engine.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("engine.device: cuda is asked for, but torch sees no GPU")
    cpu = recipe.engine.device == "cpu" or not torch.cuda.is_available()
    # One OpenMP pool a process: ranks on one machine would otherwise fight over the cores.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and cpu:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks()))
    # Rank 0 may prepare data for longer than the ten minutes that waiting ranks have by default.
    state = PartialState(cpu=cpu, timeout=_PATIENCE)
    return Ranks(int(state.process_index), int(state.num_processes), state.device)
