"""open_clip's models: converted ones give open_clip's own features, without open_clip in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionModel, SiglipVisionModel, ViTModel

from llava_train.errors import CheckpointError
from llava_train.model.towers.loading import load_vision_config, load_vision_tower
from llava_train.model.towers.open_clip import import_open_clip, resolve

FOLDER = os.environ.get("LLAVA_TRAIN_OPEN_CLIP")
needs_open_clip = pytest.mark.skipif(
    not FOLDER, reason="LLAVA_TRAIN_OPEN_CLIP names no folder with open_clip (scripts/test_open_clip.sh makes one)"
)
TRUNKS = ["convnext", "resnet", "registers", "qk-norm", "eva"]


def run(module: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip")
    run("tests.model.towers.open_clip_made", str(folder))
    return folder


@needs_open_clip
@pytest.mark.slow(reason="a process that imports open_clip")
@pytest.mark.parametrize(
    ("name", "kind", "activation"),
    [
        ("clip", CLIPVisionModel, "gelu"),
        ("clip-quickgelu", CLIPVisionModel, "quick_gelu"),
        ("clip-tanh", CLIPVisionModel, "gelu_pytorch_tanh"),
        ("layer-scale", CLIPVisionModel, "gelu"),
        ("coca", CLIPVisionModel, "gelu"),
        ("timm-clip", CLIPVisionModel, "gelu"),
        ("clipa", ViTModel, "gelu"),
        ("timm-vit", ViTModel, "gelu"),
        ("siglip", SiglipVisionModel, "gelu_pytorch_tanh"),
    ],
)
@torch.no_grad()
def test_converted_models_give_open_clips_features(made: Path, name: str, kind: Any, activation: str) -> None:
    tower = load_vision_tower(str(made / "converted" / name))
    assert type(tower) is kind
    assert tower.config.hidden_act == activation
    own = torch.load(made / name / "made.pt", weights_only=True)
    states = tower(own["pixels"], output_hidden_states=True).hidden_states[1:]
    assert len(states) == len(own["features"])
    for state, wanted in zip(states, own["features"]):
        patches = state[:, -wanted.shape[1] :]
        assert (patches - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))
    values = json.loads((made / "converted" / name / "preprocessor_config.json").read_text())
    assert values["image_mean"] == [0.1, 0.2, 0.3]
    assert values["image_std"] == [0.4, 0.5, 0.6]
    assert (values["resample"], values["size"]) == (2, values["crop_size"])


@needs_open_clip
@pytest.mark.slow(reason="a process that imports open_clip")
def test_what_no_class_computes_is_run_by_open_clip(made: Path) -> None:
    for name in TRUNKS:
        config = json.loads((made / "converted" / name / "config.json").read_text())
        assert config["model_type"] == "llava_train_open_clip", name
    assert run("tests.model.towers.open_clip_trunks", str(made), *TRUNKS).splitlines()[-1] == "ok"


@needs_open_clip
@pytest.mark.slow(reason="a process that imports open_clip")
def test_a_pickle_runs_nothing(made: Path) -> None:
    assert (
        "weights do not fit this architecture: Weights only load failed"
        in json.loads((made / "found.json").read_text())["evil"]
    )
    assert not (made / "canary").exists()


@needs_open_clip
@pytest.mark.slow(reason="a process that imports open_clip")
def test_published_weights_say_which_gelu_they_have(made: Path) -> None:
    found = json.loads((made / "found.json").read_text())
    assert (found["openai"]["quick_gelu"], found["laion"]["quick_gelu"]) == (True, False)
    assert found["siglip"]["mean"] == [0.5, 0.5, 0.5]
    assert found["siglip"]["resize_mode"] == found["local"]["resize_mode"] == "squash"
    assert found["local"]["mean"] == [0.5, 0.5, 0.5]


@needs_open_clip
@pytest.mark.slow(reason="a process that imports open_clip")
def test_a_local_file_is_converted_once(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_train.data.pictures.processors import build_image_processor

    monkeypatch.setenv("LLAVA_TRAIN_CACHE", str(tmp_path))
    path = f"open_clip:small/{made / 'clip' / 'w.safetensors'}"
    tower = load_vision_tower(path)
    known = load_vision_tower(str(made / "converted" / "clip"))
    assert all(torch.equal(a, b) for a, b in zip(tower.state_dict().values(), known.state_dict().values()))
    assert "open_clip" not in sys.modules
    assert "torchvision" not in sys.modules
    (folder,) = [each for each in (tmp_path / "open_clip").iterdir() if each.is_dir()]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert load_vision_config(path).model_type == "clip_vision_model"
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    processor = build_image_processor(resolve(path), "square", 32)
    pixels = processor(images=[Image.new("RGB", (40, 30), (255, 255, 255))], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([0.9 / 0.4, 0.8 / 0.5, 0.7 / 0.6]))


@needs_open_clip
@pytest.mark.slow(reason="a process that imports open_clip")
def test_unknown_models_and_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_TRAIN_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="ViT-B-32 has no weights 'mine'; open_clip has: openai"):
        resolve("open_clip:ViT-B-32/mine")


def test_a_path_that_names_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_TRAIN_CACHE", str(tmp_path))
    assert resolve("anything/else") == "anything/else"
    for path in ("open_clip:ViT-B-32", "open_clip:/tag"):
        with pytest.raises(CheckpointError, match="write open_clip:ARCH/TAG"):
            resolve(path)
    with pytest.raises(CheckpointError, match="no such file"):
        resolve(f"open_clip:ViT-B-32/{tmp_path}/nothing.safetensors")


def test_open_clip_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLAVA_TRAIN_OPEN_CLIP", str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"not installed in .*; install it: pip install 'llava-train\[open-clip\]'"
    ):
        resolve("open_clip:ViT-B-32/openai")
    (tmp_path / "open_clip").mkdir()  # there, and broken
    (tmp_path / "open_clip" / "__init__.py").write_text("import not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"cannot be imported \(No module named .*\); install it: pip install"):
        import_open_clip()
