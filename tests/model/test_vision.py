"""The tower's features are those of the stock class, without the layers above."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dinov2WithRegistersConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_train.model.vision import feature_shape, image_features, layer_list
from tests import tiny


def make(family: str, layer: int | list[int], strategy: str) -> LlavaForConditionalGeneration:
    _, config_class, sizes, _ = tiny.TOWERS[family]
    text = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config_class(**sizes),
            text_config=text,
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
        )
    ).eval()


@pytest.mark.parametrize("layer", [-1, -2, 1, 3, [-2, 1], [0, -1]])
@pytest.mark.parametrize("family", tiny.TOWERS)
def test_features_are_those_of_the_stock_class(family: str, layer: Any) -> None:
    strategy = "full" if family == "siglip" else "default"
    model = make(family, layer, strategy)
    pixels = torch.randn(2, 3, 28, 28)
    made = image_features(model, pixels)
    stock = torch.stack(model.model.get_image_features(pixels).pooler_output)
    assert torch.equal(model.model.multi_modal_projector(made), stock)
    assert tuple(made.shape[1:]) == feature_shape(model)
    assert torch.equal(image_features(model, pixels), made)  # and the tower is whole again


@pytest.mark.parametrize(("layer", "computed"), [(-2, 2), (-1, 3), (1, 1), ([1, -2], 2)])
def test_layers_above_are_not_computed(layer: Any, computed: int) -> None:
    model = make("clip", layer, "default")
    owner, name = layer_list(model.model.vision_tower)
    ran: list[int] = []
    for number, each in enumerate(getattr(owner, name)):
        each.register_forward_hook(lambda *_, number=number: ran.append(number))
    image_features(model, torch.zeros(1, 3, 28, 28))
    assert ran == list(range(computed))


def test_a_frozen_tower_leaves_no_graph_and_a_trained_one_does() -> None:
    model = make("clip", -2, "default")
    pixels = torch.zeros(1, 3, 28, 28)
    assert image_features(model, pixels).requires_grad
    model.model.vision_tower.requires_grad_(False)
    assert not image_features(model, pixels).requires_grad


def test_an_error_in_the_tower_leaves_it_whole(tmp_path: Path) -> None:
    model = make("clip", -3, "default")
    with pytest.raises(Exception, match="channels"):
        image_features(model, torch.zeros(1, 5, 28, 28))
    owner, name = layer_list(model.model.vision_tower)
    assert len(getattr(owner, name)) == 3


def test_registers_are_positions_too() -> None:
    """The stock class drops CLS alone, so that registers reach the connector and take places in the text."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = LlavaConfig(vision_config=Dinov2WithRegistersConfig(**sizes, num_register_tokens=3), text_config=text)
    model = LlavaForConditionalGeneration(config)
    assert feature_shape(model) == tuple(image_features(model, torch.zeros(1, 3, 28, 28)).shape[1:]) == (7, 32)
