"""Vision encoders: loading a tower from a folder or hub id, and how many tokens it gives.

LLaVA's class reads `hidden_states[vision_feature_layer]` of the tower and, with strategy `default`, drops the
first position (CLS).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from llava_train.errors import CheckpointError
from llava_train.model.screening import screen_configs, screen_weights

_LEADING_TOKENS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "vit": 1,
}
"""Tower's model_type -> positions before the patches (CLS), registers not counted.

SigLIP2 of fixed resolution is a `siglip_vision_model`; its NaFlex form takes flattened patches, which LLaVA's class
does not give.
"""


@dataclass(frozen=True)
class VisionShape:
    """What a tower gives for one image of `image_size` pixels a side."""

    image_size: int
    patch_size: int
    leading: int
    hidden_size: int

    @property
    def patches(self) -> int:
        """Patch positions."""
        return (self.image_size // self.patch_size) ** 2

    def tokens(self, strategy: str) -> int:
        """Positions that reach the connector under a `vision_feature_select_strategy`."""
        if strategy == "default":
            return self.patches + self.leading - 1
        return self.patches + self.leading


def load_vision_config(path: str, revision: str | None = None) -> PretrainedConfig:
    """The tower's configuration; the vision half where the folder holds a two-tower model (CLIP, SigLIP).

    Raises CheckpointError for a folder that is no vision encoder.
    """
    screen_configs(path)
    try:
        # Said in so many words: left open, the library asks at the terminal whether to run a folder's code.
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # what is wrong with a folder comes as many types
        raise CheckpointError(f"{path}: no vision encoder can be read from here: {error}") from error
    config = getattr(config, "vision_config", config)
    if config.model_type not in _LEADING_TOKENS:
        raise CheckpointError(
            f"{path}: model type {config.model_type!r} is not a vision encoder we know; "
            f"known: {', '.join(_LEADING_TOKENS)}"
        )
    return config


def vision_shape(config: PretrainedConfig, image_size: int | None = None) -> VisionShape:
    """Shape of a tower's output; `image_size` overrides the tower's own (it must interpolate positions)."""
    size = image_size or int(config.image_size)
    patch = int(config.patch_size)
    if size % patch:
        raise CheckpointError(f"image size {size} is not a multiple of the patch size {patch}")
    if size != config.image_size and not config.model_type.startswith("dinov2"):
        raise CheckpointError(
            f"image size {size}: a {config.model_type} tower was made for {config.image_size} pixels; "
            "only DINOv2 interpolates its positions"
        )
    leading = _LEADING_TOKENS[config.model_type] + int(getattr(config, "num_register_tokens", 0))
    return VisionShape(size, patch, leading, int(config.hidden_size))


def load_vision_tower(path: str, revision: str | None = None) -> PreTrainedModel:
    """The tower in its stored precision; every weight must be found (CheckpointError lists what is not)."""
    config = load_vision_config(path, revision)
    screen_weights(path)
    model_class = _class_of(config)
    try:
        tower, info = model_class.from_pretrained(
            path, config=config, revision=revision, dtype="auto", use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # what is wrong with weights comes as many types
        raise CheckpointError(f"{path}: the vision encoder cannot be loaded: {error}") from error
    # A two-tower checkpoint brings its text half along; only what the tower lacks is a fault.
    missing = [key for key in info["missing_keys"] if "position_ids" not in key]
    if missing or info["mismatched_keys"]:
        raise CheckpointError(f"{path}: weights of the vision encoder do not fit: {key_report(missing, info)}")
    return tower


def _class_of(config: PretrainedConfig) -> Any:
    return AutoModel._model_mapping[type(config)]


def key_report(missing: list[str], info: Any) -> str:
    """Missing, unexpected and mismatched keys as one line, the first ten of each."""
    rows = {
        "missing": sorted(missing),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(str(key) for key in info["mismatched_keys"]),
    }
    return "; ".join(
        f"{len(keys)} {kind}: {', '.join(keys[:10])}{' ...' if len(keys) > 10 else ''}"
        for kind, keys in rows.items()
        if keys
    )
