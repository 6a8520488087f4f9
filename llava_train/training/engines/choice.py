"""Which engine runs a recipe, and why."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from llava_train.errors import RecipeError
from llava_train.recipe import Recipe
from llava_train.training.engines.base import Engine
from llava_train.training.engines.fsdp2 import Fsdp2
from llava_train.training.engines.ranks import Ranks, local_ranks
from llava_train.training.engines.replicated import Replicated
from llava_train.training.engines.zero import Zero, Zero3
from llava_train.training.engines.zero_config import stage_of, zero_config

ENGINES: dict[str, Callable[[Recipe, Ranks], Engine]] = {
    "ddp": Replicated,
    "deepspeed_zero1": partial(Zero, stage=1),
    "deepspeed_zero2": partial(Zero, stage=2),
    "deepspeed_zero3": partial(Zero3, stage=3),
    "fsdp2": Fsdp2,
}
"""Engines by the name that `engine.kind` gives them."""

_SHARE = 0.6
"""Of a device's memory, what weights and optimizer may take; the rest is for activations and logits."""
_TRAINED_BYTES = 16
"""A trained weight on DDP: itself, its gradient and two moments, in float32."""


@dataclass(frozen=True)
class Load:
    """What a model asks of memory: bytes of its frozen weights in their precision, number of trained ones."""

    frozen_bytes: int
    trained: int


def make_engine(recipe: Recipe, ranks: Ranks, load: Load) -> tuple[Engine, str]:
    """The engine of a recipe, and why it is the one."""
    kind, why = choose(recipe, ranks, load)
    kind = list(ENGINES)[ranks.agree(list(ENGINES).index(kind))]  # ranks on unlike machines might choose otherwise
    return ENGINES[kind](recipe, ranks), why


def require_engine(recipe: Recipe, ranks: Ranks) -> None:
    """Raise RecipeError, before anything is computed, where what the recipe names cannot run here."""
    kind = _named(recipe)
    if recipe.speed.liger and ranks.device.type != "cuda":
        raise RecipeError("speed.liger: Liger's kernels are Triton's and run on a GPU alone; set speed.liger=false")
    if recipe.speed.attention in ("flex", "varlen") and recipe.speed.packing and ranks.device.type != "cuda":
        raise RecipeError(f"speed.attention: {recipe.speed.attention} gives gradients on CUDA alone; take auto")
    if recipe.speed.compile and kind == "deepspeed_zero3":
        raise RecipeError("speed.compile: ZeRO-3 gathers weights inside of what would be compiled; take fsdp2 or zero2")
    if kind == "fsdp2" and ranks.world_size == 1:
        raise RecipeError("engine.kind: fsdp2 spreads weights over processes, and this is one; use torchrun")
    if not kind.startswith("deepspeed"):
        return
    if "WORLD_SIZE" not in os.environ:
        raise RecipeError(f"engine.kind: {kind} runs under a launcher: deepspeed (or torchrun) scripts/train.py RECIPE")
    if importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(f"engine.kind: {kind}: deepspeed is not installed; pip install 'llava-train[deepspeed]'")
    zero_config(recipe, ranks, int(kind[-1]))


def _named(recipe: Recipe) -> str:
    """The engine that the recipe, or its DeepSpeed file, names; "auto" where neither does."""
    file = recipe.engine.deepspeed_config
    if recipe.engine.kind == "auto" and file:
        return f"deepspeed_zero{stage_of(Path(file).expanduser())}"
    return recipe.engine.kind


def choose(recipe: Recipe, ranks: Ranks, load: Load) -> tuple[str, str]:
    """(kind, reason). Where the recipe leaves it open: the plainest that fits into the memory of a device.

    DDP with frozen weights in bf16 first: training 21M connector weights that way was measured elsewhere at 2.6 times
    the speed of ZeRO-2.
    """
    named = _named(recipe)
    if named != "auto":
        by_file = recipe.engine.kind == "auto"
        return named, f"{recipe.engine.deepspeed_config} names the stage" if by_file else "the recipe names it"
    if ranks.world_size == 1:
        return "ddp", "nothing to share with"
    room = _SHARE * device_memory(ranks.device)
    whole = load.frozen_bytes + load.trained * _TRAINED_BYTES
    if whole <= room:
        return "ddp", f"{_gb(whole)} of weights and optimizer fit into {_gb(room)} a process"
    spread = load.frozen_bytes + load.trained * (2 + 2) + load.trained * 12 // ranks.world_size
    deepspeed = importlib.util.find_spec("deepspeed") is not None
    if deepspeed and spread <= room:
        return "deepspeed_zero2", f"{_gb(whole)} do not fit into {_gb(room)} a process, {_gb(spread)} do"
    reason = f"{_gb(spread)} of weights do not fit into {_gb(room)} a process, so they are spread as well"
    return ("deepspeed_zero3" if deepspeed else "fsdp2"), reason


def device_memory(device: torch.device) -> int:
    """Bytes of memory that one process may call its own."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // local_ranks()


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
