"""Tiny options for every row of the registry, and a connector without a model around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaConfig

from llava_train import load_recipe
from llava_train.model.connectors import CONNECTORS, Widths, build_connector
from llava_train.training.setup import build
from tests import tiny

QFORMER = {"num_queries": 3, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
TINY: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "linear": [("linear", {})],
    "mlp": [("mlp1x_gelu", {}), ("mlp2x_gelu", {}), ("mlp3x_gelu", {})],
    "identity": [("identity", {})],
    "pixel_shuffle": [("pixel_shuffle", {"r": 2})],
    "avg_pool": [("avg_pool", {"r": 2})],
    "adaptive_pool": [("adaptive_pool", {"side": 1})],
    "resampler": [("resampler", {"num_latents": 3, "depth": 2, "heads": 2, "hidden_size": 24})],
    "c_abstractor": [("c_abstractor", {"depth": 2, "hidden_size": 24})],
    "qformer": [("qformer", QFORMER), ("qformer", {**QFORMER, "instruction": True})],
}
"""Row -> (name, options) that suit a grid of 2 x 2 and tests/tiny.py's widths of 32. A new row needs one."""
CASES = [case for row in CONNECTORS for case in TINY[row]]
every_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n}{'-instruction' * o.get('instruction', False)}" for n, o in CASES]
)


def llava_config(positions: int = 4, vision: int = 32, llm: int = 32) -> LlavaConfig:
    """A LLaVA configuration for a CLIP tower of `positions` patches."""
    side = round(positions**0.5)
    _, clip, sizes, _ = tiny.TOWERS["clip"]
    _, llama, text = tiny.LLMS["llama"]
    return LlavaConfig(
        vision_config=clip(**{**sizes, "hidden_size": vision, "image_size": 14 * side}),
        text_config=llama(**{**text, "hidden_size": llm, "vocab_size": 128}),
    )


def fresh(name: str, options: dict[str, Any], positions: int = 4, vision: int = 32, llm: int = 32) -> Any:
    """A connector with random weights, by itself."""
    torch.manual_seed(0)
    return build_connector(name, Widths(vision, llm), llava_config(positions, vision, llm), options)


def inputs(connector: Any, positions: int = 4, images: int = 2, width: int = 32) -> tuple[torch.Tensor, ...]:
    """Features, and text where the connector reads it."""
    made = torch.Generator().manual_seed(1)
    features = torch.randn(images, positions, width, generator=made)
    if not getattr(connector, "reads_text", False):
        return (features,)
    return features, torch.randint(128, (images, 5), generator=made), torch.ones(images, 5, dtype=torch.long)


def assembly_with(folder: Path, name: str, options: dict[str, Any], *overrides: str) -> Any:
    """The tiny model with this connector."""
    chosen = [f"model.connector={name}", f"model.connector_options={json.dumps(options)}"]
    return build(load_recipe(tiny.make_recipe(folder), [*chosen, *overrides]))
