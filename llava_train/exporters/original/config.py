"""config.json of the original layout, as `LlavaConfig` of the original and its training script write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from llava_train.exporters.original.layout import KINDS, hub_name, is_shortened, projector_type
from llava_train.model.assemble import Assembly
from llava_train.model.towers.shapes import vision_shape

_LONGEST = 10**9
"""Above it `model_max_length` means that a tokenizer knows of no limit."""
_NOT_OURS = ("model_type", "architectures", "_name_or_path", "transformers_version", "dtype", "auto_map")


def original_config(assembly: Assembly, tower: str, rows: int, dtype: torch.dtype, **changes: Any) -> dict[str, Any]:
    """The values of config.json.

    Args:
        assembly: the model.
        tower: `mm_vision_tower`.
        rows: of the vocabulary that is written, or that the base has.
        dtype: of the weights.
        changes: values that are others than those of a whole model.
    """
    config = assembly.model.config
    kind, class_name = KINDS[config.text_config.model_type]
    vocabulary = assembly.tokenizer.get_vocab()
    longest = int(assembly.tokenizer.model_max_length)
    tiles = assembly.spec.architecture == "llava_next"
    own = {
        "architectures": [class_name],
        "model_type": kind,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": rows,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": {"crop": "square"}.get(
            assembly.spec.image_aspect_ratio, assembly.spec.image_aspect_ratio
        ),
        "image_grid_pinpoints": [[width, height] for height, width in config.image_grid_pinpoints] if tiles else None,
        "mm_hidden_size": vision_shape(config.vision_config).hidden_size,
        "mm_patch_merge_type": "spatial_unpad" if tiles else "flat",
        "mm_projector_lr": None,
        "mm_projector_type": projector_type(assembly.model.model.multi_modal_projector),
        "mm_use_im_patch_token": "<im_patch>" in vocabulary,
        "mm_use_im_start_end": is_framed(assembly),
        "mm_vision_select_feature": _feature(config),
        "mm_vision_select_layer": _layer(assembly),
        "mm_vision_tower": tower,
        "tokenizer_model_max_length": longest if longest < _LONGEST else None,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False,
        "use_mm_proj": True,
    }
    return {**text_values(config.text_config), **own, **changes}


def is_framed(assembly: Assembly) -> bool:
    """Whether every picture stands between `<im_start>` and `<im_end>`."""
    return "<im_start><image><im_end>" in assembly.template


def named_source(path: str) -> str:
    """A part as config.json names it: its hub id, or the whole path of its folder here."""
    return hub_name(path) if hub_name(path) and not Path(path).exists() else str(Path(path).absolute())  # type: ignore[return-value]


def text_values(config: PretrainedConfig) -> dict[str, Any]:
    """A decoder's configuration with rotary positions in the words of transformers before 5, which the original has."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    values = {key: value for key, value in values.items() if key not in _NOT_OURS}
    rope = dict(values.pop("rope_parameters", None) or {})
    values |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "dynamic"):  # the original's transformers wants these two keys and no other
        rope = {"type": kind, "factor": rope["factor"]}
    return {**values, "rope_scaling": None if kind == "default" else rope}


def _feature(config: PretrainedConfig) -> str:
    """`patch` drops CLS where a tower has one; SigLIP has none."""
    keeps_cls = config.vision_feature_select_strategy == "full" and vision_shape(config.vision_config).leading > 0
    return "cls_patch" if keeps_cls else "patch"


def _layer(assembly: Assembly) -> int:
    """LLaVA-NeXT takes off SigLIP's last layer and reads what is then the last one."""
    config = assembly.model.config
    if is_shortened(assembly) or config.vision_config.model_type == "siglip_vision_model":
        return -2
    return int(config.vision_feature_layer)
