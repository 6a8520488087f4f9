"""The shapes of pictures in one table, which importing this fills."""

from __future__ import annotations

from typing import Any

from llava_train.data.pictures import mllama, patches, tiles  # noqa: F401  (registers its shapes)
from llava_train.data.pictures.shapes import SHAPES, Shape


def build_shape(architecture: str, processor: Any, image_tokens: int, options: dict[str, Any] | None = None) -> Shape:
    """The shape of pictures for a kind of model (`model_type`).

    Args:
        architecture: a name in `SHAPES`.
        processor: transformers' image processor of the model.
        image_tokens: tokens of a square picture, or of a tile.
        options: settings of the shape.
    """
    return SHAPES[architecture](processor, image_tokens, options or {})
