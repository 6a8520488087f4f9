"""What config.json of a folder in the original LLaVA layout says, or its files show; never its name."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llava_train.errors import CheckpointError, RecipeError
from llava_train.model.assemble import Seen
from llava_train.model.screening import own_file, read_config, screen_configs, screen_layers, shown
from llava_train.model.towers.loading import check_features, load_vision_config
from llava_train.model.towers.shapes import vision_shape
from llava_train.recipe import ModelSettings

PROJECTOR = "mm_projector.bin"
NON_LORA = "non_lora_trainables.bin"
ADAPTERS = "adapter_config.json"
TOWER = "model.vision_tower.vision_tower."

_MARKS = ("mm_projector_type", "mm_vision_tower", "mm_hidden_size")
_TEXT_TYPES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
    "llava_qwen3": "qwen3",
    "llava_gemma": "gemma",
    "llava_gemma2": "gemma2",
    "llava_phi3": "phi3",
}
"""`model_type` of the original code -> the decoder's in transformers."""
_TOWERS = ("clip_vision_model", "siglip_vision_model")
_OLD_ROPE = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
_NOT_THE_DECODERS = {"model_type", "architectures", "_name_or_path", "transformers_version", "dtype", "auto_map"}


@dataclass(frozen=True)
class Original:
    """A folder in the original layout.

    Attributes:
        kind: `full` holds the language model; `stage1` a projector; `lora` adapters and what else was trained.
        values: its config.json.
        llm: folder or hub id of the language model that `stage1` and `lora` were trained on; "" for `full`.
        vision: folder or hub id of the tower's configuration and, unless the folder holds them, weights.
        base: of `lora`, the full folder in this layout that `llm` names, where it is one.
    """

    folder: Path
    kind: Literal["full", "stage1", "lora"]
    values: dict[str, Any]
    llm: str
    vision: str
    base: Original | None = None

    @property
    def config(self) -> Path:
        """Where `values` stand, for messages."""
        return self.folder / "config.json"

    @property
    def framed(self) -> bool:
        """Whether every picture stands between `<im_start>` and `<im_end>`."""
        return bool(self.values.get("mm_use_im_start_end"))


def is_original(folder: Path) -> bool:
    """Whether a folder is in the original layout: by what its config.json says and which files it holds."""
    if (folder / PROJECTOR).exists() or ((folder / ADAPTERS).exists() and (folder / NON_LORA).exists()):
        return True
    if not (folder / "config.json").exists():
        return False
    values = read_config(folder, "config.json")
    marked = any(key in values for key in _MARKS) and "text_config" not in values
    return marked and str(values.get("model_type", "")).startswith("llava")


def read_original(folder: Path, llm: str | None, vision: str | None) -> Original:
    """What a folder says of itself. `llm` and `vision` go before what its files name.

    Raises CheckpointError for what the stock classes cannot compute, and for parts that nothing names.
    """
    lora = (folder / ADAPTERS).exists()
    kind: Literal["full", "stage1", "lora"] = "lora" if lora else "stage1" if (folder / PROJECTOR).exists() else "full"
    if kind == "full":
        screen_configs(folder)  # the tokenizer is read from here by a library
    values = read_config(folder, "config.json")
    _require_known(values, folder / "config.json")
    base = read_config(folder, ADAPTERS).get("base_model_name_or_path") if lora else values.get("_name_or_path")
    found = Original(
        folder,
        kind,
        values,
        "" if kind == "full" else _named(llm, base, "model.llm", f"the language model that {folder} was trained on"),
        _named(vision, _tower_of(folder, values), "model.vision", f"the vision encoder of {folder}"),
    )
    if lora and Path(found.llm).is_dir() and is_original(Path(found.llm)):
        base = read_original(Path(found.llm), None, found.vision)
        if base.kind != "full":
            raise CheckpointError(f"{folder}: its base {found.llm} must be whole, not adapters or a projector again")
        return replace(found, base=base)
    if found.framed and kind != "full":
        raise CheckpointError(
            f"{found.config}: mm_use_im_start_end: the rows of <im_start> and <im_end> are those of another model; "
            "start from a full checkpoint, which holds them"
        )
    return found


def _tower_of(folder: Path, values: dict[str, Any]) -> Any:
    """`mm_vision_tower`; an encoder inside the folder, which an export of ours names so, by its whole path."""
    name = values.get("mm_vision_tower")
    if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*", name) and (folder / name).is_dir():
        return str(own_file(folder, f"{name}/config.json").parent)
    return name


