"""What `inspect` shows, in the terminal and as a page."""

import json
import re
from pathlib import Path

import pytest

from llava_train import load_recipe, prepare
from llava_train.cli import main
from llava_train.errors import RecipeError, RecordError
from llava_train.inspection import Choice, choose, inspect, runs
from llava_train.training.material import sources_of
from tests import tiny


@pytest.fixture
def recipe(workplace: Path):
    tiny.make_data(workplace / "more", 6, "more.json")
    sources = [{"path": f"{workplace}/data/data.json"}, {"path": f"{workplace}/more/more.json", "name": "more"}]
    return load_recipe(tiny.make_recipe(workplace, data__train=sources))


def chosen(recipe, **choice: object) -> list[str]:
    return [f"{row.source}:{row.id}" for row in choose(recipe, sources_of(recipe), Choice(**choice))]


def test_records_are_chosen(recipe, workplace: Path) -> None:
    first = f"{workplace}/data/data.json"
    assert chosen(recipe, n=2) == [f"{first}:r0", f"{first}:r1"]
    assert chosen(recipe, id="r3") == [f"{first}:r3", "more:r3"]
    assert chosen(recipe, id="r3", source="more") == ["more:r3"]
    assert len(chosen(recipe)) == 30
    longest = list(choose(recipe, sources_of(recipe), Choice(n=3, longest=True)))
    lengths = prepare(recipe).train.lengths
    assert [len(row.input_ids) for row in longest] == sorted(lengths, reverse=True)[:3]
    assert len(set(chosen(recipe, n=30, random=True))) == 30
    assert chosen(recipe, n=2, random=True, source="more")[0].startswith("more:")
    with pytest.raises(RecipeError, match="did you mean 'more'"):
        chosen(recipe, source="mor")
    with pytest.raises(RecipeError, match="no record of this recipe that can be used has this id"):
        chosen(recipe, id="none")


def test_what_is_read_in_order_is_what_is_prepared(recipe) -> None:
    prepared = prepare(recipe).train
    for number, record in enumerate(inspect(recipe)):
        row = prepared.row(number)
        assert record["id"] == row.id
        assert record["input_ids"] == row.input_ids.tolist()
        assert record["labels"] == row.labels.tolist()
    assert number == 29


def test_runs_put_together_are_the_row(recipe) -> None:
    for row in choose(recipe, sources_of(recipe), Choice(n=5)):
        found = list(runs(row, sources_of(recipe)[0].encoder.image_token_id))
        assert [token for run in found for token in run.ids] == row.input_ids.tolist()
        assert sum(sum(run.image_tokens) for run in found) == sum(row.image_tokens)


def test_the_page_shows_pictures_prompt_and_what_is_supervised(workplace: Path, recipe) -> None:
    file = workplace / "data" / "data.json"
    records = json.loads(file.read_text())
    records[0]["conversations"][0]["value"] = "<image>\nIs it <b>red</b>?"
    records[1]["image"] = "gone.png"
    file.write_text(json.dumps(records))
    page = workplace / "pages" / "page.html"
    assert main(["inspect", str(workplace / "recipe.yaml"), "--n", "3", "--html", str(page)]) == 0
    text = page.read_text()
    assert text.count('<section class="record">') == 3
    assert "Is it &lt;b&gt;red&lt;/b&gt;?" in text
    assert "<b>" not in text
    assert text.count("data:image/jpeg;base64,") == 2
    assert re.search(r'class="fault">[^<]*gone\.png: no such image', text)
    assert text.count('<span class="image">image: 4 tokens</span>') == 3
    assert "<mark> It is red.&lt;/s&gt;</mark>" in text
    assert "http" not in text


def test_a_bad_record_stands_in_the_way_of_itself_alone(workplace: Path) -> None:
    file = workplace / "data" / "data.json"
    records = json.loads(file.read_text())
    records[3]["conversations"] = []
    file.write_text(json.dumps(records))
    recipe = load_recipe(tiny.make_recipe(workplace))
    assert [name.split(":")[-1] for name in chosen(recipe, n=3)] == ["r0", "r1", "r2"]
    assert [name.split(":")[-1] for name in chosen(recipe, id="r5")] == ["r5"]
    for choice in ({"n": 4}, {"id": "r3"}):
        with pytest.raises(RecordError, match="has no turns"):
            chosen(recipe, **choice)
    skipping = [{"path": str(file), "policy": "skip"}]
    recipe = load_recipe(tiny.make_recipe(workplace, data__train=skipping))
    assert [name.split(":")[-1] for name in chosen(recipe, n=4)] == ["r0", "r1", "r2", "r4"]


def test_text_cannot_act_on_the_terminal(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    file = workplace / "data" / "data.json"
    records = json.loads(file.read_text())
    records[0]["conversations"][1]["value"] = "red \x1b]0;title\x07 \x1b[2J é"
    file.write_text(json.dumps(records))
    recipe = str(tiny.make_recipe(workplace))
    assert main(["inspect", recipe, "--n", "1"]) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain and "\x07" not in plain
    assert r">> red \x1b]0;title\x07 \x1b[2J é</s><<" in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["inspect", recipe, "--n", "1"]) == 0
    assert "\x1b[32m red " in capsys.readouterr().out


def test_jsonl_shows_what_is_chosen(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(tiny.make_recipe(workplace))
    assert main(["inspect", recipe, "--jsonl", "--id", "r3"]) == 0
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == ["r3"]
    with pytest.raises(SystemExit):
        main(["inspect", recipe, "--n", "-1"])


def test_a_bad_record_is_named(workplace: Path, recipe, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "more" / "more.json").write_text('[{"id": "x", "conversations": []}]')
    with pytest.raises(RecordError, match=r"more\.json\[0\] \(id x\): has no turns"):
        list(inspect(recipe))
    assert main(["inspect", str(workplace / "recipe.yaml"), "--source", "more"]) == 2
    assert "has no turns" in capsys.readouterr().err
