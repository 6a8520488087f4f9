"""Pictures in their own proportions, as flattened patches: Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923).

A picture is brought to the nearest size of whole patches within the image processor's limits; `merge_size` x
`merge_size` neighbouring patches become one token. Frames of a video are single pictures here, each with marks of its
own: they do not share tokens two by two as in the stock class's videos.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from llava_train.data.pictures.shapes import SHAPES, Picture, Shape, Shown
from llava_train.errors import RecordError


@dataclass(frozen=True, eq=False)
class Patches(Shape):
    """As many tokens as the picture has patches of the LLM.

    Attributes:
        processor: transformers' image processor of the model.
    """

    processor: Any

    sized = True
    separable = False

    def tokens(self, shown: Shown) -> int:
        """By the picture's size. RecordError for a strip beyond 200:1, which the model was not made for."""
        try:
            patches = self.processor.get_number_of_image_patches(shown.height, shown.width)
        except ValueError as error:
            raise RecordError(f"{shown.width} x {shown.height} pixels: {error}", "image_strip") from error
        return int(patches) // self.processor.merge_size**2

    def picture(self, image: Image.Image, shown: Shown) -> Picture:
        """(patches, channels x frames x height x width of one) with `image_grid_thw`: frames, rows, columns of them."""
        made = self.processor(images=[image], return_tensors="pt")
        return Picture(made["pixel_values"], {"image_grid_thw": made["image_grid_thw"][0]}, self.tokens(shown))

    @property
    def inputs(self) -> Any:
        """Limits and sizes."""
        size, processor = self.processor.size, self.processor
        limits = [int(size["shortest_edge"]), int(size["longest_edge"])]
        return ["Patches", *limits, processor.patch_size, processor.merge_size]


@SHAPES.register("qwen2_5_vl")
@SHAPES.register("qwen2_vl")
def patches(processor: Any, image_tokens: int, options: dict[str, Any]) -> Shape:
    """No options."""
    return Patches(processor)
