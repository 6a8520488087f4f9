"""The list of a checkpoint's files with their sha256: what makes it whole, and what it is verified by."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llava_train.errors import RecordError
from llava_train.files import flush, inside, sha256_file, sha256_json, storage_faults

MANIFEST = "manifest.json"
_FORMAT = "llava_train/checkpoint"


def seal(folder: Path, digests: dict[str, str]) -> None:
    """Write the manifest over files that are on the disk already, and flush the folder."""
    text = _text(digests)
    with storage_faults(folder / MANIFEST, len(text)):
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        flush(folder / MANIFEST)
        flush(folder)


def _text(digests: dict[str, str]) -> str:
    """The one spelling of a manifest: any other byte in it is damage."""
    body: dict[str, Any] = {"format": _FORMAT, "version": 1, "files": dict(sorted(digests.items()))}
    return json.dumps({**body, "sha256": sha256_json(body)}, indent=1) + "\n"


def read_manifest(folder: Path) -> dict[str, str]:
    """sha256 by file name. Raises ValueError that says what is wrong with the manifest."""
    try:
        content = (folder / MANIFEST).read_bytes()
        digests = dict(json.loads(content.decode())["files"])
        same = _text(digests).encode() == content
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is damaged") from error
    if not same:
        raise ValueError(f"{MANIFEST} is damaged")
    return digests


def faults(folder: Path, share: tuple[int, int] = (0, 1)) -> Iterator[str]:
    """What is wrong with a checkpoint, a line a fault; nothing if it verifies.

    `share` (rank, number of ranks) reads every so many-th file only: ranks verify a checkpoint together.
    """
    try:
        digests = read_manifest(folder)
    except ValueError as error:
        yield str(error)
        return
    rank, world_size = share
    for name, digest in sorted(digests.items())[rank::world_size]:
        yield from _file_faults(folder, name, digest)


def _file_faults(folder: Path, name: str, digest: str) -> Iterator[str]:
    try:
        path = inside(folder, name)
    except RecordError as error:
        yield str(error)
        return
    try:
        if not path.is_file():
            yield f"{name} is missing"
        elif sha256_file(path) != digest:
            yield f"{name} does not match its sha256"
    except OSError as error:
        yield f"{name} cannot be read: {error.strerror}"


def steps_of(folder: Path) -> list[int]:
    """Steps of the checkpoints of a run folder, whole or not, the newest last."""
    found = _numbers(path.name for path in (folder / "checkpoints").glob("step-*"))
    return sorted(found)


def _numbers(names: Iterable[str]) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdecimal()]


def place_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step in a run folder."""
    return folder / "checkpoints" / f"step-{step}"
