"""Hidden states of one transformer tower, computing no layer above the highest that is asked for.

Shapes: I images, P positions, V width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def numbers(config: PretrainedConfig, chosen: int | Sequence[int]) -> list[int]:
    """`vision_feature_layer` as numbers of hidden states: 0 is what the first layer reads, n what layer n gives."""
    count = int(config.num_hidden_layers) + 1
    return [layer % count for layer in ([chosen] if isinstance(chosen, int) else chosen)]


def layers_run(layers: Sequence[int]) -> int:
    """How many layers are run for these hidden states: one at least, which shows what it reads."""
    return max(1, *layers)


def layer_list(tower: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the tower's layers, and the name by which it does."""
    count = int(tower.config.num_hidden_layers)
    for owner in tower.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return owner, name
    raise ValueError(f"{type(tower).__name__} holds no list of {count} layers")


def hidden_states(tower: PreTrainedModel, pixels_I3HW: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
    """The hidden states of these numbers, (I, P, V) each, with CLS and registers where the tower has them."""
    found: dict[int, torch.Tensor] = {}
    owner, name = layer_list(tower)
    every = getattr(owner, name)
    with ExitStack() as stack:
        stack.enter_context(_shortened(owner, name, layers_run(layers)))
        for number in {*layers} - {0}:
            keep = partial(_keep, found, number)
            stack.callback(every[number - 1].register_forward_hook(keep).remove)
        if 0 in layers:
            stack.callback(every[0].register_forward_pre_hook(partial(_keep, found, 0)).remove)
        tower(pixels_I3HW)
    return [found[number] for number in layers]


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
