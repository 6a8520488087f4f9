"""What a model is made of, as the manifest `llava_train.json` says it: no decision is read from a name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava_train.errors import CheckpointError
from llava_train.model.screening import read_config, shown

MANIFEST = "llava_train.json"
FORMAT = "llava_train/model"
VERSION = 1


@dataclass(frozen=True)
class PartSource:
    """Where a part's weights come from: a folder or hub id, and which kind of thing lies there.

    Several paths are towers side by side. `llava` takes the part out of a stock folder of the model's own class.
    `included` says that the model folder itself holds the part's weights (it was trained), so the source is history.
    """

    path: str | list[str]
    revision: str | None = None
    kind: Literal["hf", "gguf", "llava"] = "hf"
    included: bool = False
    fingerprint: str | None = None


@dataclass(frozen=True)
class LoraSpec:
    """LoRA adapters in the weights: rank, alpha, dropout and the linear layers they sit on."""

    r: int
    alpha: int
    dropout: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build the same model again around its weights.

    `architecture` names a row of `llava_train.model.families.table`; `picture_options` are settings of its shape of
    pictures (`llava_train.data.pictures.shaping`).
    """

    vision: PartSource
    llm: PartSource
    connector: str
    connector_options: dict[str, Any]
    image_size: int
    image_tokens: int
    image_aspect_ratio: str
    template: str
    lora: LoraSpec | None = None
    history: tuple[str, ...] = field(default_factory=tuple)
    architecture: str = "llava"
    picture_options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the format's name and version first."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}


def read_spec(folder: Path) -> ModelSpec:
    """The manifest of a model folder of ours; CheckpointError if it is none or of a newer version."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it is no model folder of llava_train")
    values = read_config(folder, MANIFEST)
    try:
        if values.pop("format") != FORMAT or values.pop("version") != VERSION:
            raise CheckpointError(f"{path}: not a {FORMAT} manifest of version {VERSION}")
        values.pop("files", None)
        lora = values.pop("lora")
        spec = ModelSpec(
            vision=PartSource(**values.pop("vision")),
            llm=PartSource(**values.pop("llm")),
            lora=LoraSpec(**{**lora, "targets": tuple(lora["targets"])}) if lora else None,
            history=tuple(values.pop("history")),
            **values,
        )
        _check_types(spec)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: the manifest is damaged: {error}") from error
    return spec


def _check_types(spec: ModelSpec) -> None:
    """TypeError for a value of another type than its field says."""
    values: dict[str, tuple[Any, Any]] = {
        **{
            name: (getattr(spec, name), str) for name in ("connector", "image_aspect_ratio", "template", "architecture")
        },
        **{name: (getattr(spec, name), int) for name in ("image_size", "image_tokens")},
        "connector_options": (spec.connector_options, dict),
        "picture_options": (spec.picture_options, dict),
        "vision.path": (spec.vision.path, str | list),
        "llm.path": (spec.llm.path, str),
    }
    for name, (value, kind) in values.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: {shown(value)}: must be of type {getattr(kind, '__name__', kind)}")
