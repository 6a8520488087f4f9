"""Weight names of exports against the loading code of back ends that run on no CPU: needs their wheels."""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_train import load_model
from llava_train.exporters.table import TARGETS
from llava_train.exporters.target import Request
from llava_train.model.checkpoint import merged
from tests.conftest import REPOSITORY

WHEELS = os.environ.get("LLAVA_TRAIN_WHEELS")
pytestmark = pytest.mark.skipif(
    not WHEELS, reason="LLAVA_TRAIN_WHEELS names no folder with wheels; scripts/prove_backends.py downloads them"
)


@pytest.fixture(scope="module")
def written(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `hf` and `llava` write; their proofs are other tests'."""
    folder = tmp_path_factory.mktemp("written")
    for name in ("hf", "llava"):
        (folder / name).mkdir()
        TARGETS[name].write(merged(load_model(finished)), folder / name, Request(torch.float32))
    return folder


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, Path]:
    """A back end's script, and its wheel."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "backends"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    wheel = importlib.import_module("wheels").find_wheel(name, module.VERSION, Path(str(WHEELS)))
    return module, wheel


def is_complete(found: dict[str, Any]) -> bool:
    return found["placed"] == found["of"] > 20 and not found["unplaced"] and not found["unfilled"]


def test_lmdeploy_has_a_place_for_each_weight(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lmdeploy, wheel = script("lmdeploy", monkeypatch)
    assert is_complete(lmdeploy.placed(wheel, written / "hf", "LlavaForConditionalGeneration"))


def test_lmdeploy_has_no_place_for_names_as_transformers_saves_them(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lmdeploy, wheel = script("lmdeploy", monkeypatch)
    tensors = load_file(written / "hf" / "model.safetensors")
    flat = {name.replace("vision_tower.vision_model.", "vision_tower."): tensor for name, tensor in tensors.items()}
    save_file(flat, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((written / "hf" / "config.json").read_text())
    found = lmdeploy.placed(wheel, tmp_path, "LlavaForConditionalGeneration")
    assert found["unplaced"] and found["unfilled"]


def test_sglang_has_a_place_for_each_weight_of_the_original_layout(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sglang, wheel = script("sglang", monkeypatch)
    assert is_complete(sglang.placed(wheel, written / "llava"))


def test_sglang_refuses_transformers_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    sglang, wheel = script("sglang", monkeypatch)
    assert "default" in sglang.strategy_refusal(wheel)
    assert sglang.registered(wheel) >= {"LlavaLlamaForCausalLM", "PixtralVisionModel"}
    assert not sglang.registered(wheel) & {*sglang.TOWERS}
