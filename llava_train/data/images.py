"""Pictures: bytes -> RGB safely, and RGB -> pixel values by transformers' own image processors.

The PIL back end of the processors is chosen by name: what a processor computes must not depend on whether
torchvision happens to be installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageOps

from llava_train.errors import DataError
from llava_train.files import inside

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""File formats that may be opened; everything else (EPS, PSD, ...) stays out of reach of the parsers."""
MAX_PIXELS = 50_000_000
AspectRatio = Literal["pad", "square", "crop"]


def open_image(root: Path, relative: str, exif_orientation: bool = False) -> Image.Image:
    """The picture as RGB.

    An animation gives its first frame; transparency and palettes are converted as Pillow's `convert("RGB")`
    does, which is what the original did. `exif_orientation` turns the picture as its camera said (the
    original does not).

    Raises DataError naming the file: missing, outside `root`, no image, or above 50 megapixels.
    """
    with _opened(root, relative) as image:
        turned = ImageOps.exif_transpose(image) if exif_orientation else image
        return turned.convert("RGB")


def check_image(root: Path, relative: str) -> None:
    """Read the header only; raises the same errors as `open_image` for what a header can show."""
    with _opened(root, relative):
        pass


@contextmanager
def _opened(root: Path, relative: str) -> Iterator[Image.Image]:
    """The file with its header read; what fails here or in the body is a DataError naming it."""
    path = inside(root, relative)
    if not path.is_file():
        raise DataError(f"{path}: no such image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                _check_size(path, image)
                yield image
    except DataError:
        raise
    except Exception as error:  # Pillow's parsers raise many types (ValueError, SyntaxError, struct.error, ...)
        raise DataError(f"{path}: not a readable image ({type(error).__name__}: {error})") from error


def _check_size(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{path}: {width} x {height} pixels, more than the {MAX_PIXELS:,} allowed")


def build_image_processor(folder: str, aspect_ratio: AspectRatio, size: int, revision: str | None = None) -> Any:
    """A transformers image processor that gives (3, size, size) pixels as the tower expects them.

    Colours and resampling are the tower's own (its `preprocessor_config.json`); the shape is ours:
    `pad` squares the picture with the mean colour first (LLaVA-1.5's `image_aspect_ratio pad`), `square`
    stretches it, `crop` resizes the shorter side and cuts the centre out (CLIP's way).
    """
    from transformers import AutoImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    try:
        own = AutoImageProcessor.from_pretrained(folder, backend="pil", revision=revision or "main")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no usable preprocessor_config.json: {error}") from error
    colours = {
        "image_mean": list(own.image_mean),
        "image_std": list(own.image_std),
        "resample": int(own.resample),
        "do_normalize": bool(own.do_normalize),
        "rescale_factor": own.rescale_factor,
    }
    box = {"height": size, "width": size}
    if aspect_ratio == "pad":
        return LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": size}, crop_size=box, **colours)
    if aspect_ratio == "square":
        return CLIPImageProcessorPil(do_center_crop=False, size=box, crop_size=box, **colours)
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=box, **colours)


def pixel_values(images: list[Image.Image], processor: Any) -> torch.Tensor:
    """Pixels of RGB pictures, (images, 3, height, width) in float32."""
    return processor(images=images, return_tensors="pt")["pixel_values"]
