"""Parquet and Arrow files: rows as records, and the bytes of one cell. No picture is copied to read its record."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Any

from llava_train.data.sample import ImageRef
from llava_train.errors import DataError, RecordError
from llava_train.storage import file_stamp, is_remote, open_binary

Row = tuple[Any, str]
_BATCH = 256
_BUFFER = 1 << 20
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


@contextmanager
def _readable(path: str, kind: str) -> Iterator[None]:
    """What Arrow's readers raise in the body is a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # ArrowInvalid, OSError, NotImplementedError, UnicodeDecodeError, ...
        raise DataError(f"{path}: no readable {kind} file (damaged, or not copied whole?): {error}") from error


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    """The reader of a Parquet file, which reads a little at a time: a row group may be larger than memory.

    Read it without threads: one that waits for Python when the process ends brings it down.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_binary(path) as stream, _readable(path, "parquet"):
        source = stream if is_remote(path) else pa.OSFile(path)
        with pq.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False) as file:
            yield file


def parquet_groups(path: str) -> list[int]:
    """Rows of each row group, from the file's end. Raises DataError where that cannot be read."""
    return list(_groups(path, file_stamp(path)))


@lru_cache(maxsize=64)
def _groups(path: str, stamp: tuple[int, ...]) -> tuple[int, ...]:
    with _parquet(path) as file:
        return tuple(file.metadata.row_group(index).num_rows for index in range(file.num_row_groups))


def parquet_rows(path: str, first: int, count: int) -> Iterator[Row]:
    """The records of the row groups that begin within `count` rows from `first` on, and their places ("[12]")."""
    starts = accumulate(parquet_groups(path), initial=0)
    groups = [group for group, start in enumerate(starts) if first <= start < first + count]
    with _parquet(path) as file:
        row = first
        held = [group for group in groups if group < file.num_row_groups]  # fewer where the file changed
        for batch in file.iter_batches(_BATCH, row_groups=held, use_threads=False):
            yield from _records(batch, row, path)
            row += len(batch)


def arrow_rows(path: str, first: int, count: int) -> Iterator[Row]:
    """`count` records of an Arrow file from row `first` on, and their places."""
    with _readable(path, "arrow"):
        row = first
        for batch in arrow_table(path).slice(first, count).to_batches(_BATCH):
            yield from _records(batch, row, path)
            row += len(batch)


def arrow_table(path: str) -> Any:
    """The memory-mapped table of an Arrow file, in either of its two layouts (`datasets` writes the stream).

    Raises DataError where it is damaged or breaks off.
    """
    return _fetched(path) if is_remote(path) else _mapped(path, file_stamp(path))


@lru_cache(maxsize=1024)
def _mapped(path: str, stamp: tuple[int, ...]) -> Any:
    return _table(path)


@lru_cache(maxsize=1)
def _fetched(path: str) -> Any:
    """A remote file, whole in memory."""
    return _table(path)


def _table(path: str) -> Any:
    import pyarrow as pa

    with open_binary(path) as stream, _readable(path, "arrow"):
        source = pa.BufferReader(stream.read()) if is_remote(path) else pa.memory_map(path)
        whole = source.read_buffer()
        if whole[:6].to_pybytes() == b"ARROW1":
            table = pa.ipc.open_file(source).read_all()
        else:
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
            if whole[-8:].to_pybytes() != _STREAM_END:
                raise DataError(f"{path}: breaks off after row {len(table) - 1}")
        table.validate(full=True)  # an offset out of range would end the process when it is followed
        return table


def _records(batch: Any, first: int, path: str) -> Iterator[Row]:
    """Rows as records; columns of pictures become references to their cells."""
    names = batch.schema.names
    columns = [
        _references(column, name, first) if holds_pictures(column.type) else _values(column, f"{path}[", name, first)
        for name, column in zip(names, batch.columns)
    ]
    for offset, values in enumerate(zip(*columns)):
        yield dict(zip(names, values)), f"[{first + offset}]"


def _values(column: Any, head: str, name: str, first: int) -> list[Any]:
    """Python values; a RecordError in the place of one that has none (text that is not UTF-8, a date out of range)."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except (ValueError, OverflowError):
        return [_value(cell, f"{head}{first + row}]: column {name}") for row, cell in enumerate(column)]


def _value(cell: Any, told: str) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return RecordError(f"{told}: not UTF-8 (byte {error.start})", "not_utf8")
    except (ValueError, OverflowError) as error:
        return RecordError(f"{told}: {error}", "malformed")


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def holds_pictures(kind: Any) -> bool:
    """Whether an Arrow type is that of `datasets`' Image feature ({bytes, path}), a list of them, or plain bytes."""
    import pyarrow as pa

    kind = kind.value_type if _is_list(kind) else kind
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(index).name for index in range(kind.num_fields)}
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


def _references(column: Any, name: str, first: int) -> list[Any]:
    """For each row of a column of pictures: a reference, a path, None, or a list of them."""
    if not _is_list(column.type):
        return [_reference(held, first + row, 0, name) for row, held in enumerate(_held(column))]
    values = iter(_held(column.flatten()))  # without what null rows hide
    counts = column.value_lengths().to_pylist()
    return [
        None if count is None else [_reference(next(values), first + row, at, name) for at in range(count)]
        for row, count in enumerate(counts)
    ]


def _held(pictures: Any) -> list[Any]:
    """What each cell has: True for bytes, a path, or None."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_struct(pictures.type):
        return [held or None for held in pictures.is_valid().to_pylist()]
    inside = pc.struct_field(pictures, "bytes").is_valid().to_pylist()
    paths = pc.struct_field(pictures, "path").to_pylist()
    return [True if held else path for held, path in zip(inside, paths)]


def _reference(held: Any, row: int, element: int, name: str) -> Any:
    return ImageRef("", "cell", row, element, name) if held is True else held


def cell_bytes(ref: ImageRef) -> bytes:
    """The bytes a `cell` reference names: one row group is read and kept for its neighbours.

    Raises RecordError "image_missing" where there are none.
    """
    import pyarrow as pa

    stamp = file_stamp(ref.path)
    try:
        if _is_parquet(ref.path, stamp):
            starts = list(accumulate(_groups(ref.path, stamp), initial=0))
            group = bisect_right(starts[:-1], ref.at) - 1
            value = _group_column(ref.path, group, ref.column, stamp)[ref.at - starts[group]]
        else:
            value = arrow_table(ref.path).column(ref.column)[ref.at]
        value = value.values[ref.size] if _is_list(value.type) else value
        held = value["bytes"].as_py() if pa.types.is_struct(value.type) else value.as_py()
    except (LookupError, TypeError, pa.ArrowInvalid) as error:
        raise RecordError(
            f"{_cell_name(ref)}: there is no such cell: has the file changed?", "image_missing"
        ) from error
    if not isinstance(held, bytes):
        raise RecordError(f"{_cell_name(ref)}: holds no picture", "image_missing")
    return held


def _cell_name(ref: ImageRef) -> str:
    return f"{ref.path} (row {ref.at}, column {ref.column})"


@lru_cache(maxsize=256)
def _is_parquet(path: str, stamp: tuple[int, ...]) -> bool:
    with open_binary(path) as stream:
        return stream.read(4) == b"PAR1"


@lru_cache(maxsize=2)
def _group_column(path: str, group: int, column: str, stamp: tuple[int, ...]) -> Any:
    with _parquet(path) as file:
        table = file.read_row_group(group, columns=[column], use_threads=False)
    return table.column(column)
