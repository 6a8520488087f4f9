"""Pictures from the web: what is called .jpg becomes a JPEG, what is no picture is said to be none."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from data_prep.common.transfer import FetchError, full_disk

BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
QUALITY = 95


def as_jpeg(source: Path, target: Path) -> None:
    """Move a downloaded picture to `target`, a .jpg: a JPEG as it is, anything else converted (first frame).

    FetchError: "not_an_image", "damaged_image", or "placeholder": one pixel, which shops send for a picture
    that they no longer have. The source is removed in every case.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        picture = _decoded(source)
        if picture is None:
            source.replace(target)
            return
        part = target.with_name(f".{target.name}.part")
        with full_disk(part):
            picture.save(part, "JPEG", quality=QUALITY)
        part.replace(target)
    finally:
        if source != target:
            source.unlink(missing_ok=True)


def is_jpeg(path: Path) -> bool:
    """Whether the file begins as a JPEG does; pictures called .jpg that are GIFs are common."""
    with path.open("rb") as stream:
        return stream.read(2) == b"\xff\xd8"


def _decoded(source: Path) -> Image.Image | None:
    """The first frame as RGB on white; None if the file is a whole JPEG already."""
    try:
        opened = Image.open(source)
    except BROKEN as error:
        raise FetchError(f"{source}: not a picture", "not_an_image") from error
    with opened as picture:
        try:
            picture.load()
        except BROKEN as error:
            raise FetchError(f"{source}: a damaged picture: {error}", "damaged_image") from error
        if max(picture.size) <= 1:
            raise FetchError(f"{source}: one pixel, in the place of a picture", "placeholder")
        if picture.format in ("JPEG", "MPO"):
            return None
        rgba = ImageOps.exif_transpose(picture).convert("RGBA")
        ground = Image.new("RGBA", rgba.size, "white")
        ground.alpha_composite(rgba)
        return ground.convert("RGB")
