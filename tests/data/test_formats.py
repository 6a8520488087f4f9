import json
from pathlib import Path
from typing import Any

import pytest

from llava_train.data.formats import FORMATS, parse_llava, read_samples
from llava_train.data.sample import ImageRef
from llava_train.errors import DataError


def record(*values: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "a", "conversations": turns, **fields}


def test_the_image_moves_to_the_front_of_its_turn() -> None:
    sample = parse_llava(record("What is it? <image>", "A cat.", image="a.png"), "x[0]")
    assert sample.turns[0].parts == (ImageRef("a.png"), "\nWhat is it?")
    assert [image.path for image in sample.images] == ["a.png"]


def test_an_opening_answer_is_dropped() -> None:
    values = {"conversations": [{"from": "gpt", "value": "Hello"}, *record("Hi", "Yes")["conversations"]]}
    assert [turn.role for turn in parse_llava(values, "x").turns] == ["user", "assistant"]


def test_several_images_stay_where_they_stand() -> None:
    sample = parse_llava(record("<image> and <image>?", "Two.", image=["a.png", "b.png"]), "x")
    assert sample.turns[0].parts == (ImageRef("a.png"), " and ", ImageRef("b.png"), "?")


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ([], "must be an object"),
        ({"id": "a"}, "has no turns"),
        ({"id": "a", "conversations": []}, "has no turns"),
        ({"id": "a", "conversations": [{"from": "gpt", "value": "only"}]}, "has no turns"),
        (record("hi"), "ends without an answer"),
        (record("hi", " "), "an answer is empty"),
        (record("<image>", "x"), "1 <image> markers in the text but 0 images"),
        (record("hi", "x", image="a.png"), "0 <image> markers in the text but 1 images"),
        (record("hi", "<image> x", image="a.png"), "an image stands in a turn of the assistant"),
        (record("hi", "x", image=3), "must be a path"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "from 'robot'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "text 'value'"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}, "turn 1"),
    ],
)
def test_broken_records_are_named(broken: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        parse_llava(broken, "file.json[7]")
    assert "file.json[7]" in str(caught.value)


def test_json_and_jsonl_give_the_same_samples(tmp_path: Path) -> None:
    rows = [record("hi", "yes"), record("<image>", "x", image="a.png")]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    both = [[s.turns for s in read_samples(tmp_path / name)] for name in ("a.json", "a.jsonl")]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", b"[]", "holds no record"),
        ("a.json", b"", "not JSON"),
        ("a.json", b"{}", "list of records"),
        ("a.json", b'[{"x": 1}]', "format not recognised"),
        ("a.jsonl", b"", "holds no record"),
        ("a.jsonl", b"{]\n", r"a\.jsonl:1:2"),
        ("a.jsonl", b"\xff\xfe\n", "not UTF-8"),
    ],
)
def test_files_that_hold_nothing_useful(tmp_path: Path, name: str, text: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(text)
    with pytest.raises(DataError, match=expected):
        list(read_samples(tmp_path / name))
    with pytest.raises(DataError, match="no such file"):
        list(read_samples(tmp_path / "none.json"))


def test_registry_names() -> None:
    assert "llava" in FORMATS
