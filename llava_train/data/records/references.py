"""How a record names its pictures and videos: paths, URLs, data URLs, cells of a table, bytes -> ImageRef."""

from __future__ import annotations

import base64
import re
from typing import Any

from llava_train.data.sample import ImageRef, shown
from llava_train.errors import RecordError

IMAGE_KEYS = ("__images__", "image", "images", "jpg", "jpeg", "png", "webp")
VIDEO_KEYS = ("video", "videos")
_DATA_URL = re.compile(r"data:image/[\w.+-]+(;[\w.+-]+=[^;,]*)*;base64,", re.IGNORECASE)
_WEB = re.compile(r"(file|https?)://", re.IGNORECASE)


def pictures_of(record: dict[str, Any], where: str) -> list[ImageRef]:
    """The pictures of a record in their order.

    Raises RecordError "malformed" for what names none, and where two keys name different ones; "image_unreadable"
    for a broken data URL.
    """
    return [reference(value, where) for value in _held(record, IMAGE_KEYS, where)]


def videos_of(record: dict[str, Any], where: str) -> list[ImageRef]:
    """The videos of a record, each a `frame` reference without a size. Raises RecordError "malformed"."""
    return [video_reference(value, where) for value in _held(record, VIDEO_KEYS, where)]


def video_reference(value: Any, where: str) -> ImageRef:
    """A whole video, named by its path."""
    if isinstance(value, ImageRef) and value.kind == "frame":
        return value
    if not isinstance(value, str) or not value:
        raise RecordError(f"{where}: 'video' must be a path or a list of paths", "malformed")
    return ImageRef(value, "frame")


def _held(record: dict[str, Any], keys: tuple[str, ...], where: str) -> list[Any]:
    """What the record's one key of these holds, as a list; a table gives every row every key."""
    found = {key: record[key] for key in keys if key in record and record[key] not in (None, [])}
    first = next(iter(found), "")
    for key, value in found.items():
        if value != found[first]:
            raise RecordError(f"{where}: {first!r} and {key!r} name different files; keep one of them", "malformed")
    value = found.get(first, [])
    return value if isinstance(value, list) else [value]


def reference(value: Any, where: str, web: bool = False) -> ImageRef:
    """Any way a record names a picture. `web`: the format may hold URLs (OpenAI messages)."""
    if isinstance(value, ImageRef):
        return value
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return ImageRef("", "bytes", data=value["bytes"])
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise RecordError(f"{where}: 'image' must be a path or a list of paths", "malformed")
    if value[:5].lower() == "data:":
        return ImageRef("", "bytes", data=_data(value, where))
    return ImageRef(value, "url" if web and _WEB.match(value) else "file")


def _data(url: str, where: str) -> bytes:
    head = _DATA_URL.match(url)
    if not head:
        message = f"{where}: {shown(url[:60])!r}: a data URL must begin with data:image/...;base64,"
        raise RecordError(message, "image_unreadable")
    try:
        return base64.b64decode("".join(url[head.end() :].split()), validate=True)
    except ValueError as error:
        raise RecordError(f"{where}: a data URL is not base64: {error}", "image_unreadable") from error
