"""Pictures of Llama 3.2-Vision: tiles of the canvas that fits best, one token in the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from llava_train.data.pictures.shapes import SHAPES, Picture, Shape, Shown


@dataclass(frozen=True, eq=False)
class Canvas(Shape):
    """Every picture in as many tiles as its canvas has.

    Attributes:
        processor: transformers' image processor of the model.
    """

    processor: Any

    separable = False

    def tokens(self, shown: Shown) -> int:
        """One: the decoder looks at pictures beside the text."""
        return 1

    def picture(self, image: Image.Image, shown: Shown) -> Picture:
        """(tiles, 3, H, W), with `tiles` and the `aspect_ratio_ids` of the canvas."""
        made = self.processor(images=[[image]], return_tensors="pt")
        tiles = int(made["num_tiles"][0][0])
        facts = {"tiles": torch.tensor(tiles), "aspect_ratio_ids": made["aspect_ratio_ids"][0, 0]}
        return Picture(made["pixel_values"][0, 0, :tiles].clone(), facts, self.tokens(shown))

    @property
    def inputs(self) -> Any:
        """Nothing but the number."""
        return 1


@SHAPES.register("mllama")
def canvas(processor: Any, image_tokens: int, options: dict[str, Any]) -> Shape:
    """No options."""
    return Canvas(processor)
