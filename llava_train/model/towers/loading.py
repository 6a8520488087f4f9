"""Vision encoders: loading one tower, or several as one, from folders, hub ids or open_clip's models.

LLaVA's class reads `hidden_states[vision_feature_layer]` of the tower and, with strategy `default`, drops the
first position (CLS). Where that would not do, the tower is a `Towers`: see there, and `stock_features`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging

from llava_train.errors import CheckpointError, RecipeError
from llava_train.model.screening import screen_configs, screen_weights
from llava_train.model.towers.open_clip import resolve
from llava_train.model.towers.shapes import KINDS, VisionShape, vision_shape
from llava_train.model.towers.stack import Towers, TowersConfig
from llava_train.model.towers.trunk import OpenClipTrunkConfig

__all__ = [
    "VisionShape",
    "check_features",
    "key_report",
    "load_vision_config",
    "load_vision_tower",
    "reload_vision_tower",
    "stock_features",
    "vision_shape",
    "vision_sources",
]

Paths: TypeAlias = "str | Sequence[str]"
Layers: TypeAlias = "int | Sequence[int]"


def vision_sources(path: Paths, revision: str | None = None) -> list[tuple[str, str | None]]:
    """(folder or hub id, revision) of each tower; open_clip's are converted into a folder first.

    The first one's image processor is the model's. A revision is for a single hub id (RecipeError).
    """
    paths = [path] if isinstance(path, str) else list(path)
    if not paths:
        raise RecipeError("model.vision: an empty list; name a vision encoder")
    if revision and len(paths) > 1:
        raise RecipeError("model.vision_revision: is for one encoder; download these to folders and name the folders")
    return [(resolve(each), revision) for each in paths]


def load_vision_config(
    path: Paths, revision: str | None = None, feature_layer: Layers = -2, strategy: str = "default"
) -> PretrainedConfig:
    """The tower's configuration; the vision half where the folder holds a two-tower model (CLIP, SigLIP).

    A TowersConfig for several towers and for one with registers; `feature_layer` (for several: one for all, or one a
    tower) and `strategy` go into it and matter to no other.

    Raises CheckpointError for a folder that is no vision encoder, and RecipeError for a layer it does not have.
    """
    sources = vision_sources(path, revision)
    configs = [_read_config(*source) for source in sources]
    if len(configs) == 1 and _is_plain(configs[0]):
        return configs[0]
    if len(configs) == 1:
        chosen: list[Layers] = [feature_layer]
        colours = [([0.0] * 3, [1.0] * 3)]
    else:
        chosen = [feature_layer] * len(configs) if isinstance(feature_layer, int) else list(feature_layer)
        if len(chosen) != len(configs):
            raise RecipeError(
                f"model.vision_feature_layer: {len(chosen)} layers for {len(configs)} encoders; give one an encoder, "
                "or one for all"
            )
        colours = [_colours(*source) for source in sources]
    for config, each in zip(configs, chosen):
        _check_layers(config, each)
    return TowersConfig.of(configs, chosen, strategy, colours)


def stock_features(config: PretrainedConfig, feature_layer: Layers, strategy: str) -> tuple[Any, Any]:
    """`vision_feature_layer` and `vision_feature_select_strategy` that a LLaVA configuration needs for this tower."""
    return (-1, "full") if isinstance(config, TowersConfig) else (feature_layer, strategy)


def check_features(config: PretrainedConfig, feature_layer: Layers, strategy: str) -> None:
    """RecipeError for a feature layer the tower does not have, or a CLS to drop where there is none."""
    if isinstance(config, TowersConfig):  # checked when it was made; CLS goes where one is
        return
    _check_layers(config, feature_layer)
    if strategy == "default" and not vision_shape(config).leading:
        raise RecipeError(
            "model.vision_feature_select_strategy: 'default' drops the CLS position, which this encoder does not "
            "have: a patch would be lost; set it to 'full'"
        )


def load_vision_tower(
    path: Paths, revision: str | None = None, feature_layer: Layers = -2, strategy: str = "default"
) -> PreTrainedModel:
    """The tower in its stored precision; every weight must be found (CheckpointError lists what is not).

    A `Towers` where `load_vision_config` gives its configuration.
    """
    return reload_vision_tower(load_vision_config(path, revision, feature_layer, strategy), path, revision)


def reload_vision_tower(config: PretrainedConfig, path: Paths, revision: str | None = None) -> PreTrainedModel:
    """The tower of a model whose configuration says `config`, from where its weights came."""
    sources = vision_sources(path, revision)
    if not isinstance(config, TowersConfig):
        return _load(_read_config(*sources[0]), *sources[0])
    configs = config.configs()
    if len(configs) != len(sources):
        raise CheckpointError(f"{path}: {len(sources)} vision encoders, but the model has {len(configs)}")
    loaded = [_load(each, *source) for each, source in zip(configs, sources)]
    if len({tower.dtype for tower in loaded}) > 1:
        loaded = [tower.float() for tower in loaded]
    with torch.device("meta"):
        towers = Towers(config)
    for name, tower in zip(towers.towers, loaded):
        towers.towers[name] = tower
    return towers.eval()


def _is_plain(config: PretrainedConfig) -> bool:
    return not isinstance(config, OpenClipTrunkConfig) and not vision_shape(config).registers


def _read_config(path: str, revision: str | None) -> PretrainedConfig:
    screen_configs(path)
    try:
        # Said in so many words: left open, the library asks at the terminal whether to run a folder's code.
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # what is wrong with a folder comes as many types
        raise CheckpointError(f"{path}: no vision encoder can be read from here: {error}") from error
    config = getattr(config, "vision_config", config)
    if config.model_type not in KINDS and not isinstance(config, OpenClipTrunkConfig):
        naflex = "; of SigLIP2, take one with a fixed resolution" if config.model_type.startswith("siglip2") else ""
        raise CheckpointError(
            f"{path}: model type {config.model_type!r} is not a vision encoder we know; known: {', '.join(KINDS)}"
            f"{naflex}"
        )
    return config


def _check_layers(config: PretrainedConfig, chosen: Layers) -> None:
    layers = int(config.num_hidden_layers)
    for layer in [chosen] if isinstance(chosen, int) else chosen:
        if not -(layers + 1) <= layer <= layers:
            raise RecipeError(f"model.vision_feature_layer: {layer}: this encoder has hidden states 0 to {layers}")


def _colours(path: str, revision: str | None) -> tuple[list[float], list[float]]:
    """Mean and deviation by which an encoder's pixels are normalised, of colours from 0 to 1."""
    try:
        own = AutoImageProcessor.from_pretrained(
            path, backend="pil", revision=revision or "main", trust_remote_code=False
        )
        if not own.do_normalize:
            return [0.0] * 3, [1.0] * 3
        scale = 255 * float(own.rescale_factor if own.do_rescale else 1)
        return [float(mean) / scale for mean in own.image_mean], [float(std) / scale for std in own.image_std]
    except Exception as error:  # what is wrong with a folder comes as many types
        raise CheckpointError(f"{path}: no usable preprocessor_config.json: {error}") from error


def _load(config: PretrainedConfig, path: str, revision: str | None) -> PreTrainedModel:
    screen_weights(path)
    model_class: Any = AutoModel._model_mapping[type(config)]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the text half and of layers that are not wanted
    try:
        tower, info = model_class.from_pretrained(
            path, config=config, revision=revision, dtype="auto", use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # what is wrong with weights comes as many types
        raise CheckpointError(f"{path}: the vision encoder cannot be loaded: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    # A two-tower checkpoint brings its text half along; only what the tower lacks is a fault.
    missing = [key for key in info["missing_keys"] if "position_ids" not in key]
    if config.model_type == "vit":
        missing = _without_pooler(tower, missing)
    if missing or info["mismatched_keys"]:
        raise CheckpointError(f"{path}: weights of the vision encoder do not fit: {key_report(missing, info)}")
    return tower


def _without_pooler(tower: PreTrainedModel, missing: list[str]) -> list[str]:
    """What a ViT lacks besides its pooler, which classifiers are stored without and no feature comes from: zeros."""
    pooler = [key for key in missing if key.startswith("pooler.")]
    for key in pooler:
        torch.nn.init.zeros_(tower.get_parameter(key))
    return [key for key in missing if key not in pooler]


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
