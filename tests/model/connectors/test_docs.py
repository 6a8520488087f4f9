"""docs/connectors.md: names, options, tokens and costs are those of the code."""

import re

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llava_train.model.connectors import CONNECTORS, connector_class, connector_tokens
from llava_train.model.costs import costs_of
from scripts.compare_connectors import DEFAULT
from tests.conftest import REPOSITORY
from tests.model.measured import tuned

GUIDE = (REPOSITORY / "docs" / "connectors.md").read_text(encoding="utf-8")
WORDS = {"none": None, "half of the grid's": None, "the features' width": None, "4 x hidden": None, "false": False}


def table(first: str) -> list[list[str]]:
    """Cells of the rows of the table whose header begins so."""
    lines = GUIDE.split(f"| {first} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split(" | ")] for line in lines]


ROWS = {row[0].strip("`"): row for row in table("name")}


def test_every_row_is_listed_with_its_options() -> None:
    assert {"mlp" if name == "mlp2x_gelu" else name for name in ROWS} == set(CONNECTORS)
    for name, row in ROWS.items():
        listed = dict(re.findall(r"`(\w+)`: ([^,]+)", row[1]))
        defaults = {key: WORDS[text] if text in WORDS else int(text) for key, text in listed.items()}
        assert defaults == {key: option.default for key, option in connector_class(name).options.items()}, name
        paper = re.findall(r"\d{4}\.\d{5}", row[5])
        assert name == "identity" or set(paper) <= set(re.findall(r"\d{4}\.\d{5}", connector_class(name).__doc__))


@pytest.mark.parametrize("name", [name for name in ROWS if name != "identity"])
def test_tokens_and_costs_are_those_of_the_7b_model(name: str) -> None:
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=128, hidden_size=4096, intermediate_size=64, num_hidden_layers=1, num_attention_heads=32
    )
    with torch.device("meta"):
        model = tuned(text, vision, {"connector": "full"}, name, vision_feature_layer=-1)
    size = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
    flops = costs_of(model).connector.forward
    assert ROWS[name][2:5] == [str(connector_tokens(name, 576, {})), f"{size / 1e6:.1f}M", f"{flops / 1e9:.1f}"]


def test_precision_and_the_demo_are_said_of_each() -> None:
    said = [name for row in table("connector") for name in re.findall(r"`([\w<>]+)`", row[0])]
    assert {name.replace("<N>x_gelu", "") for name in said} == set(CONNECTORS)
    measured = [
        re.sub(r"`(\w+)`.*", r"\1", row[0]).replace("cross-attention", "cross_attention") for row in table("row")
    ]
    assert measured == DEFAULT
