from pathlib import Path

import pytest
import torch
from torch import nn

from llava_train import load_recipe
from llava_train.errors import RecipeError
from llava_train.model.connectors import CONNECTORS, connector_class, connector_tokens
from llava_train.training.setup import build
from tests import tiny

QFORMER = "{num_queries: 3, num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2}"
NAMES = {
    "linear": ["linear"],
    "mlp": ["mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"],
    "identity": ["identity"],
    "qformer": ["qformer"],
}
EVERY = [name for row in CONNECTORS for name in NAMES[row]]


def assembly_with(folder: Path, name: str):
    options = [f"model.connector_options={QFORMER}"] if name == "qformer" else []
    return build(load_recipe(tiny.make_recipe(folder), [f"model.connector={name}", *options]))


@pytest.mark.parametrize("name", EVERY)
def test_tokens_are_known_before_and_every_weight_gets_a_gradient(workplace: Path, name: str) -> None:
    assembly = assembly_with(workplace, name)
    connector = assembly.model.model.multi_modal_projector
    (features,) = assembly.model.get_image_features(torch.rand(1, 3, 28, 28)).pooler_output
    assert features.shape == (assembly.spec.image_tokens, 32)
    assert assembly.spec.image_tokens == connector_tokens(name, 4, assembly.spec.connector_options)
    features.square().sum().backward()
    without = [key for key, parameter in connector.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(float(p.grad.abs().sum()) > 0 for p in connector.parameters() if p.ndim > 1)


@pytest.mark.parametrize("name", EVERY)
def test_a_seed_gives_the_same_weights(workplace: Path, name: str) -> None:
    first, second = (assembly_with(workplace, name).model.model.multi_modal_projector.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_mlp_depths(workplace: Path) -> None:
    for depth in (1, 2, 3):
        module = assembly_with(workplace, f"mlp{depth}x_gelu").model.model.multi_modal_projector
        assert sum(isinstance(m, nn.Linear) for m in module.modules()) == depth


def test_names_and_options_are_checked(workplace: Path) -> None:
    for name in ("mlp", "mlp0x_gelu", "mlp2x_relu", "Linear"):
        with pytest.raises(RecipeError):
            connector_class(name)
    with pytest.raises(RecipeError, match="unknown option queries; it takes num_queries"):
        build(
            load_recipe(
                tiny.make_recipe(workplace), ["model.connector=qformer", "model.connector_options={queries: 3}"]
            )
        )
    with pytest.raises(RecipeError, match="it takes none"):
        build(load_recipe(tiny.make_recipe(workplace), ["model.connector_options={depth: 3}"]))
    with pytest.raises(RecipeError, match="the encoder gives width 64, the LLM takes 32"):
        build(
            load_recipe(
                tiny.make_recipe(workplace), ["model.connector=identity", "model.vision_feature_layer=[-2, -1]"]
            )
        )


def test_a_qformer_in_bf16_inference_and_under_autocast(workplace: Path) -> None:
    model = assembly_with(workplace, "qformer").model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.get_image_features(torch.rand(1, 3, 28, 28)).pooler_output[0]
    assert features.dtype == torch.float32
    model.to(torch.bfloat16)
    assert model.get_image_features(torch.rand(1, 3, 28, 28).bfloat16()).pooler_output[0].dtype == torch.bfloat16