def _named(given: str | None, found: Any, key: str, what: str) -> str:
    if given:
        return given
    if isinstance(found, str) and (Path(found).is_dir() or re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", found)):
        return found
    raise CheckpointError(f"{key}: name {what}: its files name {shown(found)!r}, which is no folder here and no hub id")


def _require_known(values: dict[str, Any], place: Path) -> None:
    """CheckpointError for what the original code computes otherwise than transformers' Llava class."""
    kind = values.get("model_type")
    if kind not in _TEXT_TYPES:
        raise CheckpointError(f"{place}: model_type: {shown(kind)!r}: known: {', '.join(_TEXT_TYPES)}")
    for key in ("s2", "mm_resampler_type", "quantization_config", "vision_tower_pretrained"):
        if values.get(key):
            raise CheckpointError(f"{place}: {key}: {shown(values[key])}: transformers' Llava class does not have this")


def text_config(original: Original, tensors: int) -> PretrainedConfig:
    """The decoder's configuration; `tensors` says how many there are of it."""
    values, place = original.values, original.config
    screen_layers(values, tensors, place)
    config_class = CONFIG_MAPPING[_TEXT_TYPES[values["model_type"]]]
    known = (set(config_class().to_dict()) | _OLD_ROPE) - _NOT_THE_DECODERS
    try:
        return config_class.from_dict({key: value for key, value in values.items() if key in known})
    except Exception as error:  # what is wrong with values comes as many types
        raise CheckpointError(f"{place}: describes no {config_class.model_type} model: {error}") from error


def vision_of(original: Original, keys: Iterable[str] = ()) -> tuple[ModelSettings, Seen]:
    """How the tower's features are read, as a recipe would say it, and the tower.

    `keys` are those of the folder's tensors: LLaVA-NeXT saves SigLIP without its last layer and its head.
    """
    config, layer = _tower_config(original), _feature_layer(original)
    shape = vision_shape(config)
    own = [key.partition(TOWER)[2] for key in keys if TOWER in key]
    if own and config.model_type == "siglip_vision_model":
        whole, config = int(config.num_hidden_layers), copy.deepcopy(config)
        config.vision_use_head = any(".head." in f".{key}" for key in own)
        found = {int(number[1]) for key in own if (number := re.search(r"encoder\.layers\.(\d+)\.", key))}
        if len(found) == whole - 1:
            config.num_hidden_layers, layer = len(found), -1
    settings = ModelSettings(
        vision=original.vision,
        llm=original.llm,
        connector=_connector(original),
        vision_feature_layer=layer,
        vision_feature_select_strategy=_strategy(original, shape.leading > 0),
        image_aspect_ratio=_aspect_ratio(original, config),
        image_grid_pinpoints=_pinpoints(original),
    )
    width = original.values.get("mm_hidden_size", shape.hidden_size)
    if width != shape.hidden_size:
        raise CheckpointError(
            f"{original.config}: mm_hidden_size: {shown(width)}, but {original.vision} gives width "
            f"{shape.hidden_size}: this is not the tower it was trained with"
        )
    try:
        check_features(config, layer, settings.vision_feature_select_strategy)
    except RecipeError as error:
        raise CheckpointError(f"{original.config}: {error}") from error
    return settings, Seen(config, shape, layer, settings.vision_feature_select_strategy)


def _tower_config(original: Original) -> PretrainedConfig:
    """The configuration of the tower; CheckpointError that says how to name another place."""
    try:
        config = load_vision_config(original.vision)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (the tower of {original.folder}; model.vision names a local copy)") from error
    if config.model_type not in _TOWERS:
        raise CheckpointError(f"{original.vision}: {config.model_type!r}: the original has {' and '.join(_TOWERS)}")
    return config


def _connector(original: Original) -> str:
    name = original.values.get("mm_projector_type", "linear")
    if not isinstance(name, str) or not re.fullmatch(r"linear|identity|mlp[1-9]\d?x_gelu", name):
        raise CheckpointError(
            f"{original.config}: mm_projector_type: {shown(name)!r}: linear, mlp<N>x_gelu or identity"
        )
    return name


def _feature_layer(original: Original) -> int:
    layer = original.values.get("mm_vision_select_layer")
    if not isinstance(layer, int):
        raise CheckpointError(f"{original.config}: mm_vision_select_layer: {shown(layer)}: must be a layer's number")
    return layer


def _strategy(original: Original, has_cls: bool) -> Literal["default", "full"]:
    """`patch` drops CLS where the tower has one: SigLIP has none, and the original then takes all positions."""
    chosen = original.values.get("mm_vision_select_feature", "patch")
    if chosen not in ("patch", "cls_patch"):
        raise CheckpointError(f"{original.config}: mm_vision_select_feature: {shown(chosen)}: patch or cls_patch")
    return "default" if chosen == "patch" and has_cls else "full"


def _aspect_ratio(original: Original, tower: PretrainedConfig) -> Literal["pad", "square", "crop", "anyres"]:
    """`pad`, `anyres`, or what the tower's own processor does: CLIP's cuts the centre out, SigLIP's stretches."""
    chosen = original.values.get("image_aspect_ratio")
    merge = original.values.get("mm_patch_merge_type", "flat")
    if (chosen, merge) == ("anyres", "spatial_unpad"):
        return "anyres"
    if chosen not in (None, "square", "pad") or merge != "flat":
        raise CheckpointError(
            f"{original.config}: image_aspect_ratio: {shown(chosen)}, mm_patch_merge_type: {shown(merge)}: known are "
            "pad, square and null with flat, and anyres with spatial_unpad; for others take the same model in "
            "transformers' layout (llava-hf/*)"
        )
    if chosen == "pad":
        return "pad"
    return "square" if tower.model_type.startswith("siglip") else "crop"


def _pinpoints(original: Original) -> list[list[int]] | None:
    """Height and width of each size that a picture is fitted into; the original writes width first."""
    if original.values.get("image_aspect_ratio") != "anyres":
        return None
    points = original.values.get("image_grid_pinpoints")
    pairs: list[Any] = points if isinstance(points, list) and points else [None]
    if not all(isinstance(pair, list) and [type(edge) for edge in pair] == [int, int] for pair in pairs):
        raise CheckpointError(f"{original.config}: image_grid_pinpoints: {shown(points)}: must be pairs of pixels")
    return [[height, width] for width, height in pairs]
