"""Where sources lie: local files, and anything fsspec knows by a URL. Read whole, by range, or as a stream."""

from __future__ import annotations

import glob
import json
import os
import re
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from llava_train.errors import DataError
from llava_train.files import sha256_file, sha256_json, write_json

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_SETTLED_S = 2.0


def is_remote(path: str) -> bool:
    """Whether a path is a URL ("s3://...", "https://...", "memory://...")."""
    return "://" in path


@lru_cache(maxsize=32)
def _file_system(protocol: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(protocol)
    except (ValueError, ImportError) as error:
        raise DataError(f"{protocol}://: cannot be read: {error}") from error


def _located(path: str) -> tuple[Any, str]:
    protocol = path.split("://", 1)[0]
    system = _file_system(protocol)
    return system, system._strip_protocol(path)


def open_binary(path: str) -> BinaryIO:
    """A seekable stream of a file's bytes; DataError if it is not there or may not be read."""
    try:
        if is_remote(path):
            system, inner = _located(path)
            return cast(BinaryIO, system.open(inner, "rb"))
        return Path(path).open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def file_size(path: str) -> int:
    """Bytes of a file."""
    if is_remote(path):
        system, inner = _located(path)
        return int(system.size(inner) or 0)
    return Path(path).stat().st_size


def read_range(path: str, at: int, size: int) -> bytes:
    """`size` bytes from byte `at`, or fewer where the file ends."""
    if is_remote(path):
        system, inner = _located(path)
        return bytes(system.cat_file(inner, start=at, end=at + size))
    with Path(path).open("rb") as stream:
        stream.seek(at)
        return stream.read(size)


def expand_paths(path: str) -> list[str]:
    """The files a source names: one file, a glob, numbers in braces (`shard-{00000..00331}.tar`), or a folder.

    A folder gives the shards in it: `.tar`, else `.parquet`, else `.arrow`, else `.jsonl`, else `.json` files.
    Raises DataError where that is nothing.
    """
    braces = _BRACES.search(path)
    if braces:
        low, high = braces.groups()
        numbers = [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
        return [file for number in numbers for file in expand_paths(path.replace(braces.group(), number, 1))]
    if is_remote(path):
        return _expand_remote(path)
    if Path(path).is_dir():
        return _shards(path)
    if not Path(path).exists() and glob.has_magic(path):
        return sorted(glob.glob(path, recursive=True)) or _nothing(path)  # noqa: PTH207
    return [path] if Path(path).is_file() else _nothing(path)


def _expand_remote(path: str) -> list[str]:
    system, inner = _located(path)
    if not glob.has_magic(inner):
        return [path]
    protocol = path.split("://", 1)[0]
    return sorted(system.unstrip_protocol(found) for found in system.glob(inner)) or _nothing(f"{protocol}://{inner}")


def _shards(folder: str) -> list[str]:
    for suffix in ("tar", "parquet", "arrow", "jsonl", "json"):
        found = sorted(str(file) for file in Path(folder).rglob(f"*.{suffix}") if not file.name.startswith("."))
        # What `datasets` and `transformers` write beside the data describes it and holds no record.
        found = [
            file for file in found if Path(file).name not in ("dataset_info.json", "state.json", "dataset_dict.json")
        ]
        if found:
            return found
    return _nothing(folder)


def _nothing(path: str) -> list[str]:
    raise DataError(f"{path}: no such file" + (" (nothing matches)" if glob.has_magic(path) else ""))


class Identities:
    """What a file is, by its content: sha256, remembered by path, size and time of change.

    A remote file is known by what its store says of it (etag or time of change), for reading it whole would be
    the download that reading in place avoids.
    """

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        try:
            self._known: dict[str, Any] = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def of(self, path: str) -> str:
        """Hex digest that changes when the file does."""
        if is_remote(path):
            system, inner = _located(path)
            return sha256_json([path, str(system.ukey(inner)), system.size(inner)])
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
        write_json(self.memory, self._known)
