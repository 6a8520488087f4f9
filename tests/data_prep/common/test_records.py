"""Record files read and written one record at a time; pictures from the web."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.common.pictures import as_jpeg
from data_prep.common.records import count_records, read_array, write_array, write_available
from data_prep.common.transfer import FetchError
from llava_train.errors import DataError
from tests.data_prep.miniatures import picture

LIST = [{"id": 1, "text": 'brackets ], [ and "quotes" \\ ü'}, {"id": 22, "nested": [{"a": []}]}]


@pytest.mark.parametrize("indent", [None, 2])
def test_lists_and_lines_are_read(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "x.json"
    for items in (LIST, []):
        path.write_text(f"\n {json.dumps(items, indent=indent)} \n")
        assert list(read_array(path)) == items
    (tmp_path / "x.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in LIST))
    assert list(read_array(tmp_path / "x.jsonl")) == LIST


@pytest.mark.parametrize("text", ["", "{}", "[1, 2", '[{"a": 1}, {"b"', "nonsense", "[1]"])
def test_what_is_no_list_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"x\.json"):
        list(read_array(path))


def test_lists_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for items in ([], LIST):
        assert write_array(path, items) == len(items)
        assert json.loads(path.read_text()) == items

    def broken():
        yield 1
        raise DataError("stop")

    with pytest.raises(DataError):
        write_array(path, broken())
    assert json.loads(path.read_text()) == LIST
    assert list(tmp_path.iterdir()) == [path]


def test_the_available_records_are_those_with_all_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    items = [{"image": "a.jpg"}, {"image": "b.jpg"}, {"image": ["a.jpg", "b.jpg"]}, {"id": "text"}]
    write_array(tmp_path / "x.json", items)
    assert write_available(tmp_path / "x.json", tmp_path) == 2
    assert json.loads((tmp_path / "x_available.json").read_text()) == [items[0], items[3]]
    assert count_records(tmp_path / "x.json", tmp_path) == {"records": 4, "images": 2, "missing": 1}


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"<html>", "not_an_image"),
        (b"", "not_an_image"),
        (picture("GIF", size=1), "placeholder"),
        (picture("PNG", size=64)[:-40], "damaged_image"),
    ],
)
def test_what_is_no_picture_is_said_to_be_none(tmp_path: Path, content: bytes, cause: str) -> None:
    (tmp_path / "raw").write_bytes(content)
    with pytest.raises(FetchError) as raised:
        as_jpeg(tmp_path / "raw", tmp_path / "x.jpg")
    assert raised.value.cause == cause
    assert list(tmp_path.iterdir()) == []
