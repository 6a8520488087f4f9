import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_train import load_model, load_recipe
from llava_train.data.batch import ImageReader
from llava_train.errors import DataError
from llava_train.exporters.held_out import HeldOut, _row, cost, find, measure
from llava_train.inference import shape_of
from llava_train.model.assemble import Assembly
from llava_train.training.material import prepare


@pytest.fixture(scope="module")
def model(finished: Path) -> Assembly:
    return load_model(finished)


def own(finished: Path, limit: int = 500) -> HeldOut:
    held = find(finished, limit=limit)
    assert isinstance(held, HeldOut)
    return held


def test_a_run_brings_the_records_it_held_out(finished: Path) -> None:
    prepared = prepare(load_recipe(finished / "recipe.yaml"))
    places = {prepared.validation.place(row) for row in prepared.validation_rows}
    held = own(finished)
    assert {sample.place for sample in held.samples} == places
    assert held.data == "held out by run"
    assert len(own(finished, limit=2).samples) == 2


def test_a_file_comes_before_them(finished: Path, parts: Path) -> None:
    held = find(finished, parts / "data" / "data.json", limit=7)
    assert isinstance(held, HeldOut)
    assert [sample.id for sample in held.samples] == [f"r{number}" for number in range(7)]
    assert held.data == "data.json"  # it goes into the report, which leaves this machine


def test_a_damaged_record_of_a_file_is_named(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps([{"id": "r0", "conversations": []}]))
    with pytest.raises(DataError, match=r"bad\.json\[0\]"):
        find(finished, tmp_path / "bad.json")


def test_a_picture_that_is_missing_is_told_of_its_record(finished: Path, tmp_path: Path, model: Assembly) -> None:
    turns = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Ho"}]
    (tmp_path / "gone.json").write_text(json.dumps([{"id": "r0", "image": "no.png", "conversations": turns}]))
    held = find(finished, tmp_path / "gone.json")
    assert isinstance(held, HeldOut)
    with pytest.raises(DataError, match=r"gone\.json\[0\] \(id r0\): .*no\.png: no such image"):
        measure(model, held)


def test_why_there_are_none(finished: Path, tmp_path: Path, model: Assembly) -> None:
    held = find(finished / "final")
    assert held == "no held-out records: give --held-out FILE"
    assert cost(model, held, None) == {"held_out": None, "held_out_reason": held}
    recipe = (finished / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(recipe.replace("validation_fraction: 0.2", "validation_fraction: 0.0"))
    assert find(tmp_path) == "the run held no records out: give --held-out FILE"
    (tmp_path / "recipe.yaml").write_text(recipe.replace("data.json", "gone.json"))
    assert "gone.json" in str(find(tmp_path))


def test_the_loss_is_of_the_tokens_that_training_supervises(finished: Path, model: Assembly) -> None:
    prepared = prepare(load_recipe(finished / "recipe.yaml"))
    rows = {prepared.validation.place(row): prepared.validation.row(int(row)) for row in prepared.validation_rows}
    reader = ImageReader(shape_of(model.spec, model.image_processor))
    ((media, samples),) = own(finished).sources
    alike = 0
    for sample in samples:
        ours, theirs = _row(model, sample, reader.read(sample.images, media)), rows[sample.place]
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
        if len(sample.turns) == 2:
            alike += 1
            assert ours.labels.tolist() == theirs.labels.tolist()
        else:  # training supervises every answer
            last = len(ours.labels) - (ours.labels != -100).argmax()
            assert ours.labels[-last:].tolist() == theirs.labels[-last:].tolist()
            assert (theirs.labels != -100).sum() > (ours.labels != -100).sum() > 0
    assert alike


def test_the_loss_is_a_mean_over_tokens(finished: Path, model: Assembly) -> None:
    held = own(finished)
    ((media, samples),) = held.sources
    sums = [(0.0, 0)]
    reader = ImageReader(shape_of(model.spec, model.image_processor))
    for sample in samples:
        pictures = reader.read(sample.images, media)
        row = _row(model, sample, pictures)
        pixels = {"pixel_values": torch.cat([picture.pixels for picture in pictures])} if pictures else {}
        with torch.inference_mode():
            output = model.model(
                input_ids=torch.from_numpy(row.input_ids)[None], labels=torch.from_numpy(row.labels)[None], **pixels
            )
        count = int((row.labels != -100).sum())
        sums.append((float(output.loss) * count, count))
    expected = sum(total for total, _ in sums) / sum(count for _, count in sums)
    assert math.isclose(measure(model, held)["loss"], expected, rel_tol=1e-4)


def test_what_a_damaged_model_lost_is_told(finished: Path) -> None:
    assembly, held = load_model(finished), own(finished)
    before = measure(assembly, held)
    with torch.no_grad():
        assembly.model.lm_head.weight.neg_()
    assembly.model.to(torch.bfloat16)
    found = cost(assembly, held, {**before, "exact_match": 1.0})["held_out"]
    assert found["records"] == len(held.samples) == before["records"]
    assert (found["metric"], found["before"], found["after"], found["drop"]) == ("exact_match", 1.0, 0.0, 1.0)
    assert found["loss"]["rise"] == found["loss"]["after"] - found["loss"]["before"] > 0.1


def test_long_answers_are_judged_by_their_loss(finished: Path, model: Assembly) -> None:
    ((media, samples),) = own(finished, limit=2).sources
    long = [
        replace(sample, turns=(*sample.turns[:-1], replace(sample.turns[-1], parts=("one two three four five six",))))
        for sample in samples
    ]
    held = HeldOut("long", ((media, tuple(long)),))
    before = measure(model, held)
    assert "exact_match" not in before
    found = cost(model, held, {**before, "loss": before["loss"] - 0.5})["held_out"]
    assert found["metric"] == "loss"
    assert math.isclose(found["drop"], 0.5, rel_tol=1e-3)
