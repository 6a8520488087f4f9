import json
from pathlib import Path

import pytest

from llava_train import export
from llava_train.demo import easy_vqa
from llava_train.demo.run import BACKBONES, _forget_finished, run_demo, write_data
from llava_train.model.llm import load_llm, load_tokenizer
from llava_train.model.towers.loading import load_vision_tower
from scripts import check_demo

pytest.importorskip("easy_vqa")


def test_the_backbones_are_small_and_load_strictly() -> None:
    size = sum(path.stat().st_size for path in BACKBONES.rglob("*.safetensors"))
    assert size <= 8 * 2**20
    tower, llm = load_vision_tower(str(BACKBONES / "vision")), load_llm(str(BACKBONES / "llm"), "sdpa")
    assert tower.config.model_type == "clip_vision_model"
    assert llm.config.model_type == "llama"
    assert "generation" in load_tokenizer(str(BACKBONES / "llm")).chat_template


def test_the_data_is_the_official_split(tmp_path: Path) -> None:
    data = write_data(tmp_path)
    records = {name: json.loads(data[name].read_text()) for name in ("captions", "questions", "test")}
    assert len(records["test"]) == 9673
    turns = sum(len(record["conversations"]) // 2 for record in records["questions"])
    assert turns <= 38575
    assert len(list(data["train_images"].glob("*.png"))) == 4000
    assert len(list(data["test_images"].glob("*.png"))) == 1000
    assert write_data(tmp_path / "again")["captions"].read_bytes() == data["captions"].read_bytes()
    assert len({record["id"] for record in records["test"]}) == 9673


def test_captions_come_from_questions_alone() -> None:
    items = [
        easy_vqa.Question(0, "is there a red shape?", "no"),
        easy_vqa.Question(0, "what color is the shape?", "blue"),
        easy_vqa.Question(0, "is there not a circle?", "no"),
    ]
    assert easy_vqa.scene_of(items) == easy_vqa.Scene("circle", "blue")
    assert easy_vqa.scene_of(items[:1]).color is None


@pytest.mark.slow(reason="both stages at a tenth of their length, with the real backbones")
def test_the_whole_road_quickly(tmp_path: Path) -> None:
    report = run_demo(tmp_path / "demo", quick=True)
    assert report["test_questions"] == 512
    assert set(report) >= {
        "test_accuracy",
        "shuffled_accuracy",
        "constant_accuracy",
        "seconds",
        "peak_memory_mb",
        "export",
    }
    assert json.loads((tmp_path / "demo" / "report.json").read_text()) == report
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count('<div class="card">') == 10
    assert page.count("data:image/png") == 11
    # The pictures must already matter after a tenth of the way.
    assert report["test_accuracy"] > report["shuffled_accuracy"] + 0.05
    # Stage 1 speaks the `plain` template, which says nothing without a picture: its export must stand that.
    export(tmp_path / "demo" / "stage1", tmp_path / "stage1-hf", dtype="float32")
    _forget_finished(tmp_path / "demo")
    assert not (tmp_path / "demo" / "stage1").exists()
    assert (tmp_path / "demo" / "hf").exists()


def test_promises_are_checked(tmp_path: Path) -> None:
    report = {
        "test_accuracy": 0.98,
        "shuffled_accuracy": 0.69,
        "constant_accuracy": 0.67,
        "test_questions": 9673,
        "seconds": {"total": 200},
    }
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    assert check_demo.main([str(path)]) == 0
    for change in (
        {"test_accuracy": 0.96},
        {"shuffled_accuracy": 0.71},
        {"test_questions": 512},
        {"seconds": {"total": 700}},
    ):
        path.write_text(json.dumps({**report, **change}))
        assert check_demo.main([str(path)]) == 1
