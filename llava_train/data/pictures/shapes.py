"""How pictures become pixels, and how many tokens each takes: known before any weight is loaded.

A shape is a row of `SHAPES`, named by the model's `model_type`. Whatever a picture's tokens depend on (its size, how
it is shown) is known when the data are prepared, so that training meets no surprise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image

from llava_train.data.pictures.processors import AspectRatio, pixel_values, with_aspect_ratio
from llava_train.data.sample import ImageRef
from llava_train.errors import RecipeError
from llava_train.registry import Registry

Frame = Literal["no", "one", "last"]
"""Whether a picture is a frame of a video, and the last one."""


class Picture(NamedTuple):
    """A picture as a model reads it.

    `pixels` are its pieces, (pieces, ...): one of 3 x H x W, tiles, or flattened patches. `facts` are what else the
    model must know of it, by the names of the model's own arguments. `tokens` are those it takes in the LLM.
    """

    pixels: torch.Tensor
    facts: dict[str, torch.Tensor] = {}
    tokens: int = 0


@dataclass(frozen=True)
class Shown:
    """How a picture is shown: its size in pixels, whether it is a frame, and the only picture of its conversation."""

    width: int
    height: int
    frame: Frame = "no"
    alone: bool = True


class Shape:
    """What a kind of model makes of a picture."""

    sized = False
    """Whether tokens depend on the picture's size."""
    separable = True
    """Whether each picture is one piece of the same size: what a feature cache can hold."""

    def tokens(self, shown: Shown) -> int:
        """Tokens of a picture in the LLM."""
        raise NotImplementedError

    def picture(self, image: Image.Image, shown: Shown) -> Picture:
        """An RGB picture in this shape."""
        raise NotImplementedError

    def reshaped(self, aspect_ratio: AspectRatio) -> Shape:
        """The same for pictures of a source that brings its own `image_aspect_ratio`. RecipeError if it cannot."""
        raise RecipeError(
            f"image_aspect_ratio: {aspect_ratio!r}: a source of its own way is for models that see one square picture"
        )

    @property
    def inputs(self) -> Any:
        """All that the number of tokens depends on besides the picture, as JSON."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Square(Shape):
    """LLaVA: one square picture, a fixed number of tokens."""

    processor: Any
    image_tokens: int

    def tokens(self, shown: Shown) -> int:
        """The same for all."""
        return self.image_tokens

    def picture(self, image: Image.Image, shown: Shown) -> Picture:
        """(1, 3, H, W)."""
        return Picture(pixel_values([image], self.processor), tokens=self.image_tokens)

    def reshaped(self, aspect_ratio: AspectRatio) -> Shape:
        """The same size, filled in another way."""
        size = int((self.processor.crop_size or self.processor.size)["height"])
        return Square(with_aspect_ratio(self.processor, aspect_ratio, size), self.image_tokens)

    @property
    def inputs(self) -> Any:
        """The number."""
        return self.image_tokens


Build = Callable[[Any, int, dict[str, Any]], Shape]
"""Image processor, tokens of a square picture, further settings -> shape."""
SHAPES: Registry[Build] = Registry("picture shape")


@SHAPES.register("llava_cross_attention")
@SHAPES.register("llava")
def square(processor: Any, image_tokens: int, options: dict[str, Any]) -> Shape:
    """Of LLaVA and of what has its way with pictures."""
    return Square(processor, image_tokens)


def shown_in(images: Sequence[ImageRef], sizes: Sequence[int]) -> list[Shown]:
    """How the pictures of a conversation are shown; `sizes` are width and height in turn."""
    return [
        Shown(sizes[2 * place], sizes[2 * place + 1], _frame(images, place), len(images) == 1)
        for place in range(len(images))
    ]


def _frame(images: Sequence[ImageRef], place: int) -> Frame:
    ref = images[place]
    if ref.kind != "frame":
        return "no"
    return "last" if ref.at == ref.size - 1 else "one"
