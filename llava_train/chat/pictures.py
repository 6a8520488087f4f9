"""Pictures to talk about: a local file, a URL on the web, a `data:` URL, or one in memory -> RGB.

What the web sends is read within limits of size and time, and only from addresses that all the world may reach: a model
that others ask must not be their way to what stands beside it.
"""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava_train.chat.download import download
from llava_train.data.pictures.images import check_size, decode_image
from llava_train.data.sample import shown
from llava_train.errors import DataError
from llava_train.files import regular_file

Source = str | Path | Image.Image
"""A path, an http(s) or `data:` URL, or a picture in memory."""
_DATA_URL = re.compile(r"data:image/[\w.+-]+(;[\w.+-]+=[\w.+-]+)*;base64,", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://|data:|file:", re.IGNORECASE)


@dataclass(frozen=True)
class PictureLimits:
    """What may be read as a picture.

    Attributes:
        max_bytes: of one picture, as it is stored or sent.
        timeout_s: for the whole of a download, redirects included.
        urls: whether http(s) URLs may be read.
        private: whether they may lead to loopback, private and other addresses that are not public.
        files: whether local files may be read.
    """

    max_bytes: int = 20_000_000
    timeout_s: float = 10.0
    urls: bool = True
    private: bool = False
    files: bool = True


def read_picture(source: Source, limits: PictureLimits = PictureLimits()) -> Image.Image:
    """The picture as RGB. DataError names the source, what is wrong with it and what to do."""
    if isinstance(source, Image.Image):
        return _in_memory(source)
    name, text = name_of(source), str(source)
    if text[:5].lower() == "data:":
        return decode_image(_data_url(text, name, limits), name)
    if is_url(source):
        if not limits.urls:
            raise DataError(f"{name}: URLs are not read here; send the picture itself as a data: URL")
        return decode_image(download(text, name, limits.max_bytes, limits.timeout_s, limits.private), name)
    if isinstance(source, str) and (found := _SCHEME.match(text)):
        others = ", and paths" if limits.files else ""
        raise DataError(f"{name}: {found.group()} is not read; only http, https and data: are{others}")
    if not limits.files:
        raise DataError(f"{name}: files are not read here; send the picture itself as a data: URL")
    return decode_image(_file(text, name, limits), name)


def is_url(source: Source) -> bool:
    """Whether a source is a picture on the web."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def name_of(source: Source) -> str:
    """What messages call a picture; short, whatever it is."""
    if isinstance(source, Image.Image):
        return f"the picture in memory ({source.width} x {source.height} pixels)"
    text = str(source)
    return f"{shown(text[:40])}..." if text[:5].lower() == "data:" and len(text) > 40 else shown(text)


def _in_memory(image: Image.Image) -> Image.Image:
    name = name_of(image)
    check_size(*image.size, name)
    try:
        if image.mode.startswith("I;16"):  # as a file of 16 bits is read: `convert` would cut off at 255
            file = io.BytesIO()
            image.save(file, "PNG")
            return decode_image(file.getvalue(), name)
        return image.convert("RGB")
    except Exception as error:  # one that is read from its file only now fails in any way
        raise DataError(f"{name}: cannot be read: {type(error).__name__}: {error}") from error


def _data_url(text: str, name: str, limits: PictureLimits) -> bytes:
    head = _DATA_URL.match(text)
    if head is None:
        raise DataError(f"{name}: must begin like data:image/png;base64, with the picture in base64 behind it")
    _check_bytes((len(text) - head.end()) * 3 // 4 - 2, name, limits)
    try:
        return base64.b64decode(re.sub(r"\s+", "", text[head.end() :]), validate=True)
    except ValueError as error:
        raise DataError(f"{name}: its base64 is damaged ({error}); encode the file's bytes again") from error


def _file(text: str, name: str, limits: PictureLimits) -> Path:
    try:
        path = Path(text).expanduser()
        size = regular_file(path, name)
    except (ValueError, RuntimeError) as error:  # a NUL, ~nobody
        raise DataError(f"{name}: cannot be read: {error}") from error
    _check_bytes(size, name, limits)
    return path


def _check_bytes(size: int, name: str, limits: PictureLimits) -> None:
    if size > limits.max_bytes:
        raise DataError(f"{name}: {size:,} bytes, more than the {limits.max_bytes:,} allowed; make it smaller")
