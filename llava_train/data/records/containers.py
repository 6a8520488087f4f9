"""Files of records: how each kind is cut into pieces that workers read, and what records a piece holds.

A container is a row of CONTAINERS: `cut` goes through a file in flat memory and yields pieces, `read` gives the
records of one piece. Nothing is unpacked: pictures inside a container are named by where their bytes are.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llava_train.data.records.jsontext import PIECE_RECORDS, cut_json, cut_jsonl, parse_value, parse_values
from llava_train.data.records.shards import read_shard
from llava_train.data.records.tables import arrow_rows, arrow_table, parquet_groups, parquet_rows
from llava_train.errors import DataError, RecordError
from llava_train.registry import Registry
from llava_train.storage import file_size, open_binary

Entry = tuple[Any, str]
"""A record, or the RecordError that stands in its place; and where in the file it is ("[17]", ":4", ":key")."""


@dataclass(frozen=True)
class Piece:
    """A run of records of one file.

    Attributes:
        container: row of CONTAINERS.
        path: the file.
        first: index of the first record, or its line.
        count: records, 0 where only reading tells.
        text: the records' JSON, where the file is JSON; bytes that are not UTF-8 are lone surrogates in it.
        tail: what is wrong with the end of the file, where this piece is its last.
        size: bytes of the file that the piece stands for, for progress.
    """

    container: str
    path: str
    first: int
    count: int = 0
    text: str = field(default="", repr=False)
    tail: str = ""
    size: int = 0


@dataclass(frozen=True)
class Container:
    """How one kind of file is cut and read; `binary` ones are cut by where things are, not by their text."""

    cut: Callable[[str], Iterator[Piece]]
    read: Callable[[Piece], Iterator[Entry]]
    binary: bool = True


CONTAINERS: Registry[Container] = Registry("container")
_HEAD = 4096
_REFUSED: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (
        (b"\x1f\x8b", b"BZh", b"PK\x03\x04", b"(\xb5/\xfd", b"\xfd7zXZ"),
        "is compressed, so nothing in it can be read by offset; unpack it first",
    ),
    ((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "is UTF-16; save it as UTF-8"),
)


def detect_container(path: str) -> str:
    """The kind of a file, by its first bytes (and its suffix, where two kinds may begin alike).

    Raises DataError for an empty or unknown file.
    """
    with open_binary(path) as stream:
        head = stream.read(_HEAD)
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text:
        raise DataError(f"{path}: holds no record")
    if head[:4] == b"PAR1":
        return "parquet"
    if head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
        return "arrow"
    if head[257:262] == b"ustar" or path.endswith(".tar"):
        return "tar"
    for starts, reason in _REFUSED:
        if head.startswith(starts):
            raise DataError(f"{path}: {reason}")
    return _detect_json(path, text)


def _detect_json(path: str, text: bytes) -> str:
    named = path.endswith((".jsonl", ".ndjson"))
    lines = text.split(b"\n", 1)
    if text[:1] == b"[" and not (named and lines[0].strip() != b"["):
        return "json"
    if text[:1] == b"{" and not named and len(lines) == 2 and _is_unfinished(lines[0]):
        raise DataError(f"{path}: one object over many lines; it must hold a list of records, or a record a line")
    if text[:1] == b"{" or named:
        return "jsonl"
    raise DataError(f"{path}: no list of records, no record a line, and none of tar, parquet, arrow")


def _is_unfinished(line: bytes) -> bool:
    """Whether a JSON value begins on this line and does not end there."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc.rstrip()) - 1  # newer Pythons name the comma before the end
    except (ValueError, RecursionError):
        return False
    return False


def _cut_json(path: str) -> Iterator[Piece]:
    for first, count, text, tail in cut_json(path):
        yield Piece("json", path, first, count, text, tail, len(text))


def _read_json(piece: Piece) -> Iterator[Entry]:
    for index, record in enumerate(parse_values(piece.text, piece.path, piece.first, piece.count), piece.first):
        yield record, f"[{index}]"
    if piece.tail:
        at = f"[{piece.first + piece.count}]"
        yield RecordError(f"{piece.path}{at}: {piece.tail}", "file_truncated"), at


def _cut_jsonl(path: str) -> Iterator[Piece]:
    for first, count, text in cut_jsonl(path):
        yield Piece("jsonl", path, first, count, text, size=len(text))


def _read_jsonl(piece: Piece) -> Iterator[Entry]:
    for number, line in enumerate(piece.text.split("\n"), piece.first):
        if line.strip():
            yield parse_value(line, f"{piece.path}:{number}", with_column=True), f":{number}"


def _cut_tar(path: str) -> Iterator[Piece]:
    yield Piece("tar", path, 0, size=file_size(path))


def _read_tar(piece: Piece) -> Iterator[Entry]:
    return read_shard(piece.path)


def _cut_parquet(path: str) -> Iterator[Piece]:
    """Whole row groups, for those are what can be read alone."""
    groups = parquet_groups(path)
    first = pending = 0
    for index, rows in enumerate(groups):
        pending += rows
        if pending and (pending >= PIECE_RECORDS or index == len(groups) - 1):
            yield Piece("parquet", path, first, pending, size=file_size(path) * pending // sum(groups))
            first, pending = first + pending, 0


def _read_parquet(piece: Piece) -> Iterator[Entry]:
    return parquet_rows(piece.path, piece.first, piece.count)


def _cut_arrow(path: str) -> Iterator[Piece]:
    rows = arrow_table(path).num_rows
    for first in range(0, rows, PIECE_RECORDS):
        count = min(PIECE_RECORDS, rows - first)
        yield Piece("arrow", path, first, count, size=file_size(path) * count // rows)


def _read_arrow(piece: Piece) -> Iterator[Entry]:
    return arrow_rows(piece.path, piece.first, piece.count)


CONTAINERS.register("json")(Container(_cut_json, _read_json, binary=False))
CONTAINERS.register("jsonl")(Container(_cut_jsonl, _read_jsonl, binary=False))
CONTAINERS.register("tar")(Container(_cut_tar, _read_tar))
CONTAINERS.register("parquet")(Container(_cut_parquet, _read_parquet))
CONTAINERS.register("arrow")(Container(_cut_arrow, _read_arrow))
