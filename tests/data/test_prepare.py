import json
from pathlib import Path

import pytest

from llava_train import load_recipe, prepare
from llava_train.errors import DataError, RecipeError
from tests import tiny


def test_a_set_is_made_once_and_found_again(workplace: Path) -> None:
    recipe = load_recipe(tiny.make_recipe(workplace))
    first = prepare(recipe)
    stamps = {file: file.stat().st_mtime_ns for file in (workplace / "prepared").rglob("*")}
    again = prepare(recipe)
    assert again.train.folder == first.train.folder
    assert {file: file.stat().st_mtime_ns for file in (workplace / "prepared").rglob("*")} == stamps
    assert len(first.train) == 24
    row = first.train.row(3)
    assert (row.id, row.place) == ("r3", f"{workplace}/data/data.json[3]")
    assert len(row.input_ids) == len(row.labels) == first.train.lengths[3]
    assert [image.path for image in row.images] == ["3.png"]


@pytest.mark.parametrize("change", ["data", "template", "max_length", "image_tokens"])
def test_any_input_that_changes_makes_another_set(workplace: Path, change: str) -> None:
    path = tiny.make_recipe(workplace)
    before = prepare(load_recipe(path)).train.fingerprint
    overrides = {
        "template": ["data.template=chatml"],
        "max_length": ["data.max_length=200"],
        "image_tokens": ["model.connector=qformer", "model.connector_options={num_queries: 2}"],
    }.get(change, [])
    if change == "data":
        file = workplace / "data" / "data.json"
        file.write_text(file.read_text().replace("What colour", "Which colour"))
    assert prepare(load_recipe(path, overrides)).train.fingerprint != before


def test_all_bad_records_are_named_together(workplace: Path) -> None:
    file = workplace / "data" / "data.json"
    records = json.loads(file.read_text())
    records[0]["image"] = "nowhere.png"
    records[1]["image"] = "../data.json"
    records[2]["conversations"] = []
    records[5]["conversations"][1]["value"] = "</s>"
    (workplace / "data" / "6.png").write_text("no picture")
    file.write_text(json.dumps(records))
    with pytest.raises(DataError) as caught:
        prepare(load_recipe(tiny.make_recipe(workplace)))
    message = str(caught.value)
    assert "5 of 24 records cannot be used" in message
    for index, cause in (
        (0, "no such image"),
        (1, "leads outside"),
        (2, "has no turns"),
        (5, "control token"),
        (6, "not a"),
    ):
        assert any(f"data.json[{index}] (id r{index})" in line and cause in line for line in message.splitlines())
    assert not any((workplace / "prepared").glob("*/prepared.json"))


def test_missing_files_are_named(workplace: Path) -> None:
    path = tiny.make_recipe(workplace)
    with pytest.raises(DataError, match="no such file"):
        prepare(load_recipe(path, ["data.train=[{path: nowhere.json}]"]))
    with pytest.raises(DataError, match="no such image root"):
        prepare(load_recipe(path, [f"data.train=[{{path: '{workplace}/data/data.json', image_root: nowhere}}]"]))
    with pytest.raises(RecipeError, match="no source"):
        prepare(load_recipe(path, ["data.train=[]"]))


def test_held_out_samples_are_not_trained_on(workplace: Path) -> None:
    prepared = prepare(load_recipe(tiny.make_recipe(workplace)))
    assert len(prepared.validation_rows) == 5
    assert not set(prepared.train_rows) & set(prepared.validation_rows)
    assert sorted([*prepared.train_rows, *prepared.validation_rows]) == list(range(24))
    file = workplace / "data" / "data.json"
    recipe = load_recipe(
        tiny.make_recipe(workplace), ["data.validation_fraction=0", f"data.validation=[{{path: '{file}'}}]"]
    )
    assert len(prepare(recipe).validation_rows) == 24
