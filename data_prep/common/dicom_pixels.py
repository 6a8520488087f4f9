"""The frames of a DICOM file as 8-bit RGB pictures.

Greyscale: rescale slope and intercept (or the modality LUT), then the window (the one asked for, or the file's
first, or the range between two percentiles if it has none; a VOI LUT is not applied), then MONOCHROME1 turned
light on dark. Colour: YBR and palettes become RGB, deeper samples lose their low bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

Window = tuple[float, float]
PERCENTILES = (0.5, 99.5)
LARGEST = 1 << 28  # pixels of a frame; a header can claim any number
# Enhanced multi-frame files keep these for each frame, or once for all frames, in a sequence.
GROUPS = {
    "WindowCenter": "FrameVOILUTSequence",
    "WindowWidth": "FrameVOILUTSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
}


def frame_numbers(total: int, wanted: int | None) -> list[int]:
    """`wanted` frames of `total`, evenly spread; all of them for None."""
    if wanted is None or wanted >= total:
        return list(range(total))
    return [(2 * index + 1) * total // (2 * wanted) for index in range(wanted)]


def frames(dataset: Any, wanted: int | None, window: Window | None) -> Iterator[tuple[int, Image.Image]]:
    """(number, picture) of the chosen frames, one in memory at a time; any exception if it cannot be decoded."""
    from pydicom.pixels import iter_pixels

    if dataset.Rows * dataset.Columns > LARGEST:
        raise MemoryError
    numbers = frame_numbers(int(dataset.get("NumberOfFrames") or 1), wanted)
    for number, pixels in zip(numbers, iter_pixels(dataset, indices=numbers)):
        yield number, Image.fromarray(to_rgb(pixels, dataset, number, window))


def to_rgb(pixels: Any, dataset: Any, number: int, window: Window | None) -> Any:
    """One decoded frame as a uint8 array (H, W, 3)."""
    from pydicom.pixels import apply_color_lut

    kind = str(dataset.PhotometricInterpretation)
    if kind.startswith("MONOCHROME"):
        grey = to_grey(pixels, dataset, number, window)
        return np.repeat((255 - grey if kind == "MONOCHROME1" else grey)[..., None], 3, axis=-1)
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        return _eight_bits(pixels, 8 * pixels.dtype.itemsize)
    return _eight_bits(pixels, int(dataset.BitsStored))


def to_grey(pixels: Any, dataset: Any, number: int, window: Window | None) -> Any:
    """A greyscale frame through rescale and window, uint8 (H, W)."""
    from pydicom.pixels import apply_modality_lut

    if dataset.get("ModalityLUTSequence"):
        values = apply_modality_lut(pixels, dataset).astype(np.float64)
    else:
        slope, intercept = _number(dataset, "RescaleSlope", number), _number(dataset, "RescaleIntercept", number)
        values = pixels * (1.0 if slope is None else slope) + (intercept or 0.0)
    centre, width = _number(dataset, "WindowCenter", number), _number(dataset, "WindowWidth", number)
    if window is None and centre is not None and width is not None and width > 0:
        shape = str(dataset.get("VOILUTFunction") or "LINEAR")
        return windowed(values, (centre, width), shape)
    return windowed(values, window or _percentile_window(pixels, values, dataset), "LINEAR")


def windowed(values: Any, window: Window, shape: str) -> Any:
    """Values -> 0..255 as the standard's part 3, C.11.2.1.2 and C.11.2.1.3, says."""
    centre, width = window
    if shape == "SIGMOID":
        part = 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -500, 500)))
    elif shape == "LINEAR_EXACT":
        part = (values - centre) / width + 0.5
    else:
        part = (values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5
    return np.clip(part * 255 + 0.5, 0, 255).astype(np.uint8)


def _percentile_window(pixels: Any, values: Any, dataset: Any) -> Window:
    padding = dataset.get("PixelPaddingValue")
    used = values if padding is None else values[pixels != padding]
    low, high = np.percentile(used if used.size else values, PERCENTILES)
    return (low + high) / 2 + 0.5, high - low + 1  # the inverse of LINEAR: low -> 0, high -> 255


def _number(dataset: Any, keyword: str, frame: int) -> float | None:
    """The first value of an element, from the file, from its frame's groups or from the shared groups."""
    holders = [dataset]
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for group in [*per_frame[frame : frame + 1], *(dataset.get("SharedFunctionalGroupsSequence") or [])]:
        holders += group.get(GROUPS[keyword]) or []
    for holder in holders:
        value = holder.get(keyword)
        if value is not None and value != "":
            return float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value)
    return None


def _eight_bits(pixels: Any, bits: int) -> Any:
    return (pixels >> (bits - 8) if bits > 8 else pixels).astype(np.uint8)
