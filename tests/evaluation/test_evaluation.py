from pathlib import Path

import pytest

from llava_train import evaluate, load_model
from llava_train.data.sample import ImageRef, Sample, Turn
from llava_train.errors import DataError
from llava_train.evaluation.metrics import constant_accuracy, exact_match, normalize
from llava_train.evaluation.run import _shuffled, messages_of
from llava_train.inference import message


def test_metrics() -> None:
    assert normalize(" Yes. ") == "yes"
    assert exact_match(["Yes.", "red", "no"], ["yes", "blue", "No"]) == pytest.approx(2 / 3)
    assert constant_accuracy(["q", "q", "q", "r"], ["a", "a", "b", "c"]) == 0.75


def test_every_record_is_asked_whatever_the_batch(finished: Path, parts: Path) -> None:
    assembly = load_model(finished)
    data = parts / "data" / "data.json"
    one, many = (evaluate(assembly, data, batch_size=size, max_new_tokens=3) for size in (1, 7))
    assert one.figures["records"] == 24
    assert [row["answer"] for row in one.rows] == [row["answer"] for row in many.rows]
    assert one.figures["exact_match"] == sum(row["correct"] for row in one.rows) / 24
    assert evaluate(assembly, data, limit=3, max_new_tokens=2).figures["records"] == 3


def test_shuffled_pictures_go_to_records_with_as_many() -> None:
    images = [[f"{i}"] for i in range(20)] + [[], ["a", "b"]]
    shuffled = _shuffled(images)
    assert sorted(shuffled[:20]) == sorted(images[:20])
    assert sum(a != b for a, b in zip(images, shuffled)) > 15
    assert shuffled[20:] == [[], ["a", "b"]]
    assert _shuffled(images) == shuffled


def test_a_bad_record_is_named(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('[{"id": "x", "conversations": []}]')
    with pytest.raises(DataError, match=r"d\.json\[0\]"):
        evaluate(finished, tmp_path / "d.json")


def test_pictures_side_by_side_are_asked_about_as_they_were_trained_on() -> None:
    pictures = (ImageRef("a.png"), "\n", ImageRef("b.png"), "\nWhat?")
    sample = Sample("s", (Turn("user", pictures), Turn("assistant", ("yes",))))
    assert messages_of(sample)[:-1] == (message("user", "What?", 2),)
    sample = Sample("s", (Turn("user", ("See ", ImageRef("a.png"), " here\n")), Turn("assistant", ("yes",))))
    assert messages_of(sample)[:-1] == (message("user", "See  here\n", 1),)
