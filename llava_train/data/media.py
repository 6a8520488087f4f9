"""From a reference to its picture: one way in for files, spans of shards, cells of tables, frames and blobs.

Where a reference points inside a container, nothing is unpacked; random access costs one read of that picture
(a Parquet file: one row group, kept for its neighbours).
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from PIL import Image

from llava_train.data import video
from llava_train.data.images import Header, check_image, decode_image
from llava_train.data.sample import ImageRef
from llava_train.errors import RecordError
from llava_train.files import inside, regular_file
from llava_train.storage import is_remote, open_binary, read_range

VIDEO_SUFFIXES = ("", ".mp4", ".avi", ".mkv", ".webm", ".mov")
MAX_DOWNLOAD = 64 * 2**20
_TIMEOUT_S = 20


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
        return _cell(ref) if ref.kind == "cell" else read_range(ref.path, ref.at, ref.size)
    except OSError as error:
        raise RecordError(f"{name_of(ref, media)}: cannot be read: {error}", "image_missing") from error


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
        path = ref.path if os.path.splitext(ref.path)[1] else _with_suffix(ref.path, media)  # noqa: PTH122
        return [replace(ref, path=path, at=index, size=media.video_frames) for index in range(media.video_frames)]
    return [ref]


def _with_suffix(path: str, media: Media) -> str:
    """The file of a video that is named without its suffix."""
    found = (path + suffix for suffix in VIDEO_SUFFIXES)
    return next((name for name in found if inside(media.root, name, media.allow_links).is_file()), path)


def _settle_url(url: str, media: Media) -> ImageRef:
    if url.startswith("file://"):
        path, root = Path(unquote(urlparse(url).path)), media.root.absolute()
        if not path.is_relative_to(root):
            raise RecordError(f"{url!r}: leads outside the image root {root}", "image_path", hostile=True)
        return ImageRef(str(path.relative_to(root)))
    if not media.allow_http:
        message = f"{url[:200]}: a picture on the web; set allow_http: true for this source to fetch it"
        raise RecordError(message, "image_url", hostile=True)
    return ImageRef("", "bytes", data=fetch(url))


def fetch(url: str) -> bytes:
    """The bytes behind an http(s) URL, at most 64 MB; RecordError "image_url" says what failed."""
    request = urllib.request.Request(url, headers={"User-Agent": "llava-train"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            if urlparse(response.url).scheme not in ("http", "https"):
                raise RecordError(f"{url}: leads to {response.url}", "image_url", hostile=True)
            content: bytes = response.read(MAX_DOWNLOAD + 1)
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise RecordError(f"{url}: cannot be fetched: {error}", "image_url") from error
    if len(content) > MAX_DOWNLOAD:
        raise RecordError(f"{url}: more than {MAX_DOWNLOAD:,} bytes", "image_url")
    return content


def _cell(ref: ImageRef) -> bytes:
    if Path(ref.path).suffix == ".parquet" or _is_parquet(ref.path):
        column, row = _row_group(ref.path, *_group_of(ref.path, ref.at), ref.column)
    else:
        column, row = arrow_table(ref.path).column(ref.column), 0
    value = column[ref.at - row]
    if hasattr(value, "values"):
        value = value.values[ref.size]
    held = value["bytes"] if hasattr(value, "keys") else value
    content: bytes = held.as_py()
    return content


@lru_cache(maxsize=256)
def _is_parquet(path: str) -> bool:
    with open_binary(path) as stream:
        return stream.read(4) == b"PAR1"


@lru_cache(maxsize=64)
def _group_starts(path: str) -> list[int]:
    import pyarrow.parquet as pq

    with open_binary(path) as stream:
        metadata = pq.ParquetFile(stream).metadata
        starts = [0]
        for index in range(metadata.num_row_groups):
            starts.append(starts[-1] + metadata.row_group(index).num_rows)
    return starts


def _group_of(path: str, row: int) -> tuple[int, int]:
    """Row group of a row, and that group's first row."""
    starts = _group_starts(path)
    group = next(index for index, start in enumerate(starts[1:]) if row < start)
    return group, starts[group]


@lru_cache(maxsize=4)
def _row_group(path: str, group: int, first: int, column: str) -> tuple[Any, int]:
    import pyarrow.parquet as pq

    with open_binary(path) as stream:
        table = pq.ParquetFile(stream).read_row_group(group, columns=[column])
    return table.column(column), first


@lru_cache(maxsize=64)
def arrow_table(path: str) -> Any:
    """The memory-mapped table of an Arrow file, in either of its two layouts (`datasets` writes the stream)."""
    import pyarrow as pa

    if is_remote(path):
        with open_binary(path) as stream:
            buffer = pa.BufferReader(stream.read())
    else:
        buffer = pa.memory_map(path)
    try:
        return pa.ipc.open_stream(buffer).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(buffer).read_all()
