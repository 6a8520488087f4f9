"""Files handled with care: whole or not at all, hashed, inside their root, and only where there is room."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from llava_train.errors import DataError, RecordError, StorageError

_ABANDONED_S = 24 * 3600


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if re.search("[\\ud800-\\udfff]", text):  # half of a character can only be written as an escape
        text = json.dumps(value, indent=2)
    write_whole(path, text + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text so that a reader, or a crash, finds the old file or the new one, never a part of it."""
    temporary = temporary_beside(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read a JSON file; DataError with the line and column if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error


def flush(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; it takes that name only if the body ends well.

    Everything in it is flushed before the rename. An older `target` is replaced. On an error the
    temporary folder is removed and `target` is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            flush(path)
        flush(temporary)
        replaced = temporary_beside(target)
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        flush(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_beside(path: Path) -> Path:
    """A name beside `path` that no other process uses, on this machine or on another with the same disk."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def sweep(folder: Path, untouched_s: float = _ABANDONED_S, name: str = "*") -> None:
    """Remove temporary files and folders (of `name`) that nobody has touched for so long: their process ended in the
    middle.

    Whether it still runs cannot be asked: it may run on another machine that shares the folder. One that holds the
    folder for itself says 0.
    """
    for path in folder.glob(f".{name}.tmp"):
        with suppress(OSError):
            if path.lstat().st_mtime <= time.time() - untouched_s:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def ensure_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise StorageError unless `folder`'s disk can be written and has `needed` bytes free."""
    existing = _existing(folder)
    if not existing.is_dir():
        raise StorageError(f"{folder}: {existing} is a file, not a folder; choose another output folder")
    if not os.access(existing, os.W_OK):
        raise StorageError(f"{folder}: no right to write into {existing}; choose another output folder")
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"{folder}: {purpose} needs {needed:,} bytes, {free:,} are free; "
            "free some space or choose an output folder on another disk"
        )


@contextmanager
def storage_faults(path: Path, needed: int) -> Iterator[None]:
    """Turn what the disk refuses in the body into a StorageError: what was written, bytes needed and free."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        free = shutil.disk_usage(_existing(path)).free
        advice = f"; {needed:,} bytes are needed, {free:,} are free" if full else ""
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}{advice}") from error


def inside(root: Path, relative: str, allow_links: bool = False) -> Path:
    """The file `relative` names below `root`: absolute, and without links unless `allow_links`.

    `root` itself may be a link. With `allow_links` the links below it may lead anywhere (hub caches are made
    of them) and are not followed here; only the path as written must stay inside.

    Raises RecordError "image_path" (hostile): absolute, a URL, NUL or what no file name can hold, `..` or a
    link that leads outside. Whether the file exists is not asked: see `regular_file`.
    """
    if (
        relative.startswith(("/", "data:", "file:"))
        or "\0" in relative
        or "://" in relative
        or not _encodable(relative)
    ):
        raise _hostile(f"{relative[:200]!r}: must be a path relative to the image root {root}")
    base = _real_root(root)
    path = os.path.normpath(os.path.join(base, relative)) if allow_links else _real(base, relative)  # noqa: PTH118
    if not f"{path}/".startswith(base.rstrip("/") + "/"):
        raise _hostile(f"{relative!r}: leads outside the image root {root}")
    return Path(path)


def regular_file(path: Path, name: str, kind: str = "image") -> int:
    """Bytes in the regular file at `path` (links followed), found without opening it: to open a pipe may hang.

    Raises RecordError calling it `name`: "`kind`_missing", "`kind`_empty", "`kind`_unreadable" (no right to
    look), and "image_path" (hostile) for a folder, a pipe, a socket or a device.
    """
    try:
        found = path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise RecordError(f"{name}: no such {kind}", f"{kind}_missing") from error
        raise RecordError(f"{name}: cannot be read: {error.strerror}", f"{kind}_unreadable") from error
    if not stat.S_ISREG(found.st_mode):
        raise _hostile(f"{name}: {_KINDS.get(stat.S_IFMT(found.st_mode), 'no regular file')}, not {kind} data")
    if not found.st_size:
        raise RecordError(f"{name}: an empty file (0 bytes)", f"{kind}_empty")
    return found.st_size


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _hostile(message: str) -> RecordError:
    return RecordError(message, "image_path", hostile=True)


def _encodable(relative: str) -> bool:
    try:
        os.fsencode(relative)
    except UnicodeEncodeError:  # a lone surrogate, which JSON can write
        return False
    return True


def _real_root(root: Path) -> str:
    """realpath of `root`, kept for as long as `root` is the same folder."""
    try:
        found = root.stat()
    except OSError:
        return os.path.realpath(root)
    return _kept_realpath(str(root), found.st_dev, found.st_ino)


@lru_cache(maxsize=64)
def _kept_realpath(root: str, device: int, inode: int) -> str:
    return os.path.realpath(root)


def _real(base: str, relative: str) -> str:
    """realpath of `base/relative` for a `base` without links; quick where there are no links below it either."""
    path = base.rstrip("/")
    for part in relative.split("/"):
        if part in ("", "."):
            continue
        path = f"{path}/{part}"
        if part == ".." or _is_link(path):
            return os.path.realpath(f"{base}/{relative}")
    return path or base


def _is_link(path: str) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(path).st_mode)
    except OSError:  # nothing there, so no link either
        return False
