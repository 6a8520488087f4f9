import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_train import load_model, load_recipe, train
from llava_train.errors import CheckpointError
from llava_train.model.checkpoint import WEIGHTS, merged, model_folder
from tests import tiny

IDS = [1, 5, 6, 7]


def logits(assembly) -> torch.Tensor:
    ids = [*IDS[:1], *[assembly.model.config.image_token_id] * assembly.spec.image_tokens, *IDS]
    pixels = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
    with torch.no_grad():
        return assembly.model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits


@pytest.mark.parametrize("llm", ["llama-tied", "qwen2", "gemma", "phi"])
@pytest.mark.parametrize("mode", ["frozen", "full", "lora"])
def test_trained_models_come_back(tmp_path: Path, llm: str, mode: str) -> None:
    tiny.make_llm(tmp_path / "llm", llm)
    recipe = load_recipe(
        tiny.make_recipe(tmp_path), [f"tune.llm.mode={mode}", "optimization.max_steps=2", "checkpoint.save_every=0"]
    )
    run = train(recipe)
    first, second = load_model(run), load_model(run / "final")
    assert torch.equal(logits(first), logits(second))
    assert (run / "final" / WEIGHTS).stat().st_size < 400_000
    if mode == "full":  # such a model stands alone
        shutil.rmtree(tmp_path / "llm")
        assert torch.equal(logits(load_model(run)), logits(first))
    before = logits(second)
    torch.testing.assert_close(logits(merged(second)), before, atol=1e-5, rtol=1e-4)


def test_other_source_weights_are_refused(workplace: Path) -> None:
    run = train(load_recipe(tiny.make_recipe(workplace), ["optimization.max_steps=1"]))
    path = workplace / "vision" / "model.safetensors"
    tensors = load_file(path)
    tensors[next(iter(tensors))] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not the weights this model was trained on"):
        load_model(run)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "final", tmp_path / "model")
    return tmp_path / "model"


def test_a_changed_or_missing_file_is_found(copy: Path) -> None:
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (copy / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its sha256"):
        load_model(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_model(copy)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_keys_that_do_not_fit_are_listed(copy: Path, fault: str) -> None:
    tensors = load_file(copy / WEIGHTS)
    key = "model.multi_modal_projector.linear_1.weight"
    if fault == "missing":
        del tensors[key]
    elif fault == "unexpected":
        tensors["stray"] = torch.zeros(2)
    else:
        tensors[key] = tensors[key][:3].clone()
    save_file(tensors, copy / WEIGHTS)
    manifest = json.loads((copy / "llava_train.json").read_text())
    manifest["files"] = {}
    (copy / "llava_train.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"1 {fault}: {'stray' if fault == 'unexpected' else key}"):
        load_model(copy)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": "other"}, "not a llava_train/model manifest"),
        ({"version": 99}, "of version 1"),
        ({"vision": {"nonsense": 1}}, "damaged"),
        ({"stray": 1}, "damaged"),
    ],
)
def test_damaged_manifests(copy: Path, change: dict, expected: str) -> None:
    path = copy / "llava_train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=expected):
        load_model(copy)


def test_folders_that_are_no_model(tmp_path: Path, parts: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        model_folder(tmp_path / "none")
    with pytest.raises(CheckpointError, match="is no model"):
        model_folder(tmp_path)
    with pytest.raises(CheckpointError, match="holds a 'llama' model"):
        load_model(parts / "llm")
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(CheckpointError, match="no final/ yet"):
        model_folder(tmp_path)
