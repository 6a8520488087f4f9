"""Where sources lie: local files, and anything fsspec knows by a URL. Read whole, by range, or as a stream."""

from __future__ import annotations

import glob
import io
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from llava_train.errors import DataError
from llava_train.files import sha256_file, sha256_json, write_json

SHARDS = ("tar", "parquet", "arrow", "jsonl", "json")
"""Suffixes of files of records, in the order in which a folder is searched for them."""
_BESIDE = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
"""What `datasets` writes beside the data describes it and holds no record."""
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_NUMBERS = 1_000_000
_SETTLED_S = 2.0
_BUFFER = 1 << 20


def is_remote(path: str) -> bool:
    """Whether a path is a URL ("s3://...", "https://...", "memory://...")."""
    return "://" in path


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Whatever fails in the body is a DataError that names `path`."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        extra = path.split("://", 1)[0].replace("https", "http")
        raise DataError(f'{path}: cannot be read: {error}; try pip install "fsspec[{extra}]"') from error
    except Exception as error:  # stores raise their own types: aiohttp's, botocore's, ...
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: cannot be read: {reason}") from error


def _located(path: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it. fsspec keeps the instances, anew in every process."""
    from fsspec.core import url_to_fs

    system, inner = url_to_fs(path)
    return system, str(inner)


class _Remote(io.RawIOBase):
    """A remote file whose errors, which may come at any read, name it."""

    def __init__(self, path: str) -> None:
        self._path = path
        with _named(path):
            system, inner = _located(path)
            self._stream = system.open(inner, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _named(self._path):
            return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def readinto(self, buffer: Any) -> int:
        with _named(self._path):
            content = self._stream.read(len(buffer))
            buffer[: len(content)] = content
            return len(content)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_stream"):
            self._stream.close()
        super().close()


def open_binary(path: str) -> BinaryIO:
    """A seekable stream of a file's bytes; DataError if it is not there or may not be read."""
    if is_remote(path):
        return io.BufferedReader(_Remote(path), _BUFFER)
    with _named(path):
        return Path(path).open("rb")


def file_size(path: str) -> int:
    """Bytes of a file; DataError if it is not there."""
    with _named(path):
        if is_remote(path):
            system, inner = _located(path)
            return int(system.size(inner) or 0)
        return Path(path).stat().st_size


def file_stamp(path: str) -> tuple[int, ...]:
    """What changes when a local file does; nothing for a remote one, or one that is not there."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return ()
    return found.st_size, found.st_mtime_ns


def read_range(path: str, at: int, size: int) -> bytes:
    """`size` bytes from byte `at`, or fewer where the file ends; DataError if it cannot be read."""
    with _named(path):
        if is_remote(path):
            system, inner = _located(path)
            return bytes(system.cat_file(inner, start=at, end=at + size))
        with Path(path).open("rb") as stream:
            stream.seek(at)
            return stream.read(size)


def expand_paths(path: str) -> list[str]:
    """The files a source names: one file, a glob, numbers in braces (`shard-{00000..00331}.tar`), or a folder.

    A folder gives the shards in it: `.tar`, else `.parquet`, else `.arrow`, else `.jsonl`, else `.json` files.
    Raises DataError where that is nothing, and for a name that is not UTF-8.
    """
    found = _expanded(path)
    for file in found:
        if not file.isascii() and "\\udc" in ascii(file):
            raise DataError(f"{file!a}: the file's name is not UTF-8; rename it")
    return found


def _expanded(path: str) -> list[str]:
    braces = _BRACES.search(path)
    if braces:
        low, high = braces.groups()
        if not int(low) <= int(high) < int(low) + _MAX_NUMBERS:
            raise DataError(f"{path}: {braces.group()} must count up, to at most {_MAX_NUMBERS:,} files")
        numbers = [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
        return [file for number in numbers for file in _expanded(path.replace(braces.group(), number, 1))]
    if is_remote(path):
        return _expand_remote(path)
    if os.path.isdir(path):  # noqa: PTH112  (pathlib's raises for a name that is too long)
        return _shards(path)
    if os.path.isfile(path):  # noqa: PTH113
        return [path]
    found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []  # noqa: PTH207
    return [file for file in found if os.path.isfile(file)] or _nothing(path)  # noqa: PTH113


def _expand_remote(path: str) -> list[str]:
    if "*" not in path and "[" not in path:  # a "?" opens a URL's query
        return [path]
    with _named(path):
        system, inner = _located(path)
        return sorted(system.unstrip_protocol(found) for found in system.glob(inner)) or _nothing(path)


def _shards(folder: str) -> list[str]:
    found: dict[str, list[str]] = {suffix: [] for suffix in SHARDS}
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            kept = not name.startswith((".", "cache-")) and name not in _BESIDE  # cache-*: results of datasets' map()
            suffix = name.rpartition(".")[2]
            if kept and suffix in found:
                found[suffix].append(os.path.join(place, name))  # noqa: PTH118
    return sorted(next(filter(None, found.values()), [])) or _nothing(folder)


def _nothing(path: str) -> list[str]:
    raise DataError(f"{path}: no such file" + (" (nothing matches)" if glob.has_magic(path) else ""))


class Identities:
    """What a file is, by its content: sha256, remembered by path, size and time of change.

    A remote file is known by what its store says of it (size, etag, time of change), for reading it whole would be
    the download that reading in place avoids.
    """

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        self._known: dict[str, Any] = {}
        with suppress(OSError, ValueError, TypeError):  # not there yet, or damaged: the files are read again
            self._known.update(json.loads(memory.read_text(encoding="utf-8")))
        self._saved = dict(self._known)

    def of(self, path: str) -> str:
        """Hex digest that changes when the file does; DataError where there is no such file."""
        if is_remote(path):
            with _named(path):
                system, inner = _located(path)
                return sha256_json([path, sorted((key, str(value)) for key, value in system.info(inner).items())])
        status = Path(path).stat()
        stamp = [status.st_size, status.st_mtime_ns]
        key = os.path.realpath(path)
        if self._known.get(key, [None])[0] == stamp:
            return str(self._known[key][1])
        digest = sha256_file(Path(path))
        # A file that changed a moment ago may change again within the clock's grain.
        if time.time() - status.st_mtime > _SETTLED_S:
            self._known[key] = [stamp, digest]
        return digest

    def save(self) -> None:
        """Remember for the next start; another process may have learnt more meanwhile, which only costs time."""
        if self._known != self._saved:
            write_json(self.memory, self._known)
            self._saved = dict(self._known)
