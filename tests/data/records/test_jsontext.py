"""JSON lists and lines: cut into records in windows of any size; what is broken is named with its place."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava_train.data.records import jsontext
from llava_train.data.records.containers import CONTAINERS, detect_container
from llava_train.errors import DataError, RecordError
from tests.data.records.test_containers import entries, faults, written


@pytest.fixture(params=[4 << 20, 64, 7], ids=["one_window", "64_bytes", "7_bytes"])
def window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(jsontext, "_CHUNK", request.param)
    return int(request.param)


VALUES: list[Any] = [
    {"id": 1, "text": "é😀\u2028 \\ \" ] } ,", "nested": [[[{"a": [1, 2.5e-7, None, True]}]]]},
    {"numbers": [0, -1, 12345678901234567890, 1e300], "empty": {}, "list": []},
    "a text", 17, None, True, [1, [2, "]"]], {"key with ] and }": "\n\t"},
]  # fmt: skip


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_list_is_cut_into_its_records(
    tmp_path: Path, window: int, indent: int | None, ascii_only: bool, ending: str
) -> None:
    text = json.dumps(VALUES, indent=indent, ensure_ascii=ascii_only).replace("\n", ending)
    for lead in ("", "\ufeff", " \r\n "):
        path = written(tmp_path, lead + text + ending)
        assert entries(path) == [(value, f"[{index}]") for index, value in enumerate(VALUES)]


@pytest.mark.parametrize("limit", [1, 3])
def test_pieces_hold_a_bounded_number_of_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(jsontext, "PIECE_RECORDS", limit)
    for name, text in (("a.json", json.dumps(VALUES)), ("a.jsonl", "\n".join(map(json.dumps, VALUES)))):
        path = str(written(tmp_path, text, name))
        pieces = list(CONTAINERS[detect_container(path)].cut(path))
        assert len(pieces) == -(-len(VALUES) // limit)
        assert [record for piece in pieces for record, _ in CONTAINERS[piece.container].read(piece)] == VALUES
        assert sum(piece.count for piece in pieces) == len(VALUES)


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ('[{"a": 1}\n {"a": 2}]', ":2:2", "a comma"),
        ('[{"a": 1},\n {"a" 2}]', ":2:7", "delimiter"),
        ('[{"a": 1},\n {"a": nope, "b": "a long text behind it"}]', ":2:8", "Expecting value"),
        ('[{"a": 1}] x', ":1:12", "follows the end"),
        ('[{"a": 1},,{"a": 2, "b": "a long text"}]', ":1:11", "Expecting value"),
        ('[{"a": "\\x", "b": "a long text behind it"}]', ":1:9", "escape"),
    ],
)
def test_broken_json_is_named_with_line_and_column(
    tmp_path: Path, window: int, text: str, place: str, reason: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(DataError, match=reason) as caught:
        entries(path)
    assert str(caught.value).startswith(f"{path}{place}: ")


def test_a_list_that_breaks_off_gives_its_whole_records(tmp_path: Path, window: int) -> None:
    text = json.dumps([{"id": index, "text": 'a \\ " é'} for index in range(5)], ensure_ascii=False)
    ends = [index for index in range(1, len(text)) if text[:index].count("}") < 5]
    for end in ends:
        cut = text[:end]
        found = entries(written(tmp_path, cut))
        assert [record["id"] for record, _ in found[:-1]] == list(range(cut.count("}")))
        fault, place = found[-1]
        assert fault.cause == "file_truncated", cut
        assert place == f"[{cut.count('}')}]"


def test_one_bad_record_of_a_list_is_one_fault(tmp_path: Path, window: int) -> None:
    bad = {
        b'{"a": "\xff\xfe"}': "not UTF-8 (character 8 of the record)",
        b'{"a": "\xf0\x9f\x98\x80 \xe9"}': "not UTF-8 (character 10",
        b'{"a": ' + b"9" * 5000 + b"}": "not JSON that can be read",
        b"[" * 30_000 + b'"]"' + b"]" * 30_000: "not JSON that can be read",
        b'{"a": "a\ttab"}': "Invalid control character",
    }
    good = b'{"b": "\xf0\x9f\x98\x80"}'
    path = written(tmp_path, b"[" + b", ".join(part for each in bad for part in (good, each)) + b"]")
    found = entries(path)
    assert [record for record, _ in found[::2]] == [{"b": "😀"}] * len(bad)
    for (fault, place), reason in zip(found[1::2], bad.values()):
        assert str(fault).startswith(f"{path}{place}: ") and reason in str(fault)
        assert fault.cause in ("not_json", "not_utf8")


def test_lines_are_records_and_bad_ones_are_faults(tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbf" + b'{"a": 1}\r', b"", b"  \r", b'{"a": "\xff"}', b'{"a" 1}', b"[" * 5000, b'{"a": 2} {"b": 3}',
        b'{"a": 3}', b"\x00", b'{"a": ' + b"1" * 5000 + b"}", b'{"a": NaN}', b'{"a": "cut of',
    ]  # fmt: skip
    path = written(tmp_path, b"\n".join(lines), "a.jsonl")
    found = entries(path)
    assert [place for _, place in found] == [":1", ":4", ":5", ":6", ":7", ":8", ":9", ":10", ":11", ":12"]
    assert [record for record, _ in found if not isinstance(record, RecordError)][:2] == [{"a": 1}, {"a": 3}]
    starts = (":4: not UTF-8", ":5:6: not JSON", ":6: not JSON", ":7:10: ", ":9:1: ", ":10: not JSON", ":12:7: ")
    for message, start in zip(faults(path), starts, strict=True):
        assert message.startswith(f"{path}{start}")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b"", "holds no record"),
        ("a.json", b"\xef\xbb\xbf \r\n", "holds no record"),
        ("a.jsonl", b"\n\n", "holds no record"),
        ("a.json", b'{\n "data": [\n {"id": 1}]}', "one object over many lines"),
        ("a.json", b'{"data": [\n {"id": 1}]}', "one object over many lines"),
        ("a.json", b'"text"', "no list of records"),
        ("a.bin", bytes(range(256)), "no list of records"),
        ("a.json.gz", b"\x1f\x8b\x08\0", "compressed"),
        ("a.tar.zst", b"(\xb5/\xfd\0", "compressed"),
        ("a.json", "[]".encode("utf-16"), "UTF-16"),
        ("a.parquet", b"PAR1" + bytes(90), "no readable parquet file"),
        ("a.arrow", b"\xff\xff\xff\xff\x10\0\0\0" + bytes(90), "no readable arrow file"),
        ("a.arrow", b"ARROW1\0\0" + bytes(90), "no readable arrow file"),
    ],
)
def test_files_that_are_no_records(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = written(tmp_path, content, name)
    with pytest.raises(DataError, match=reason) as caught:
        entries(path)
    assert str(caught.value).startswith(str(path))


def test_kinds_are_told_by_content(tmp_path: Path) -> None:
    for content, name, kind in (
        (b'[{"a": 1}]', "a.txt", "json"),
        (b'{"a": 1}', "a.json", "jsonl"),
        (b'{"a": 1}\n{"a": 2}', "b.json", "jsonl"),
        (b'{"a": 1\n{"a": 2}\n', "c.jsonl", "jsonl"),
        (b"[\n" + b'{"a": 1}]', "d.jsonl", "json"),
        (b"[1]\n" + b'{"a": 1}', "e.jsonl", "jsonl"),
    ):
        assert detect_container(str(written(tmp_path, content, name))) == kind


def test_a_long_record_takes_time_by_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of n windows is not decoded n times: what was decoded altogether is a small multiple of the file."""
    monkeypatch.setattr(jsontext, "_CHUNK", 1000)
    decoded = []
    original = jsontext.value_end
    monkeypatch.setattr(jsontext, "value_end", lambda text, at: decoded.append(len(text) - at) or original(text, at))
    path = written(tmp_path, json.dumps([{"a": "x" * 1_000_000}, {"b": 1}]))
    assert len(entries(path)) == 2
    assert sum(decoded) < 4_000_000
    decoded.clear()
    with pytest.raises(DataError, match="not JSON"):
        entries(written(tmp_path, '[{"a" 1}' + ", {}" * 400_000, "b.json"))
    assert sum(decoded) < 10_000
    monkeypatch.setattr(jsontext, "MAX_RECORD", 500_000)
    with pytest.raises(DataError, match=":1:2: a record of more than 500,000 characters"):
        entries(path)
    with pytest.raises(DataError, match=":1: a line of more than 500,000 bytes"):
        entries(written(tmp_path, '{"a": "' + "x" * 600_000, "a.jsonl"))
