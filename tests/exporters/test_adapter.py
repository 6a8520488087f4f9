"""Target `adapter`: a PEFT folder over a stock model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from llava_train import export, load_model, load_recipe, train
from llava_train.errors import ExportError
from llava_train.exporters.adapter import Adapter, hub_source
from llava_train.exporters.huggingface import HuggingFace
from llava_train.exporters.target import Request
from llava_train.exporters.verify import reference_of
from tests import tiny

EXACT = Request(torch.float32)
PROJECTOR = "model.multi_modal_projector"


@pytest.fixture(scope="module")
def base(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock folder, as stage 1 leaves one."""
    folder = tmp_path_factory.mktemp("base")
    for name in ("vision", "llm", "data"):
        (folder / name).symlink_to(parts / name)
    run = train(load_recipe(tiny.make_recipe(folder), ["tune.llm.mode=frozen", "optimization.max_steps=2"]))
    (folder / "hf").mkdir()
    HuggingFace().write(load_model(run), folder / "hf", EXACT)
    return folder / "hf"


def stage2(base: Path, folder: Path, *options: str) -> Path:
    for name in ("vision", "llm", "data"):
        (folder / name).symlink_to(base.parent / name)
    recipe = tiny.make_recipe(folder, init_from=str(base))
    return train(load_recipe(recipe, ["optimization.max_steps=2", "checkpoint.save_every=0", *options]))


@pytest.mark.slow(reason="two fresh processes with transformers")
def test_peft_loads_it_over_its_base(base: Path, tmp_path: Path) -> None:
    run = stage2(base, tmp_path)
    out = export(run, tmp_path / "out", to="adapter", dtype="float32")
    report = json.loads((out / "export_report.json").read_text())
    assert report["max_logit_difference"] == {"image": 0.0, "text": 0.0}
    assert report["base_model_name_or_path"] == str(base)
    assert report["modules_to_save"] == [PROJECTOR]
    keys = load_file(out / "adapter_model.safetensors").keys()
    assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert f"base_model.model.{PROJECTOR}.linear_1.weight" in keys
    assert {key.split(".lora_")[0].split(".linear_")[0] for key in keys if "vision" in key} == set()
    stock = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), out).eval()
    ours, ids = load_model(run).model, torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(stock(input_ids=ids).logits, ours(input_ids=ids).logits)
    # The proof can fail: other adapters, and adapters that are not there.
    target, reference = Adapter(), reference_of(load_model(run))
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.language_model.layers.1.mlp.down_proj.lora_B.weight"
    save_file({**tensors, name: tensors[name] + 1}, file)
    with pytest.raises(ExportError, match="image: logits differ"):
        target.prove(reference, out, EXACT)


def test_a_frozen_connector_stays_with_its_base(base: Path, tmp_path: Path) -> None:
    """So that vLLM takes the folder: it refuses `modules_to_save`."""
    assembly = load_model(stage2(base, tmp_path, "tune.connector.mode=frozen"))
    target = Adapter()
    assert target.refusal(assembly) is None
    (tmp_path / "out").mkdir()
    target.write(assembly, tmp_path / "out", EXACT)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] is None
    assert all(".lora_" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["tune.llm.mode=full"], "it has no adapters"),
        (["tune.vision.mode=full"], "its encoder was trained in full, not with adapters"),
        (
            ["model.image_aspect_ratio=anyres", "data.max_length=1024"],
            "its base is a llava model and this one a llava_next",
        ),
    ],
)
def test_what_peft_has_no_place_for(base: Path, tmp_path: Path, options: list[str], expected: str) -> None:
    assert expected in (Adapter().refusal(load_model(stage2(base, tmp_path, *options))) or "")


def test_a_model_of_parts_has_no_base(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match="built from parts, so that no model can be named as its base: export its stage"
    ):
        export(finished, tmp_path / "out", to="adapter")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_the_hubs_cache_is_named_by_id_and_revision() -> None:
    commit = "8c85e9a4d626b7b908448be32c1ba5ad79b95e76"
    cached = f"/cache/hub/models--llava-hf--llava-1.5-7b-hf/snapshots/{commit}"
    assert hub_source(cached) == ("llava-hf/llava-1.5-7b-hf", commit)
    assert hub_source("/models/mine") == ("/models/mine", None)
