"""Pixels -> the tower's features, computing no layer above the one that is asked for.

Shapes: I images, P positions, V vision width times feature layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from llava_train.model.assemble import widths
from llava_train.model.encoders import vision_shape


def image_features(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the connector reads, (I, P, V): the same as in the stock class's `get_image_features`."""
    config, tower = model.config, model.model.vision_tower
    chosen = config.vision_feature_layer
    layers = feature_layers(tower, chosen)
    frozen = not any(parameter.requires_grad for parameter in tower.parameters())
    with torch.no_grad() if frozen else ExitStack():
        states = _hidden_states(tower, pixel_values, layers)
    if config.vision_feature_select_strategy == "default":
        states = [state[:, 1:] for state in states]
    return torch.cat(states, dim=-1)


def feature_shape(model: LlavaForConditionalGeneration) -> tuple[int, int]:
    """Positions and width of what the connector reads of a picture of the tower's own size, (P, V)."""
    config = model.config
    positions = vision_shape(config.vision_config).tokens(config.vision_feature_select_strategy)
    return positions, widths(config).vision


def feature_layers(tower: PreTrainedModel, chosen: int | list[int]) -> list[int]:
    """`vision_feature_layer` as numbers of hidden states: 0 is what the first layer reads, n what layer n gives."""
    count = int(tower.config.num_hidden_layers) + 1
    return [layer % count for layer in (chosen if isinstance(chosen, list) else [chosen])]


def _hidden_states(tower: PreTrainedModel, pixel_values: torch.Tensor, layers: list[int]) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    owner, name = layer_list(tower)
    every = getattr(owner, name)
    with ExitStack() as stack:
        stack.enter_context(_shortened(owner, name, _run(layers)))
        for number in {*layers} - {0}:
            keep = partial(_keep, found, number)
            stack.callback(every[number - 1].register_forward_hook(keep).remove)
        if 0 in layers:
            stack.callback(every[0].register_forward_pre_hook(partial(_keep, found, 0)).remove)
        tower(pixel_values)
    return [found[number] for number in layers]


def layers_above(model: LlavaForConditionalGeneration) -> list[nn.Module]:
    """The tower's layers that `image_features` does not run."""
    tower = model.model.vision_tower
    run = _run(feature_layers(tower, model.config.vision_feature_layer))
    return list(getattr(*layer_list(tower)))[run:]


def _run(layers: list[int]) -> int:
    """How many of the tower's layers are run for these hidden states: one at least, which shows what it reads."""
    return max(1, *layers)


def layer_list(tower: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the tower's layers, and the name by which it does."""
    count = int(tower.config.num_hidden_layers)
    for owner in tower.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return owner, name
    raise ValueError(f"{type(tower).__name__} holds no list of {count} layers")


@contextmanager
def _shortened(owner: nn.Module, name: str, count: int) -> Iterator[None]:
    """The first `count` layers alone, for one forward pass."""
    every: Any = getattr(owner, name)
    setattr(owner, name, every[:count])
    try:
        yield
    finally:
        setattr(owner, name, every)


def _keep(found: dict[int, torch.Tensor], number: int, layer: nn.Module, inputs: Any, made: Any = None) -> None:
    """A hook: a layer's output, or the input of the first."""
    state = inputs if made is None else made
    found[number] = state[0] if isinstance(state, tuple) else state
