"""Pictures of any resolution as tiles (anyres): the whole one in small, then its tiles, each of the tower's size.

LLaVA-NeXT (`anyres`, arXiv 2407.07895) and LLaVA-OneVision (`anyres_max_N`, arXiv 2408.03326) as transformers computes
them: what is padding in the best grid is cut away again from the features, a learned newline ends each row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from llava_train.data.pictures.shapes import SHAPES, Picture, Shape, Shown

_ENLARGED = 1.1
"""Beyond this many times the side of `anyres_max_N` features are pooled (LLaVA-OneVision's `llava_arch.py`)."""


@dataclass(frozen=True, eq=False)
class Tiles(Shape):
    """LLaVA-NeXT: every picture in tiles.

    Attributes:
        processor: transformers' image processor of the model.
        side: positions a side of a tile's features.
    """

    processor: Any
    side: int

    sized = True
    separable = False

    @property
    def tile(self) -> int:
        """Pixels a side of a tile."""
        size = self.processor.size
        return int(size["height"] if size.get("height") else size["shortest_edge"])

    def tokens(self, shown: Shown) -> int:
        """The whole picture's, its tiles' without padding, a newline a row."""
        rows, columns = self.unpadded(shown)
        return self.side**2 + rows * (columns + 1)

    def unpadded(self, shown: Shown) -> tuple[int, int]:
        """Rows and columns of the tiles' features, padding cut away (`unpad_image` of transformers)."""
        best = select_best_resolution([shown.height, shown.width], self.processor.image_grid_pinpoints)
        rows, columns = (self.side * (edge // self.tile) for edge in best)
        if shown.width / shown.height > columns / rows:
            kept = int(round(shown.height * (columns / shown.width), 7))
            return rows - 2 * ((rows - kept) // 2), columns
        kept = int(round(shown.width * (rows / shown.height), 7))
        return rows, columns - 2 * ((columns - kept) // 2)

    def picture(self, image: Image.Image, shown: Shown) -> Picture:
        """(tiles, 3, H, W), the whole picture first, with `image_sizes` (height, width)."""
        return self._picture(self._tiled(image), shown)

    def _tiled(self, image: Image.Image) -> torch.Tensor:
        return self.processor(images=[image], return_tensors="pt")["pixel_values"][0]

    def _picture(self, tiles: torch.Tensor, shown: Shown) -> Picture:
        facts = {
            "image_sizes": [shown.height, shown.width],
            "tiles": len(tiles),
            "pooled": ("no", "one", "last").index(shown.frame),
        }
        return Picture(tiles, {name: torch.tensor(value) for name, value in facts.items()}, self.tokens(shown))

    @property
    def inputs(self) -> Any:
        """Grids, tile and positions."""
        return [type(self).__name__, self.processor.image_grid_pinpoints, self.tile, self.side]


@dataclass(frozen=True, eq=False)
class PooledTiles(Tiles):
    """LLaVA-OneVision: one picture in at most so many tiles' worth of tokens, several as they are, frames pooled.

    Attributes:
        most: tiles whose features are kept as they are; more are pooled to as many.
        one_tile: pictures no larger than a tile stay one. transformers tiles them, too.
    """

    most: int = 9
    one_tile: bool = False

    def tokens(self, shown: Shown) -> int:
        """By how it is shown; the last frame of a video ends with a newline."""
        if shown.frame != "no":
            return math.ceil(self.side / 2) ** 2 + (shown.frame == "last")
        if self._whole(shown):
            return self.side**2 + 1
        return super().tokens(shown)

    def unpadded(self, shown: Shown) -> tuple[int, int]:
        """Rows and columns after pooling."""
        rows, columns = super().unpadded(shown)
        ratio = math.sqrt(rows * columns / (self.most * self.side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > _ENLARGED else (rows, columns)

    def _whole(self, shown: Shown) -> bool:
        return not shown.alone or (self.one_tile and max(shown.width, shown.height) <= self.tile)

    def picture(self, image: Image.Image, shown: Shown) -> Picture:
        """(tiles, 3, H, W) with `image_sizes`; `pooled` is 1 for a frame, 2 for the last one of a video."""
        if shown.frame != "no":  # the video processor stretches frames
            frame = image.resize((self.tile, self.tile), Image.Resampling(self.processor.resample))
            return self._picture(self._in_company(frame), shown)
        return self._picture(self._in_company(image) if self._whole(shown) else self._tiled(image), shown)

    def _in_company(self, image: Image.Image) -> torch.Tensor:
        """(1, 3, H, W): beside another one the processor leaves a picture whole."""
        made = self.processor(images=[[image, Image.new("RGB", (self.tile, self.tile))]], return_tensors="pt")
        return made["pixel_values"][0][:1]

    @property
    def inputs(self) -> Any:
        """The same and the numbers of this class."""
        return [*super().inputs, self.most, self.one_tile]


@SHAPES.register("llava_next")
def tiles(processor: Any, image_tokens: int, options: dict[str, Any]) -> Shape:
    """No options."""
    return Tiles(processor, math.isqrt(image_tokens))


@SHAPES.register("llava_onevision")
def pooled_tiles(processor: Any, image_tokens: int, options: dict[str, Any]) -> Shape:
    """`most` and `one_tile` of `PooledTiles`."""
    return PooledTiles(processor, math.isqrt(image_tokens), **options)
