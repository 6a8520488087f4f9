"""The Q-Former of a BLIP-2 folder: transformers' Blip2ForConditionalGeneration layout, safetensors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import Blip2QFormerConfig, Blip2VisionConfig

from llava_train.errors import CheckpointError
from llava_train.model.screening import read_config, screen_configs, screen_weights, shown
from llava_train.model.towers.loading import key_report

SIZES = (
    "num_queries",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "cross_attention_frequency",
)
"""Options of the connector that a folder brings."""
_FIXED = ("hidden_act", "layer_norm_eps", "use_qformer_text_input")
"""Keys of its configuration that must be as transformers has them by default."""
_PARTS = ("qformer.", "query_tokens", "language_projection.")
_MOST_INDEX_BYTES = 64_000_000


def read_sizes(folder: Path) -> tuple[dict[str, int], int]:
    """(Sizes of the Q-Former by the connector's options, width of the features that it reads).

    Reads the configuration alone. Raises CheckpointError for a folder that is not BLIP-2's.
    """
    screen_configs(folder)
    values = read_config(folder, "config.json")
    place = folder / "config.json"
    if values.get("model_type") != "blip-2":
        raise CheckpointError(f"{place}: model_type {shown(values.get('model_type'))}: init_from takes a BLIP-2 folder")
    defaults = Blip2QFormerConfig()
    found = _section(values, "qformer_config", place)
    for name in _FIXED:
        if found.get(name, getattr(defaults, name)) != getattr(defaults, name):
            raise CheckpointError(f"{place}: qformer_config.{name}: {shown(found[name])}: such a Q-Former is not known")
    sizes = {name: found.get(name, getattr(defaults, name)) for name in SIZES if name != "num_queries"}
    sizes["num_queries"] = values.get("num_query_tokens", 32)
    # Blip2Config takes the width from the vision half, whatever the Q-Former's own says.
    vision = _section(values, "vision_config", place).get("hidden_size", Blip2VisionConfig().hidden_size)
    for name, value in (*sizes.items(), ("vision_config.hidden_size", vision)):
        if type(value) is not int or not 0 < value < 2**20:
            raise CheckpointError(f"{place}: {name}: {shown(value)}: is no size")
    return sizes, vision


def _section(values: dict[str, Any], name: str, place: Path) -> dict[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise CheckpointError(f"{place}: {name}: must be an object of keys")
    return section


def take_weights(connector: nn.Module, folder: Path, reset_cross_attention: bool) -> tuple[str, ...]:
    """Copy a folder's Q-Former into a connector of its sizes. Returns the names of weights that stay as they are.

    Those are the projection to the LLM, where its width is another, and with `reset_cross_attention` the projections
    of features that do not fit. Raises CheckpointError for any other key that is missing, unknown or of another shape.
    """
    screen_weights(folder)
    stored, own = _stored(folder), connector.state_dict()
    fresh = {name for name in own if _unfit(name, own, stored, reset_cross_attention)}
    wanted = {name: tensor for name, tensor in own.items() if name not in fresh}
    missing = [_theirs(name) for name in wanted if _theirs(name) not in stored]
    report = {
        "unexpected_keys": stored.keys() - {_theirs(name) for name in own},
        "mismatched_keys": [
            f"{_theirs(name)} {tuple(stored[_theirs(name)].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if _theirs(name) in stored and stored[_theirs(name)].shape != tensor.shape
        ],
    }
    if missing or any(report.values()):
        raise CheckpointError(f"{folder}: its Q-Former does not fit: {key_report(missing, report)}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[_theirs(name)])
    return tuple(sorted(fresh))


def _theirs(name: str) -> str:
    """BLIP-2's name of a weight of the connector."""
    if name == "queries":
        return "query_tokens"
    return name.replace("projection.", "language_projection.", 1) if name.startswith("projection.") else name


def _unfit(name: str, own: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], reset: bool) -> bool:
    """Whether a weight belongs to a layer whose widths may be others here, and are."""
    layer = name.rpartition(".")[0]
    free = layer == "projection" or (
        reset and layer.endswith(("crossattention.attention.key", "crossattention.attention.value"))
    )
    weight = f"{layer}.weight"
    return free and _theirs(weight) in stored and stored[_theirs(weight)].shape != own[weight].shape


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the Q-Former in a folder's safetensors files, which were screened."""
    names = ["model.safetensors"]
    if not (folder / names[0]).exists():
        index = "model.safetensors.index.json"
        names = sorted(set(read_config(folder, index, _MOST_INDEX_BYTES)["weight_map"].values()))
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        with safe_open(str(folder / name), framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys() if key.startswith(_PARTS)}  # noqa: SIM118
    return tensors
