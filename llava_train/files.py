"""Files handled with care: whole or not at all, hashed, inside their root, and only where there is room."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_train.errors import DataError, StorageError


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
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    flush(temporary)
    temporary.replace(path)


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
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            flush(path)
        flush(temporary)
        replaced = target.with_name(f".{target.name}.{os.getpid()}.old")
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        flush(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def ensure_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise StorageError unless `folder`'s disk can be written and has `needed` bytes free."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
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


def inside(root: Path, relative: str) -> Path:
    """`root / relative`, resolved; DataError if that leaves `root` (absolute, `..`, a link outwards, NUL)."""
    if "\0" in relative or "://" in relative or Path(relative).is_absolute():
        raise DataError(f"{relative!r}: must be a path relative to the image root {root}")
    base = root.resolve()
    path = (base / relative).resolve()
    if not path.is_relative_to(base):
        raise DataError(f"{relative!r}: leads outside the image root {root}")
    return path
