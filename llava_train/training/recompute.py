"""Recompute: which layers throw their activations away and compute them again in the backward pass, by what fits.

The first layers are the ones: the backward pass reaches them last, when what the others kept is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_train.errors import RecipeError
from llava_train.model.memory import Kept
from llava_train.model.towers.features import tower_layers
from llava_train.model.tuning import part_of

Setting = Literal["auto", "none", "selective", "full"]

_USABLE = 0.9
"""Of a device's memory: the rest goes to the allocator's gaps, the libraries' workspaces and other contexts."""
_MOMENTS = 8
"""Bytes of Adam's two moments of a weight"""


@dataclass(frozen=True)
class Spread:
    """Over how many ranks an engine spreads each of these; 1 where every rank holds all of it."""

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1


@dataclass(frozen=True)
class MicroBatch:
    """What the largest micro-batch holds: positions of the decoder, pictures, supervised positions at the head at a
    time."""

    tokens: int
    images: int
    supervised: int


@dataclass(frozen=True)
class Memory:
    """What a process needs of its device, in bytes, by estimate.

    Attributes:
        weights: as forward sees them.
        states: gradients, the optimizer's moments and float32 masters.
        activations: of `tokens` positions, at their peak.
        total: what the device has.
        tokens: positions of the largest micro-batch.
        recomputed: decoder layers that are recomputed.
        layers: decoder layers.
    """

    weights: float
    states: float
    activations: float
    total: float
    tokens: int
    recomputed: int
    layers: int

    def __str__(self) -> str:
        if self.recomputed in (0, self.layers):
            layers = "all layers" if self.recomputed else "none"
        else:
            layers = f"{self.recomputed} of {self.layers} layers"
        fits = self.weights + self.states + self.activations <= _USABLE * self.total
        return (
            f"memory: {_gb(self.weights)} weights, {_gb(self.states)} gradients and optimizer, "
            f"{_gb(self.activations)} activations ({self.tokens:,} tokens a micro-batch) of {_gb(self.total)}; "
            f"recompute: {layers}{'' if fits else '; this may not fit'}"
        )


def resident_bytes(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype], spread: Spread) -> tuple[float, float]:
    """Bytes a process holds whatever the batch: (weights, gradients and optimizer). `dtypes` by name of weight."""
    weights = states = 0.0
    for name, parameter in model.named_parameters():
        weights += parameter.numel() * dtypes[name].itemsize / spread.weights
        if parameter.requires_grad:
            master = 0 if dtypes[name] == torch.float32 else torch.float32.itemsize
            states += parameter.numel() * dtypes[name].itemsize / spread.gradients
            states += parameter.numel() * (_MOMENTS + master) / spread.optimizer
    return weights, states


def plan_memory(
    setting: Setting, kept: Kept, layers: int, batch: MicroBatch, resident: tuple[float, float], total: float
) -> Memory:
    """How many of a decoder's `layers` to recompute (`.recomputed`), and what the run needs then.

    `resident` as of `resident_bytes`, `total` the device's bytes for this process.
    """

    def around(image: float) -> float:
        # The logits are gone when the decoder's backward pass begins; a layer's gradients need about what it kept.
        working = max(batch.supervised * kept.logits, batch.tokens * kept.layer)
        return kept.copies + batch.tokens * kept.rest + batch.images * image + working

    layer, entry = batch.tokens * kept.layer, batch.tokens * kept.entry
    room = _USABLE * total - sum(resident) - around(kept.image)
    count = choose_recompute(setting, layers, layer, entry, room)
    inside = layers_bytes(count, layers, layer, entry)
    image = kept.image_entry if count == layers else kept.image
    return Memory(*resident, inside + around(image), total, batch.tokens, count, layers)


def choose_recompute(setting: Setting, layers: int, layer: float, entry: float, room: float) -> int:
    """How many of `layers` to recompute, so that what they keep fits into `room` bytes; all where nothing does.

    Of a micro-batch a layer keeps `layer` bytes, a recomputed one `entry`.
    """
    if setting in ("none", "full"):
        return layers if setting == "full" else 0
    least = 1 if setting == "selective" else 0
    fitting = (count for count in range(least, layers) if layers_bytes(count, layers, layer, entry) <= room)
    return next(fitting, layers)


def layers_bytes(count: int, layers: int, layer: float, entry: float) -> float:
    """What `layers` keep at the peak with the first `count` recomputed: one is whole while it is computed again."""
    return count * entry + max(layers - count, 1) * layer


def apply_recompute(model: PreTrainedModel, count: int) -> None:
    """Recompute the first `count` decoder layers, and no other; a tower that trains with them where it is all of them.

    Before the model is placed. RecipeError where a decoder's layers cannot be recomputed.
    """
    decoder, seeing = model.model.language_model, _seeing_layers(model)
    whole = count == len(decoder.layers) and any(p.requires_grad for layer in seeing for p in layer.parameters())
    chosen = [(layer, number < count) for number, layer in enumerate(decoder.layers)]
    chosen += [(block, number < count) for number, block in getattr(model.model, "blocks", {}).items()]
    for layer, recomputed in [*chosen, *((layer, whole) for layer in seeing)]:
        if recomputed and not isinstance(layer, GradientCheckpointingLayer):
            raise RecipeError(f"speed.recompute: {type(layer).__name__} cannot be recomputed; set it to none")
        layer.gradient_checkpointing = recomputed
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def _seeing_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the tower; of a class that is not of LLaVA's kind, those that transformers can recompute."""
    tower = getattr(model.model, "vision_tower", None)
    if tower is not None:
        return tower_layers(tower)
    known = [(name, module) for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    return [module for name, module in known if part_of(name) == "vision"]


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
