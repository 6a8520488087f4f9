"""The tower's features are those of the stock class, without the layers above."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from llava_train.model.towers.features import feature_shape, image_features, layer_inputs, layers_above, tower_layers
from llava_train.model.towers.loading import stock_features
from llava_train.model.towers.stack import TowersConfig
from tests import tiny


def make(families: str | list[str], layer: Any, strategy: str, kind: Any = LlavaForConditionalGeneration) -> Any:
    """A model over fresh towers; over a `Towers` where there are several, or one with registers."""
    names = [families] if isinstance(families, str) else families
    configs = [tiny.TOWERS[name][1](**tiny.TOWERS[name][2]) for name in names]
    vision = configs[0]
    if len(configs) > 1 or getattr(vision, "num_register_tokens", 0):
        layers = [layer] if len(configs) == 1 else layer
        vision = TowersConfig.of(configs, layers, strategy, [([0.5, 0.4, 0.3], [0.2, 0.3, 0.25])] * len(configs))
    text = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    layer, strategy = stock_features(vision, layer, strategy)
    chosen = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
    torch.manual_seed(0)
    config = LlavaNextConfig if kind is LlavaNextForConditionalGeneration else LlavaConfig
    return kind(config(vision_config=vision, text_config=text, **chosen)).eval()


@pytest.mark.parametrize("layer", [-1, -2, 1, 3, [-2, 1], [0, -1]])
@pytest.mark.parametrize(
    ("family", "strategy"),
    [(f, s) for f in tiny.TOWERS for s in ("default", "full") if (f, s) != ("siglip", "default")],  # has no CLS
)
def test_features_are_those_of_the_stock_class(family: str, layer: Any, strategy: str) -> None:
    model = make(family, layer, strategy)
    pixels = torch.randn(2, 3, 28, 28)
    made = image_features(model, pixels)
    stock = torch.stack(model.model.get_image_features(pixels).pooler_output)
    assert torch.equal(model.model.multi_modal_projector(made), stock)
    assert tuple(made.shape[1:]) == feature_shape(model)
    assert made.shape[1] == 4 + (strategy == "full" and family != "siglip")
    assert torch.equal(image_features(model, pixels), made)  # and the tower is whole again


def test_other_classes_of_llava_have_the_same_features() -> None:
    model = make("clip", [-2, 1], "default", LlavaNextForConditionalGeneration)
    tower, pixels = model.model.vision_tower, torch.randn(2, 3, 28, 28)
    states = tower(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(image_features(model, pixels), torch.cat([states[-2][:, 1:], states[1][:, 1:]], dim=-1))
    assert feature_shape(model) == (4, 64)


@pytest.mark.parametrize(
    ("family", "layer", "computed"),
    [("clip", -2, 2), ("clip", -1, 3), ("clip", 1, 1), ("clip", [1, -2], 2), ("dinov3", -2, 2), ("dinov3", [1], 1)],
)
def test_layers_above_are_not_computed(family: str, layer: Any, computed: int) -> None:
    model = make(family, layer, "default")
    layers = tower_layers(model.model.vision_tower)
    ran: list[int] = []
    for number, each in enumerate(layers):
        each.register_forward_hook(lambda *_, number=number: ran.append(number))
    features = image_features(model, torch.zeros(1, 3, 28, 28))
    assert ran == list(range(computed))
    assert layers_above(model) == layers[computed:]
    assert layer_inputs(model, features) == 4 * 32 * computed


def test_a_frozen_tower_leaves_no_graph_and_a_trained_one_does() -> None:
    for family in ("clip", "dinov3"):
        model: PreTrainedModel = make(family, -2, "default")
        pixels = torch.zeros(1, 3, 28, 28)
        assert image_features(model, pixels).requires_grad
        model.model.vision_tower.requires_grad_(False)
        assert not image_features(model, pixels).requires_grad


def test_an_error_in_the_tower_leaves_it_whole(tmp_path: Path) -> None:
    model = make("clip", -3, "default")
    with pytest.raises(Exception, match="channels"):
        image_features(model, torch.zeros(1, 5, 28, 28))
    assert len(tower_layers(model.model.vision_tower)) == 3
