"""RGB pictures -> pixel values, by transformers' own image processors.

Their PIL back end is chosen by name: what a processor computes must not depend on whether torchvision happens to be
installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image

from llava_train.errors import DataError, RecipeError

AspectRatio = Literal["pad", "square", "crop"]
"""Of models that see one square picture"""
NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Rows and columns of tiles that LLaVA-NeXT chooses from: transformers' `image_grid_pinpoints` over a tile's size"""
ONEVISION_GRIDS = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7))
"""The same of LLaVA-OneVision."""


def pinpoints(grids: tuple[tuple[int, int], ...], tile: int) -> list[list[int]]:
    """`image_grid_pinpoints`, height and width in pixels, for tiles of `tile` pixels a side."""
    return [[rows * tile, columns * tile] for rows, columns in grids]


def build_image_processor(
    folder: str,
    aspect_ratio: str,
    size: int,
    revision: str | None = None,
    grid_pinpoints: Sequence[Sequence[int]] | None = None,
) -> Any:
    """The tower's own image processor (its `preprocessor_config.json`), in our shape.

    See `with_aspect_ratio`; `anyres` and `anyres_max_N` are LLaVA-NeXT's and LLaVA-OneVision's tiles of `size` pixels,
    in the best of `grid_pinpoints` (their own grids unless given). Raises DataError or RecipeError.
    """
    from transformers import AutoImageProcessor

    try:
        own = AutoImageProcessor.from_pretrained(
            folder, backend="pil", revision=revision or "main", trust_remote_code=False
        )
    except Exception as error:  # what is wrong with a folder comes as many types
        raise DataError(f"{folder}: no usable preprocessor_config.json: {error}") from error
    if aspect_ratio.startswith("anyres"):
        return tile_processor(own, aspect_ratio, size, grid_pinpoints)
    return with_aspect_ratio(own, aspect_ratio, size)  # type: ignore[arg-type]


def with_aspect_ratio(processor: Any, aspect_ratio: AspectRatio, size: int) -> Any:
    """An image processor that gives (3, size, size) pixels with the colours and resampling of `processor`.

    `pad` squares the picture with the mean colour first (LLaVA-1.5's `image_aspect_ratio pad`), `square`
    stretches it, `crop` resizes the shorter side and cuts the centre out (CLIP's way).
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    colours, box = _colours(processor), {"height": size, "width": size}
    if aspect_ratio == "pad":
        return LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": size}, crop_size=box, **colours)
    if aspect_ratio == "square":
        return CLIPImageProcessorPil(do_center_crop=False, size=box, crop_size=box, **colours)
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=box, **colours)


def tile_processor(
    processor: Any, aspect_ratio: str, size: int, grid_pinpoints: Sequence[Sequence[int]] | None = None
) -> Any:
    """An image processor that gives tiles of `size` pixels with the colours and resampling of `processor`.

    Raises RecipeError for grids that are not of whole tiles.
    """
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    next_way = aspect_ratio == "anyres"
    points = [list(point) for point in grid_pinpoints or pinpoints(NEXT_GRIDS if next_way else ONEVISION_GRIDS, size)]
    if any(edge % size for point in points for edge in point):
        raise RecipeError(f"model.image_grid_pinpoints: heights and widths must be multiples of a tile, {size} pixels")
    box = {"height": size, "width": size}
    if next_way:
        return LlavaNextImageProcessorPil(
            size={"shortest_edge": size}, crop_size=box, image_grid_pinpoints=points, **_colours(processor)
        )
    return LlavaOnevisionImageProcessorPil(size=box, image_grid_pinpoints=points, **_colours(processor))


def _colours(processor: Any) -> dict[str, Any]:
    return {
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
        "resample": int(processor.resample),
        "do_normalize": bool(processor.do_normalize),
        "rescale_factor": processor.rescale_factor,
    }


def pixel_values(images: list[Image.Image], processor: Any) -> torch.Tensor:
    """Pixels of RGB pictures, (images, 3, height, width) in float32."""
    return processor(images=[_squared(image, processor) for image in images], return_tensors="pt")["pixel_values"]


def _squared(image: Image.Image, processor: Any) -> Image.Image:
    """The picture, padded as the processor would, bit for bit; Pillow does it without the processor's slow copies."""
    if image.width == image.height or not (hasattr(processor, "pad_to_square") and processor.do_pad):
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in processor.image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
