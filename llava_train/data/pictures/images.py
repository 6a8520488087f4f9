"""Pictures: bytes -> RGB safely.

Whatever is wrong with a picture is a RecordError with a cause: image_missing, image_empty, image_unreadable,
image_format, image_too_large, image_strip, or image_path (hostile: what the path names is no file).
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image

from llava_train.errors import DataError, RecordError
from llava_train.files import inside, regular_file

Bytes = bytes | memoryview | Path
"""Where a picture comes from: memory, or a local file."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""File formats that may be opened; everything else (EPS, PSD, ...) stays out of reach of the parsers."""
MAX_PIXELS = 50_000_000
MAX_ASPECT = 200
LEVELS = ("none", "exists", "header", "decode")
"""How far `check_image` looks, in order of cost."""

_SUFFIXES = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".mpo": "JPEG", ".png": "PNG", ".apng": "PNG",
    ".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP", ".dib": "BMP", ".tif": "TIFF", ".tiff": "TIFF",
}  # fmt: skip
_OTHERS = {
    b"%!PS": "EPS", b"%PDF": "PDF", b"8BPS": "PSD", b"\0\0\1\0": "ICO", b"\0\0\0\x0cjP": "JPEG 2000", b"DDS ": "DDS",
    b"\xff\x4f\xff\x51": "JPEG 2000", b"P4": "PBM", b"P5": "PGM", b"P6": "PPM", b"BLP": "BLP", b"qoif": "QOI",
    b"icns": "ICNS", b"SIMPLE": "FITS", b"\x1a\x45\xdf\xa3": "Matroska video", b"<svg": "SVG",
}  # fmt: skip
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what shows the picture upright (Pillow's ImageOps.exif_transpose)."""


@dataclass(frozen=True)
class Header:
    """What is known of a picture before it is used.

    Attributes:
        width, height: pixels as the picture will be seen: swapped if the EXIF orientation turns it.
        notes: what is worth counting, none of it an error.
            wrong_extension   the content decides; the name's suffix says another format
            animated          more than one frame; the first one is used
            exif_orientation  the file asks to be turned and the setting says no
            broken_exif       the EXIF data cannot be read, and the setting does not need them
    """

    width: int
    height: int
    notes: tuple[str, ...] = ()


def open_image(root: Path, relative: str, exif_orientation: bool = False) -> Image.Image:
    """`decode_image` of the file `relative` below `root`."""
    path = inside(root, relative)
    return decode_image(path, str(path), exif_orientation)


def decode_image(source: Bytes, name: str, exif_orientation: bool = False) -> Image.Image:
    """The picture as RGB.

    The first frame of an animation. Colours as Pillow's `convert("RGB")`, which is what the original LLaVA
    calls: transparency is dropped, not blended; I (32 bits) and F are cut off at 0 and 255. Only grey of 16
    bits differs: its 8 high bits are kept, as Pillow does for RGB of 16 bits, where `convert` cuts off at 255.
    `exif_orientation` turns the picture as its camera said; the original does not. (Pillow turns TIFF always.)

    Raises RecordError that calls it `name`, with a cause from the head of this file.
    """
    with _opened(source, name) as (image, _):
        picture = _rgb(image)
        turn = _TURNS.get(_orientation(image)) if exif_orientation else None
        return picture if turn is None else picture.transpose(turn)


def check_image(source: Bytes, name: str, level: str, exif_orientation: bool = False) -> Header | None:
    """Look at a picture as far as `level` says; the same errors as `decode_image` for what that level can show.

    none    nothing
    exists  a file must be there, be regular and not empty
    header  format, size and notes, without the pixels
    decode  all of it, so that `decode_image` will succeed

    Returns None for the first two.
    """
    if level in ("header", "decode"):
        with _opened(source, name) as (image, stream):
            return _header(image, stream, name, level == "decode", exif_orientation)
    if level == "exists":
        _size_in_bytes(source, name)
    elif level != "none":
        raise DataError(f"unknown level {level!r}; choose from {', '.join(LEVELS)}")
    return None


def check_size(width: int, height: int, name: str) -> None:
    """Raise RecordError for more than 50 megapixels ("image_too_large") or a strip beyond 200:1 ("image_strip")."""
    if width * height > MAX_PIXELS:
        reason = f"{width} x {height} pixels, more than the {MAX_PIXELS:,} allowed"
        raise RecordError(f"{name}: {reason}", "image_too_large")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RecordError(f"{name}: {width} x {height} pixels, a strip beyond {MAX_ASPECT}:1", "image_strip")


def _size_in_bytes(source: Bytes, name: str) -> int:
    if isinstance(source, Path):
        return regular_file(source, name)
    if not len(source):
        raise RecordError(f"{name}: empty (0 bytes)", "image_empty")
    return len(source)


@contextmanager
def _opened(source: Bytes, name: str) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """The picture with its header read and its size allowed; what fails here or in the body is a RecordError."""
    _size_in_bytes(source, name)
    try:
        with _stream(source) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's: large pictures, odd EXIF, ...; what matters is an error here
            with _open(stream, name) as image:
                check_size(*image.size, name)
                yield image, stream
    except RecordError:
        raise
    except Image.DecompressionBombError as error:
        reason = f"more than the {MAX_PIXELS:,} pixels allowed ({error})"
        raise RecordError(f"{name}: {reason}", "image_too_large") from error
    except Exception as error:  # Pillow's parsers raise many types (ValueError, SyntaxError, struct.error, ...)
        reason = f"not a readable image ({type(error).__name__}: {error})"
        raise RecordError(f"{name}: {reason}", "image_unreadable") from error


def _stream(source: Bytes) -> BinaryIO:
    # Never a path for Pillow: it would map the file into memory, and a file that shrinks then kills the process.
    return source.open("rb") if isinstance(source, Path) else io.BytesIO(source)


def _open(stream: BinaryIO, name: str) -> Image.Image:
    try:
        return Image.open(stream, formats=FORMATS)
    except Image.UnidentifiedImageError:
        stream.seek(0)
        head = stream.read(64)
        if found := _other_format(head):
            allowed = f"only {', '.join(FORMATS)} are read"
            raise RecordError(f"{name}: {found} data; {allowed}", "image_format") from None
        start = "it starts with " + repr(head[:24])  # HTML, a pointer of a version control, ...: best seen
        raise RecordError(f"{name}: not a readable image ({start})", "image_unreadable") from None


def _other_format(head: bytes) -> str | None:
    """A known format that may not be opened, told by its first bytes."""
    if head[4:8] == b"ftyp":
        return {b"avif": "AVIF", b"avis": "AVIF"}.get(head[8:12], "HEIF or MP4")
    return next((found for magic, found in _OTHERS.items() if head.startswith(magic)), None)


def _header(image: Image.Image, stream: BinaryIO, name: str, decode: bool, exif_orientation: bool) -> Header:
    notes = []
    if _SUFFIXES.get(PurePath(name).suffix.lower(), _format(image)) != _format(image):
        notes.append("wrong_extension")
    if decode:
        _rgb(image)
    if _is_animated(image):
        notes.append("animated")
    orientation = 1
    try:
        orientation = _orientation(image) if decode else _orientation_in_header(image, stream, exif_orientation)
    except Exception:
        if exif_orientation:
            raise
        notes.append("broken_exif")
    if orientation in _TURNS and not exif_orientation:
        notes.append("exif_orientation")
    swap = exif_orientation and orientation in (5, 6, 7, 8)
    width, height = reversed(image.size) if swap else image.size
    return Header(width, height, tuple(notes))


def _format(image: Image.Image) -> str:
    return {"MPO": "JPEG", "DIB": "BMP"}.get(image.format or "", image.format or "")


def _rgb(image: Image.Image) -> Image.Image:
    """A decoded RGB copy of the first frame."""
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")  # the latter: Pillow 10
    if not deep:
        return image.convert("RGB")
    bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (16,))[0]  # a TIFF may have 12
    return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8)).convert("RGB")


def _is_animated(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # a second frame that is broken, which nobody needs
        return True


def _orientation(image: Image.Image) -> Any:
    """The EXIF orientation that is left to do, 1 for none; raises whatever Pillow does where the EXIF is broken."""
    if image.format == "TIFF":  # turned by Pillow itself, its size too
        return 1
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _orientation_in_header(image: Image.Image, stream: BinaryIO, look_behind: bool) -> Any:
    """The same without the pixels, unless `look_behind` and a PNG has something behind them."""
    if image.format != "PNG" or "exif" in image.info or (look_behind and _text_behind_pixels(stream)):
        return _orientation(image)
    # PNG's own getexif() would decode the picture to see what is behind the pixels.
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)


def _text_behind_pixels(stream: BinaryIO) -> bool:
    """Whether a PNG has chunks that may hold an orientation behind its pixels, which come only with the pixels."""
    place = stream.tell()
    stream.seek(8)
    pixels = found = False
    while not found and len(head := stream.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        pixels = pixels or kind == b"IDAT"
        found = pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
        stream.seek(size + 4, io.SEEK_CUR)
    stream.seek(place)
    return found
