"""The script that makes the demo's backbones, for two steps each."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llava_train.model.llm import load_llm, load_tokenizer
from llava_train.model.towers.loading import load_vision_tower
from tests.conftest import REPOSITORY

pytest.importorskip("easy_vqa")


def test_two_steps_write_folders_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(REPOSITORY / "scripts"), *sys.path])
    from make_tiny_backbones import write_card
    from tiny_backbones.language import make_language_model, train_tokenizer
    from tiny_backbones.plan import Plan, split_pictures
    from tiny_backbones.vision import make_vision_tower

    plan = Plan()
    short = replace(plan.pretraining, steps=2, batch=4)
    plan = replace(plan, pretraining=short, contrastive=short)
    train, held_out = split_pictures(plan.held_out, 0)
    assert len(train) == 3600
    tokenizer = train_tokenizer(plan.vocabulary)
    figures = make_language_model(tokenizer, train, held_out[:2], plan, 0, tmp_path / "llm")
    figures |= make_vision_tower(tokenizer, train[:40], held_out[:20], plan, 0, tmp_path / "vision")
    write_card(tmp_path, plan, figures, seed=0, threads=1)
    assert load_tokenizer(str(tmp_path / "llm")).eos_token == "<|im_end|>"
    assert load_llm(str(tmp_path / "llm"), "sdpa").config.num_hidden_layers == 3
    assert load_vision_tower(str(tmp_path / "vision")).config.image_size == 64
    assert "Made by" in (tmp_path / "README.md").read_text()
