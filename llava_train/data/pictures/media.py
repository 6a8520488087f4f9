"""From a reference to its picture: one way in for files, spans of shards, cells of tables, frames and blobs.

Where a reference points inside a container, nothing is unpacked; random access costs one read of that picture
(a Parquet file: one row group, kept for its neighbours).
"""

from __future__ import annotations

import http.client
import os
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlparse

from PIL import Image

from llava_train.data.pictures import video
from llava_train.data.pictures.images import Header, check_image, decode_image
from llava_train.data.records.tables import cell_bytes
from llava_train.data.sample import ImageRef, shown
from llava_train.errors import DataError, RecordError
from llava_train.files import inside, regular_file
from llava_train.storage import read_range

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov")
MAX_DOWNLOAD = 64 * 2**20
_TIMEOUT_S = 20
_DEADLINE_S = 60
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Media:
    """What a source allows of its pictures, and where they start from.

    Attributes:
        root: the folder that paths in records are relative to.
        allow_links: links below `root` may lead outside it.
        allow_http: pictures on the web may be fetched when the source is prepared.
        exif_orientation: pictures are turned as their camera said.
        video_frames: frames taken evenly from a video.
    """

    root: Path
    allow_links: bool = False
    allow_http: bool = False
    exif_orientation: bool = False
    video_frames: int = 8


def open_picture(ref: ImageRef, media: Media) -> Image.Image:
    """The picture as RGB; RecordError names it and says what is wrong."""
    if ref.kind == "frame":
        path = inside(media.root, ref.path, media.allow_links)
        return video.read_frame(path, name_of(ref, media), ref.at, ref.size)
    return decode_image(_source(ref, media), name_of(ref, media), media.exif_orientation)


def check_picture(ref: ImageRef, media: Media, level: str) -> Header | None:
    """Look at a picture as closely as `level` asks; its size and notes, where the level shows them."""
    if level == "none":
        if ref.kind in ("file", "frame"):
            inside(media.root, ref.path, media.allow_links)
        return None
    if ref.kind == "frame":
        return _check_video(ref, media, level)
    return check_image(_source(ref, media), name_of(ref, media), level, media.exif_orientation)


def _check_video(ref: ImageRef, media: Media, level: str) -> Header | None:
    path = inside(media.root, ref.path, media.allow_links)
    name = str(path)
    if level == "exists":
        regular_file(path, name, "video")
        return None
    found = video.probe(path, name)
    if level == "decode":
        video.read_frame(path, name, ref.size - 1, ref.size)
    return Header(found.width, found.height, ())


def name_of(ref: ImageRef, media: Media) -> str:
    """What errors call a picture."""
    names: dict[str, Callable[[], str]] = {
        "file": lambda: str(media.root / ref.path),
        "frame": lambda: str(media.root / ref.path),
        "span": lambda: f"{ref.path} (bytes {ref.at} to {ref.at + ref.size})",
        "cell": lambda: f"{ref.path} (row {ref.at}, column {ref.column})",
        "blob": lambda: f"{ref.path} (bytes {ref.at} to {ref.at + ref.size})",
        "bytes": lambda: "the picture in the record",
        "url": lambda: ref.path,
    }
    return names[ref.kind]()


def _source(ref: ImageRef, media: Media) -> bytes | Path:
    if ref.kind == "file":
        return inside(media.root, ref.path, media.allow_links)
    if ref.kind == "bytes":
        return ref.data
    if ref.kind == "url":
        raise RecordError(f"{ref.path}: is still on the web", "image_url")
    try:
        return cell_bytes(ref) if ref.kind == "cell" else read_range(ref.path, ref.at, ref.size)
    except RecordError:
        raise
    except DataError as error:
        raise RecordError(f"{name_of(ref, media)}: {error}", "image_missing") from error


def picture_bytes(ref: ImageRef, media: Media) -> bytes:
    """The bytes of a picture as they lie in its file; RecordError if they cannot be read."""
    source = _source(ref, media)
    return source if isinstance(source, bytes) else source.read_bytes()


def located(ref: ImageRef, container: str, blobs: Path) -> ImageRef:
    """A reference of a row with the file that it leaves out: the row's container, or its piece's blobs."""
    inner = {"span": container, "cell": container, "blob": str(blobs)}
    return replace(ref, path=inner[ref.kind]) if ref.kind in inner else ref


def settle(ref: ImageRef, media: Media) -> list[ImageRef]:
    """A reference without what must not outlive `prepare`: a URL becomes a file or bytes, a video its frames.

    RecordError for a URL the recipe does not allow, a download that fails, and a file:// outside the root.
    """
    if ref.kind == "url":
        return [_settle_url(ref.path, media)]
    if ref.kind == "frame" and not ref.size:
        path = _with_suffix(ref.path, media)
        return [replace(ref, path=path, at=index, size=media.video_frames) for index in range(media.video_frames)]
    return [ref]


def _with_suffix(path: str, media: Media) -> str:
    """The file of a video that may be named without its suffix; `path` itself where there is none."""
    if path.lower().endswith(VIDEO_SUFFIXES):
        return path
    found = (path + suffix for suffix in ("", *VIDEO_SUFFIXES))
    return next((name for name in found if os.path.isfile(inside(media.root, name, media.allow_links))), path)  # noqa: PTH113


def _settle_url(url: str, media: Media) -> ImageRef:
    if url[:7].lower() == "file://":
        return ImageRef(_below_root(url, media.root))
    if not media.allow_http:
        message = f"{shown(url)}: a picture on the web; set allow_http: true for this source to fetch it"
        raise RecordError(message, "image_url", hostile=True)
    return ImageRef("", "bytes", data=fetch(url))


def _below_root(url: str, root: Path) -> str:
    """The path below the root that a file:// URL names; whether it leads out by `..` or a link is seen later."""
    try:
        named = urlparse(url)
        path, host = Path(unquote(named.path)), named.netloc
    except ValueError as error:  # file://[
        raise RecordError(f"{shown(url)!r}: no URL: {error}", "image_path", hostile=True) from error
    for base in (root.absolute(), root.resolve()):
        if host in ("", "localhost") and path.is_relative_to(base):
            return str(path.relative_to(base))
    raise RecordError(f"{shown(url)!r}: leads outside the image root {root}", "image_path", hostile=True)


@lru_cache(maxsize=8)
def fetch(url: str) -> bytes:
    """The bytes behind an http(s) URL, at most 64 MB within a minute; RecordError "image_url" says what failed.

    The last few are remembered, for neighbours that ask about the same picture.
    """
    name, deadline, content = shown(url), time.monotonic() + _DEADLINE_S, bytearray()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "llava-train"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            if urlparse(response.url).scheme not in ("http", "https"):
                raise RecordError(f"{name}: leads to {shown(response.url)}", "image_url", hostile=True)
            while chunk := response.read1(_CHUNK):
                content += chunk
                if len(content) > MAX_DOWNLOAD:
                    raise RecordError(f"{name}: more than {MAX_DOWNLOAD:,} bytes", "image_url")
                if time.monotonic() > deadline:
                    raise RecordError(f"{name}: took more than {_DEADLINE_S} seconds", "image_url")
            if response.length:
                raise RecordError(f"{name}: broke off, {response.length:,} bytes are missing", "image_url")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RecordError(f"{name}: cannot be fetched: {shown(str(error))}", "image_url") from error
    return bytes(content)
