"""The comparison trains both stages with each connector, says its figures, and repeats nothing that is finished."""

import json
from pathlib import Path

import pytest

from llava_train.demo import easy_vqa
from llava_train.files import read_json, write_json
from scripts import compare_connectors
from scripts.compare_connectors import DEFAULT, ROWS, main

FIGURES = {"tokens", "test_accuracy", "shuffled_accuracy", "constant_accuracy", "seconds", "parameters", "flops"}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's data, a little of them."""

    def write(folder: Path) -> dict[str, Path]:
        made = {"captions": easy_vqa.caption_records()[:80], "questions": easy_vqa.train_records()[:150]}
        for name, records in {**made, "test": easy_vqa.test_records()[:40]}.items():
            write_json(folder / f"{name}.json", records)
        files = {name: folder / f"{name}.json" for name in (*made, "test")}
        return {**files, "train_images": easy_vqa.image_folder("train"), "test_images": easy_vqa.image_folder("test")}

    monkeypatch.setattr(compare_connectors.demo, "write_data", write)


@pytest.mark.slow(reason="trains both stages twice")
def test_rows_are_compared_and_kept(
    few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--rows", "linear", "resampler", "--limit", "16", "--out", str(tmp_path), "--threads", "1"]
    assert main(asked) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    rows = json.loads(printed)
    assert list(rows) == ["linear", "resampler"]
    assert all(set(row) == FIGURES | {"stage1_loss"} for row in rows.values())
    assert {name: row["tokens"] for name, row in rows.items()} == {"linear": 16, "resampler": 4}
    # 16 positions of width 128 to an LLM of width 128, and a bias.
    assert (rows["linear"]["parameters"], rows["linear"]["flops"]) == (128 * 129, 2 * 16 * 128 * 128)
    assert all(row["seconds"] > 0 < row["stage1_loss"] for row in rows.values())
    assert all(row[key] * 16 % 1 == 0 for row in rows.values() for key in ("test_accuracy", "shuffled_accuracy"))

    def refuse(*_: object) -> None:
        raise AssertionError("what is finished is trained again")

    with monkeypatch.context() as patched:
        patched.setattr(compare_connectors.demo, "train", refuse)
        assert main(asked) == 0
        assert capsys.readouterr().out.splitlines()[-1] == printed
        (tmp_path / "linear" / "row.json").unlink()  # trained, not yet asked
        assert main(["--rows", "linear", *asked[3:]]) == 0
        with pytest.raises(AssertionError, match="trained again"):  # other settings are another run
            main([*asked, "--steps-scale", "0.5"])
    assert read_json(tmp_path / "resampler" / "row.json")["asked"]["steps_scale"] == 1.0


def test_a_row_that_fails_is_said_and_the_others_go_on(
    few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--rows", "adaptive_pool", "linear", "--limit", "4", "--out", str(tmp_path)]
    assert main([*asked, "--steps-scale", "0.5", "--", "model.connector_options={side: 9}"]) == 1
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "side: 9: the encoder gives a grid of 4 x 4 patches" in rows["adaptive_pool"]["error"]
    assert "unknown option side" in rows["linear"]["error"]


def test_the_help_lists_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in ROWS)
    assert len(DEFAULT) == 8
    for wrong in (["--steps-scale", "0"], ["--rows", "nothing"]):
        with pytest.raises(SystemExit):
            main(wrong)
