"""Pixels -> the tower's features, computing no layer above the one that is asked for.

It reads the `vision_config`, `vision_feature_layer` and `vision_feature_select_strategy` of a model's configuration,
and its `model.vision_tower`: the LLaVA classes of transformers all have them.

Shapes: I images, P positions, V vision width times feature layers.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn
from transformers import PreTrainedModel

from llava_train.model.towers.hidden import hidden_states, layer_list, layers_run, numbers
from llava_train.model.towers.shapes import vision_shape
from llava_train.model.towers.stack import Towers


def image_features(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the connector reads, (I, P, V): the same as in the stock class's `get_image_features`."""
    config, tower = model.config, model.model.vision_tower
    frozen = not any(parameter.requires_grad for parameter in tower.parameters())
    with torch.no_grad() if frozen else ExitStack():
        if isinstance(tower, Towers):
            return tower(pixel_values).last_hidden_state
        states = hidden_states(tower, pixel_values, numbers(tower.config, config.vision_feature_layer))
    if config.vision_feature_select_strategy == "default":
        states = [state[:, 1:] for state in states]
    return torch.cat(states, dim=-1)


def feature_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Positions and width of what the connector reads of a picture of the tower's own size, (P, V)."""
    config, chosen = model.config, model.config.vision_feature_layer
    shape = vision_shape(config.vision_config)
    count = 1 if isinstance(chosen, int) else len(chosen)
    return shape.tokens(config.vision_feature_select_strategy), shape.hidden_size * count


def tower_layers(tower: PreTrainedModel) -> list[nn.Module]:
    """The transformer layers of a tower, or of all its towers."""
    return tower.layers() if isinstance(tower, Towers) else list(getattr(*layer_list(tower)))


def layers_above(model: PreTrainedModel) -> list[nn.Module]:
    """The tower's layers that `image_features` does not run."""
    tower = model.model.vision_tower
    if isinstance(tower, Towers):
        return []
    return tower_layers(tower)[layers_run(numbers(tower.config, model.config.vision_feature_layer)) :]


def layer_inputs(model: PreTrainedModel, features_IPV: torch.Tensor) -> float:
    """Elements that the layers which are run read, to give these features; CLS left out where it is dropped."""
    tower, chosen = model.model.vision_tower, model.config.vision_feature_layer
    positions = features_IPV.shape[:-1].numel()
    if not isinstance(tower, Towers):
        return float(positions * tower.config.hidden_size * layers_run(numbers(tower.config, chosen)))
    pairs = zip(tower.config.shapes(), tower.config.layers)
    return float(positions * sum(shape.hidden_size * layers_run(layers) for shape, layers in pairs))
