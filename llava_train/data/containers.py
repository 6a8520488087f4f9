"""Files of records: how each kind is cut into pieces that workers read, and what records a piece holds.

A container is a row of CONTAINERS: `cut` goes through a file in flat memory and yields pieces, `read` gives the
records of one piece. Nothing is unpacked: pictures inside a container are named by where their bytes are.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from llava_train.data.jsontext import PIECE_RECORDS, cut_json, cut_jsonl
from llava_train.data.media import arrow_table
from llava_train.data.sample import ImageRef
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
        text: the records' JSON, where the file is JSON.
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
IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}


def detect_container(path: str) -> str:
    """The kind of a file, by its first bytes (and its suffix, where both JSON kinds begin alike).

    Raises DataError for an empty or unknown file.
    """
    with open_binary(path) as stream:
        head = stream.read(600)
    if not head.strip():
        raise DataError(f"{path}: holds no record")
    if head[:4] == b"PAR1":
        return "parquet"
    if head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
        return "arrow"
    if head[257:262] == b"ustar":
        return "tar"
    if head[:2] == b"\x1f\x8b" or head[:3] == b"BZh" or head[:4] in (b"PK\x03\x04", b"(\xb5/\xfd"):
        raise DataError(f"{path}: is compressed, so nothing in it can be read by offset; unpack it first")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] == b"[" and not path.endswith(".jsonl"):
        return "json"
    if text[:1] == b"{" or path.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    raise DataError(f"{path}: no list of records, no record a line, and none of tar, parquet, arrow")


def _cut_json(path: str) -> Iterator[Piece]:
    for first, count, text, tail in cut_json(path):
        yield Piece("json", path, first, count, text, tail, len(text))


def _cut_jsonl(path: str) -> Iterator[Piece]:
    for first, count, text in cut_jsonl(path):
        yield Piece("jsonl", path, first, count, text, size=len(text))


def _read_json(piece: Piece) -> Iterator[Entry]:
    """The records of a slice of a JSON list; a piece of damaged text is read record by record."""
    if "\udc80" <= max(piece.text, default="") <= "\udcff" or piece.tail:
        records: Iterator[Any] = _one_by_one(piece)
    else:
        records = iter(json.loads(f"[{piece.text}]"))
    for index, record in enumerate(records, piece.first):
        yield record, f"[{index}]"


def _one_by_one(piece: Piece) -> Iterator[Any]:
    decoder, at, index = json.JSONDecoder(), 0, piece.first
    while index < piece.first + piece.count:
        while piece.text[at] in " \t\r\n,":
            at += 1
        record, end = decoder.raw_decode(piece.text, at)
        yield _utf8_fault(piece.text[at:end], f"{piece.path}[{index}]") or record
        at, index = end, index + 1
    if piece.tail:
        yield RecordError(f"{piece.path}[{index}]: {piece.tail}", "file_truncated")


def _read_jsonl(piece: Piece) -> Iterator[Entry]:
    for number, line in enumerate(piece.text.split("\n"), piece.first):
        if line.strip():
            yield _parse_line(line, f"{piece.path}:{number}"), f":{number}"


def _parse_line(line: str, place: str) -> Any:
    try:
        return _utf8_fault(line, place) or json.loads(line)
    except json.JSONDecodeError as error:
        return RecordError(f"{place}:{error.colno}: not JSON: {error.msg}", "not_json")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        return RecordError(f"{place}: not JSON that can be read: {error}", "not_json")


def _utf8_fault(text: str, place: str) -> RecordError | None:
    """Bytes that are not UTF-8 were read as lone surrogates (surrogateescape)."""
    if text.isascii():
        return None
    bad = next((index for index, letter in enumerate(text) if "\udc80" <= letter <= "\udcff"), None)
    return None if bad is None else RecordError(f"{place}: not UTF-8 (character {bad} of the record)", "not_utf8")


def _cut_tar(path: str) -> Iterator[Piece]:
    yield Piece("tar", path, 0, size=file_size(path))


def _read_tar(piece: Piece) -> Iterator[Entry]:
    """WebDataset samples: neighbours that share a name up to its first dot; `json` and `txt` are read."""
    sample: dict[str, Any] = {}
    try:
        with open_binary(piece.path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            while member := archive.next():
                folder, name = os.path.split(member.name)
                stem, _, suffix = name.partition(".")
                if not member.isreg() or not stem:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if sample and key != sample["__key__"]:
                    yield sample, f":{sample['__key__']}"
                    sample = {}
                sample.setdefault("__key__", key)
                _add_member(sample, suffix.lower(), member, stream, piece.path)
                vars(archive)["members"].clear()  # tarfile would keep every header it has seen
    except (tarfile.TarError, EOFError, OSError) as error:
        place = sample.get("__key__", "its first member")
        yield RecordError(f"{piece.path}: the shard breaks off after {place}: {error}", "file_truncated"), ":end"
        return
    if sample:
        yield sample, f":{sample['__key__']}"


def _add_member(sample: dict[str, Any], suffix: str, member: tarfile.TarInfo, stream: BinaryIO, path: str) -> None:
    kind = PurePosixPath(suffix).suffix.removeprefix(".") or suffix
    if kind in IMAGE_SUFFIXES:
        sample.setdefault("__images__", []).append(ImageRef("", "span", member.offset_data, member.size))
    elif kind in ("txt", "json"):
        stream.seek(member.offset_data)
        content = stream.read(member.size)
        if len(content) < member.size:
            raise EOFError(f"{member.name} is cut short")
        sample[kind] = _decode_member(content, kind, f"{path}:{sample['__key__']}")


def _decode_member(content: bytes, kind: str, place: str) -> Any:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return RecordError(f"{place}.{kind}: not UTF-8 (byte {error.start})", "not_utf8")
    return text if kind == "txt" else _parse_line(text, f"{place}.json")


def _cut_parquet(path: str) -> Iterator[Piece]:
    """Whole row groups, for those are what can be read alone."""
    import pyarrow.parquet as pq

    with open_binary(path) as stream:
        metadata = pq.ParquetFile(stream).metadata
        groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    first = pending = 0
    for index, rows in enumerate(groups):
        pending += rows
        if pending and (pending >= PIECE_RECORDS or index == len(groups) - 1):
            share = file_size(path) * pending // metadata.num_rows
            yield Piece("parquet", path, first, pending, size=share)
            first, pending = first + pending, 0


def _read_parquet(piece: Piece) -> Iterator[Entry]:
    import pyarrow.parquet as pq

    with open_binary(piece.path) as stream:
        file = pq.ParquetFile(stream)
        start = 0
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if piece.first <= start < piece.first + piece.count:
                yield from _cells(file.schema_arrow, partial(file.read_row_group, group), start)
            start += rows


def _cut_arrow(path: str) -> Iterator[Piece]:
    rows = arrow_table(path).num_rows
    for first in range(0, rows, PIECE_RECORDS):
        count = min(PIECE_RECORDS, rows - first)
        yield Piece("arrow", path, first, count, size=file_size(path) * count // rows)


def _read_arrow(piece: Piece) -> Iterator[Entry]:
    table = arrow_table(piece.path).slice(piece.first, piece.count)
    yield from _cells(table.schema, table.select, piece.first)


def _cells(schema: Any, read: Callable[..., Any], first: int) -> Iterator[Entry]:
    """Rows as records. Bytes of pictures stay where they are: their columns become references to cells."""
    pictures = [field.name for field in schema if holds_pictures(field)]
    plain = read([field.name for field in schema if field.name not in pictures]).to_pylist()
    cells = {name: _references(read([name]).column(name), name, first) for name in pictures}
    for offset in range(len(next(iter(cells.values()))) if cells else len(plain)):
        record = dict(plain[offset]) if plain else {}
        record.update({name: values[offset] for name, values in cells.items()})
        yield record, f"[{first + offset}]"


def _references(column: Any, name: str, first: int) -> list[Any]:
    """For each row of a column of pictures: a reference, a path, None, or a list of them. No bytes are copied."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows: list[Any] = []
    for chunk in column.chunks:
        row = first + len(rows)
        if not pa.types.is_list(chunk.type):
            rows += [_reference(value, row + index, 0, name) for index, value in enumerate(_held(chunk))]
            continue
        values = iter(_held(chunk.flatten()))
        for index, count in enumerate(pc.list_value_length(chunk).to_pylist()):
            rows.append([_reference(next(values), row + index, element, name) for element in range(count or 0)])
    return rows


def _held(pictures: Any) -> list[Any]:
    """What each cell has: True for bytes, a path, or None."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_struct(pictures.type):
        return [held or None for held in pc.is_valid(pictures).to_pylist()]
    inside = pc.is_valid(pc.struct_field(pictures, "bytes")).to_pylist()
    paths = pc.struct_field(pictures, "path").to_pylist()
    return [True if held else path for held, path in zip(inside, paths)]


def _reference(held: Any, row: int, element: int, name: str) -> Any:
    return ImageRef("", "cell", row, element, name) if held is True else held


def holds_pictures(field: Any) -> bool:
    """Whether an Arrow column is `datasets`' Image feature ({bytes, path}), a list of them, or plain bytes."""
    import pyarrow as pa

    kind = field.type.value_type if pa.types.is_list(field.type) else field.type
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(index).name for index in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


CONTAINERS.register("json")(Container(_cut_json, _read_json, binary=False))
CONTAINERS.register("jsonl")(Container(_cut_jsonl, _read_jsonl, binary=False))
CONTAINERS.register("tar")(Container(_cut_tar, _read_tar))
CONTAINERS.register("parquet")(Container(_cut_parquet, _read_parquet))
CONTAINERS.register("arrow")(Container(_cut_arrow, _read_arrow))
