"""Parquet and Arrow files: every cell is found again; what is damaged is named and ends nothing."""

import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_train.data.pictures.media import Media, located
from llava_train.data.reading import find_format, read_entries, read_samples
from llava_train.data.records import tables
from llava_train.data.records.containers import CONTAINERS, detect_container
from llava_train.data.sample import ImageRef, Sample
from llava_train.errors import DataError, RecordError
from tests.data.records.test_containers import entries, png, written


def write_table(path: Path, table: pa.Table, rows: int) -> Path:
    """`table` as the suffix says, cut every `rows` rows."""
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
    elif path.stem == "stream":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    return path


TABLES = ["a.parquet", "stream.arrow", "file.arrow"]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LARGE = pa.struct([("path", pa.large_string()), ("bytes", pa.large_binary())])


def cell(number: int, kind: str) -> Any:
    """A picture, a path, or nothing, in turn."""
    if number % 3 == 1:
        return None if kind == "plain" or number % 2 else {"bytes": None, "path": f"{number}.png"}
    return png(number) if kind == "plain" else {"bytes": png(number), "path": "told.png"}


COLUMNS = {
    "binary": (pa.binary(), "plain"),
    "large_binary": (pa.large_binary(), "plain"),
    "binary_view": (pa.binary_view(), "plain"),
    "struct": (STRUCT, "struct"),
    "large_struct": (LARGE, "struct"),
    "list_of_binary": (pa.list_(pa.binary()), "plain"),
    "list_of_struct": (pa.list_(STRUCT), "struct"),
    "large_list": (pa.large_list(LARGE), "struct"),
    "fixed_list": (pa.list_(STRUCT, 2), "struct"),
}


def column_values(name: str, rows: int) -> list[Any]:
    kind, content = COLUMNS[name]
    if not tables._is_list(kind):
        return [cell(row, content) for row in range(rows)]
    sizes = [2 if name == "fixed_list" else row % 4 for row in range(rows)]
    return [None if row % 7 == 5 else [cell(row + n, content) for n in range(size)] for row, size in enumerate(sizes)]


@pytest.mark.parametrize("file", TABLES)
@pytest.mark.parametrize("name", COLUMNS)
def test_every_cell_of_every_row_is_found_again(tmp_path: Path, file: str, name: str) -> None:
    if (name, file) == ("binary_view", "a.parquet"):
        pytest.skip("Parquet has no views")
    kind, content = COLUMNS[name]
    values = column_values(name, 40)
    columns = {"id": pa.array(range(45)), "image": pa.array([*column_values(name, 45)], kind)}
    table = pa.table(columns).slice(0, 40)
    path = str(write_table(tmp_path / file, table, 7))
    found = entries(path)
    assert [place for _, place in found] == [f"[{row}]" for row in range(40)]
    for row in random.Random(0).sample(range(40), 40):  # random access, across row groups
        record = found[row][0]
        assert record["id"] == row
        held = record["image"] if isinstance(record["image"], list) else [record["image"]]
        wanted = values[row] if isinstance(values[row], list) else [values[row]]
        assert len(held) == len(wanted)
        for ref, value in zip(held, wanted):
            if isinstance(ref, ImageRef):
                inside = value if content == "plain" else value["bytes"]
                assert tables.cell_bytes(located(ref, path, Path())) == inside
            else:
                assert ref == (value["path"] if isinstance(value, dict) else value)


@pytest.mark.parametrize("file", TABLES)
def test_pieces_of_a_table_are_its_rows_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.setattr("llava_train.data.records.containers.PIECE_RECORDS", 6)
    path = str(write_table(tmp_path / file, pa.table({"id": list(range(50))}), 4))
    container = CONTAINERS[detect_container(path)]
    pieces = list(container.cut(path))
    assert len(pieces) > 5 and sum(piece.count for piece in pieces) == 50
    for piece in pieces:
        assert [record["id"] for record, _ in container.read(piece)] == list(range(50))[piece.first :][: piece.count]


@pytest.mark.parametrize("file", TABLES)
def test_an_empty_table_holds_no_record(tmp_path: Path, file: str) -> None:
    path = write_table(tmp_path / file, pa.table({"id": pa.array([], pa.int64())}), 4)
    assert entries(path) == []
    with pytest.raises(DataError, match="holds no record"):
        find_format(str(path))


@pytest.mark.parametrize("file", TABLES)
def test_tables_that_break_off_are_named(tmp_path: Path, file: str) -> None:
    content = write_table(tmp_path / file, pa.table({"id": list(range(50))}), 4).read_bytes()
    for end in [*range(8, len(content), 61), len(content) - 1, len(content) - 8]:
        path = written(tmp_path, content[:end], f"cut{end}{Path(file).suffix}")
        with pytest.raises(DataError, match="cut"):
            entries(path)


@pytest.mark.parametrize("file", TABLES)
def test_damaged_tables_never_end_the_reader(tmp_path: Path, file: str) -> None:
    rows = [{"id": n, "text": "é" * n, "image": {"bytes": png(n), "path": None}} for n in range(20)]
    schema = pa.schema([("id", pa.int64()), ("text", pa.string()), ("image", STRUCT)])
    content = write_table(tmp_path / file, pa.Table.from_pylist(rows, schema), 4).read_bytes()
    generator = random.Random(1)
    outcomes = set()
    for number in range(80):
        body = bytearray(content)
        for _ in range(4):
            body[generator.randrange(8, len(body))] = generator.randrange(256)
        path = str(written(tmp_path, bytes(body), f"d{number}{Path(file).suffix}"))
        try:
            for record, _ in read_entries(path):
                if isinstance(record["image"], ImageRef):
                    tables.cell_bytes(located(record["image"], path, Path()))
            outcomes.add("read")
        except DataError as error:
            assert f"d{number}" in str(error)
            outcomes.add("named")
    assert outcomes == {"read", "named"}


def test_text_that_is_not_utf8_is_the_fault_of_its_row(tmp_path: Path) -> None:
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")
    text = pa.StringArray.from_buffers(3, offsets, data)
    path = write_table(tmp_path / "a.parquet", pa.table({"text": text}), 10)
    records = [record for record, _ in entries(path)]
    assert records[0] == {"text": "a"} and records[2] == {"text": "c"}
    assert str(records[1]["text"]).startswith(f"{path}[1]: column text: not UTF-8")


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for number in (1, 2):
        write_table(path, pa.table({"image": [png(number)]}), 4)
        os.utime(path, ns=(number, number))
        assert tables.cell_bytes(ImageRef(str(path), "cell", 0, 0, "image")) == png(number)
    for wrong in (ImageRef(str(path), "cell", 9, 0, "image"), ImageRef(str(path), "cell", 0, 0, "none")):
        with pytest.raises(RecordError, match="no such cell"):
            tables.cell_bytes(wrong)


def test_a_dict_of_lists_is_a_list_of_turns(tmp_path: Path) -> None:
    turns = {"from": ["human", "gpt"], "value": ["Hi", "Hello"]}
    path = write_table(tmp_path / "a.parquet", pa.Table.from_pylist([{"conversations": turns}]), 4)
    assert find_format(str(path)) == "llava"
    (sample,) = read_samples(str(path), Media(tmp_path))
    assert isinstance(sample, Sample) and [turn.text for turn in sample.turns] == ["Hi", "Hello"]
