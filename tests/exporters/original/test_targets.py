"""Targets in the original LLaVA layout: published folders and runs of ours, there and back again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_train import export, load_model, load_recipe, train
from llava_train.data.pictures.processors import build_image_processor
from llava_train.errors import CheckpointError, ExportError
from llava_train.exporters.original.layout import KINDS
from llava_train.exporters.table import TARGETS
from llava_train.exporters.target import Request
from llava_train.exporters.verify import reference_of
from llava_train.model.assemble import Assembly, assemble
from llava_train.model.checkpoint import merged
from llava_train.model.originals.config import _TEXT_TYPES, TOWER
from tests import tiny
from tests.conftest import GOLDEN
from tests.model.originals import made

EXACT = Request(torch.float32)
GRID = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[28, 56], [56, 28], [84, 28]],
}
LINEAR = {"rope_theta": 500_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
LLAMA3 = {
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def published(folder: Path, llm: Path, vision: Path, model_type: str | None = None, **changes: Any) -> Path:
    """A whole folder as the original's training leaves it, in safetensors."""
    tower = changes.pop("tower", False)
    known = json.loads((llm / "config.json").read_text())["model_type"]
    model_type = "llava" if model_type is None and known == "llama" else model_type  # LLaVA-1.5's on the hub
    if model_type is not None:
        changes["model_type"] = model_type
    if known not in ("llama", "mistral", "qwen2"):  # all that `made` has names for; `model_type` then says it
        values = json.loads((llm / "config.json").read_text())
        (llm / "config.json").write_text(json.dumps({**values, "model_type": "llama"}))
    made.write_full(folder, llm, vision, "safetensors", tower, **changes)
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.endswith("inv_freq")}
    if changes.get("image_aspect_ratio") == "anyres":
        tensors["model.image_newline"] = torch.linspace(-1, 1, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def written(assembly: Assembly, folder: Path, to: str = "llava") -> Path:
    """An export without its proof."""
    assert TARGETS[to].refusal(assembly) is None
    folder.mkdir()
    TARGETS[to].write(assembly, folder, EXACT)
    return folder


def differences(one: Assembly, other: Assembly) -> list[float]:
    """Largest differences of logits, with a picture and without."""
    first, second = reference_of(one).asked, reference_of(other).asked
    assert first.keys() == second.keys()
    assert all(first[name].prompt == second[name].prompt and first[name].ids == second[name].ids for name in first)
    return [float((first[name].logits - second[name].logits).abs().max()) for name in first]


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors by the same names, bit for bit."""
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    ("llm", "tower", "changes"),
    [
        ("llama", "clip", {"tower": True}),
        ("llama", "clip", {"image_aspect_ratio": "square", "mm_vision_select_layer": -1}),
        ("llama", "clip", {"mm_vision_select_feature": "cls_patch", **LINEAR}),
        ("llama", "clip", LLAMA3),
        ("llama", "clip", GRID),
        ("llama", "siglip", {"tower": True}),
        ("llama", "siglip", {"image_aspect_ratio": "square"}),
        ("llama-tied", "clip", {}),
        ("mistral", "clip", {}),
        ("qwen2", "clip", {}),
        ("qwen2-tied", "clip", {}),
        ("qwen3", "clip", {"model_type": "llava_qwen3"}),
        ("gemma", "clip", {"model_type": "llava_gemma"}),
        ("gemma2", "clip", {"model_type": "llava_gemma2"}),
        ("phi3", "clip", {"model_type": "llava_phi3"}),
    ],
)
def test_import_and_export_are_inverse(tmp_path: Path, llm: str, tower: str, changes: dict[str, Any]) -> None:
    tiny.make_llm(tmp_path / "llm", llm)
    tiny.make_tower(tmp_path / "vision", tower)
    folder = published(tmp_path / "o", tmp_path / "llm", tmp_path / "vision", **changes)
    first = load_model(folder)
    out = written(first, tmp_path / "out")
    assert same_tensors(folder, out)
    again = load_model(out)
    assert differences(first, again) == [0.0, 0.0]
    assert torch.equal(first.model.get_input_embeddings().weight, again.model.get_input_embeddings().weight)
    text, other = (each.model.config.text_config.to_dict() for each in (first, again))
    other.pop("partial_rotary_factor", None)  # of Phi-3, also said among the rotary positions
    assert text == other
    assert first.tokenizer.get_vocab() == again.tokenizer.get_vocab()
    spec, other = first.spec.to_dict(), again.spec.to_dict()
    assert {key for key in spec if spec[key] != other[key]} <= {"llm", "vision"}
    was, now = (json.loads((each / "config.json").read_text()) for each in (folder, out))
    ours = {"architectures", "_name_or_path", "transformers_version", "dtype", "mm_vision_tower"}
    ours |= {"unfreeze_mm_vision_tower"} if changes.get("tower") else set()
    assert {key: was[key] for key in was.keys() - ours} == {key: now.get(key) for key in was.keys() - ours}
    assert now["unfreeze_mm_vision_tower"] is bool(changes.get("tower"))
    bare = AutoTokenizer.from_pretrained(out, config=first.model.config)
    assert "<image>" not in bare.get_vocab()
    assert len(bare) == was["vocab_size"]


def test_every_kind_that_is_read_is_written() -> None:
    assert {_TEXT_TYPES[kind] for kind, _ in KINDS.values()} == set(_TEXT_TYPES.values()) == set(KINDS)


def test_a_siglip_without_its_last_layer(tmp_path: Path) -> None:
    tiny.make_llm(tmp_path / "llm")
    tiny.make_tower(tmp_path / "vision", "siglip")
    folder = published(tmp_path / "o", tmp_path / "llm", tmp_path / "vision", tower=True)
    gone = (f"{TOWER}vision_model.head.", f"{TOWER}vision_model.encoder.layers.2.")
    kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith(gone)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    first = load_model(folder)
    out = written(first, tmp_path / "out")
    assert same_tensors(folder, out)
    assert differences(first, load_model(out)) == [0.0, 0.0]
    # The original takes off the last layer of the encoder that the configuration names.
    assert json.loads((out / "siglip-vision-tower" / "config.json").read_text())["num_hidden_layers"] == 3


def test_pictures_in_a_frame(workplace: Path) -> None:
    llm = workplace / "llm"
    rows = json.loads((llm / "config.json").read_text())["vocab_size"]
    grown = AutoModelForCausalLM.from_pretrained(llm)
    grown.resize_token_embeddings(rows + 2, mean_resizing=False)
    grown.save_pretrained(llm)
    folder = published(workplace / "o", llm, workplace / "vision", mm_use_im_start_end=True)
    first = load_model(folder)
    out = written(first, workplace / "out")
    assert same_tensors(folder, out)
    again = load_model(out)
    assert differences(first, again) == [0.0, 0.0]
    assert again.tokenizer.chat_template == first.tokenizer.chat_template
    values = json.loads((out / "config.json").read_text())
    assert (values["mm_use_im_start_end"], values["mm_use_im_patch_token"]) == (True, False)


def test_names_are_those_of_the_original_code(tmp_path: Path) -> None:
    golden = GOLDEN / "llava_reference"
    shutil.copytree(golden / "llm", tmp_path / "llm")
    shutil.copytree(golden / "vision", tmp_path / "vision")
    tiny.make_tokenizer(tmp_path / "llm")
    (tmp_path / "llm" / "tokenizer.model").write_bytes(b"what the original reads")
    tiny.make_data(tmp_path / "data")
    run = train(load_recipe(tiny.make_recipe(tmp_path), ["tune.vision.mode=full", "optimization.max_steps=1"]))
    out = written(merged(load_model(run)), tmp_path / "out")
    found = {key: tuple(each.shape) for key, each in load_file(out / "model.safetensors").items()}
    llm, tower = (load_file(golden / part / "model.safetensors") for part in ("llm", "vision"))
    expected = {key: tuple(each.shape) for key, each in llm.items()}
    expected |= {f"{TOWER}{key}": tuple(each.shape) for key, each in tower.items() if "position_ids" not in key}
    wide, deep = tower["vision_model.embeddings.class_embedding"].shape[0], llm["model.norm.weight"].shape[0]
    expected |= {"model.mm_projector.0.weight": (deep, wide), "model.mm_projector.2.weight": (deep, deep)}
    expected |= {f"model.mm_projector.{layer}.bias": (deep,) for layer in (0, 2)}
    rows = found["lm_head.weight"][0]
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        expected[key] = (rows, expected[key][1])  # trained, so that all rows are kept
    assert found == expected
    values = json.loads((out / "config.json").read_text())
    assert (values["architectures"], values["model_type"]) == (["LlavaLlamaForCausalLM"], "llava")
    assert values["unfreeze_mm_vision_tower"] is True
    assert (out / "tokenizer.model").read_bytes() == b"what the original reads"
    assert values["rope_theta"] == 10000.0
    assert "rope_parameters" not in values


@pytest.mark.parametrize(
    ("connector", "tower", "aspect"),
    [("linear", "clip", "pad"), ("mlp3x_gelu", "siglip", "square"), ("identity", "clip", "crop")],
)
def test_a_run_of_ours(tmp_path: Path, connector: str, tower: str, aspect: str) -> None:
    tiny.make_llm(tmp_path / "llm")
    tiny.make_tower(tmp_path / "vision", tower)
    strategy = "full" if tower == "siglip" else "default"
    options = [f"model.connector={connector}", f"model.image_aspect_ratio={aspect}", "optimization.max_steps=1"]
    options += [f"model.vision_feature_select_strategy={strategy}", "tune.llm.mode=full"]
    assembly = load_model(train(load_recipe(tiny.make_recipe(tmp_path), options)))
    again = load_model(written(assembly, tmp_path / "out"))
    assert differences(assembly, again) == [0.0, 0.0]
    assert (again.spec.template, again.template) == ("vicuna_v1", assembly.template)


@pytest.mark.slow(reason="two fresh processes with transformers")
def test_a_whole_export_is_proved_in_a_fresh_process(finished: Path, tmp_path: Path) -> None:
    out = export(finished, tmp_path / "out", to="llava", dtype="float32")
    report = json.loads((out / "export_report.json").read_text())
    assert report["max_logit_difference"] == {"image": 0.0, "text": 0.0}
    assert report["same_after_import"] == len(load_file(out / "model.safetensors"))
    assert any("relative (clip-vision-tower)" in note for note in report["notes"])
    assert {path.name for path in (out / "clip-vision-tower").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    shutil.move(out, tmp_path / "elsewhere")  # it names nothing outside itself
    assert differences(merged(load_model(finished)), load_model(tmp_path / "elsewhere")) == [0.0, 0.0]
    target, reference = TARGETS["llava"], reference_of(merged(load_model(finished)))
    weights = tmp_path / "elsewhere" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.mm_projector.2.bias"] += 1.0
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="changed or damaged"):
        load_model(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "export_report.json").unlink()
    with pytest.raises(ExportError, match="image: logits differ"):
        target.prove(reference, tmp_path / "elsewhere", EXACT)


def test_adapters_and_what_else_was_trained(finished: Path, tmp_path: Path) -> None:
    out = written(load_model(finished), tmp_path / "out", "llava-lora")
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "non_lora_trainables.bin",
        "training_template.jinja",
    }
    options = json.loads((out / "adapter_config.json").read_text())
    assert options["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    adapters = load_file(out / "adapter_model.safetensors")
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in adapters
    others = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    assert set(others) == {f"base_model.model.{key}" for key in made.projector([32, 32, 32])}
    ours, again = merged(load_model(finished)).model.state_dict(), load_model(out).model.state_dict()
    rows = json.loads((out / "config.json").read_text())["vocab_size"]
    assert ours.keys() == again.keys()
    for name, weight in ours.items():
        kept = slice(None, rows) if "embed_tokens" in name or "lm_head" in name else slice(None)
        assert torch.equal(weight[kept], again[name][kept]), name
    # PEFT itself takes the adapters for the bare language model.
    peft = pytest.importorskip("peft")
    llm = AutoModelForCausalLM.from_pretrained(options["base_model_name_or_path"])
    bare = peft.PeftModel.from_pretrained(llm, out).merge_and_unload().state_dict()
    for name in ("layers.0.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight"):
        torch.testing.assert_close(bare[f"model.{name}"], ours[f"model.language_model.{name}"])


def test_adapters_over_a_whole_folder(workplace: Path) -> None:
    start = published(workplace / "o", workplace / "llm", workplace / "vision")
    run = train(load_recipe(tiny.make_recipe(workplace, init_from=str(start)), ["optimization.max_steps=2"]))
    out = written(load_model(run), workplace / "out", "llava-lora")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(start)
    ours, again = merged(load_model(run)).model.state_dict(), load_model(out).model.state_dict()
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.slow(reason="a fresh process with transformers")
def test_stage_1_over_its_parts(workplace: Path) -> None:
    options = ["tune.llm.mode=frozen", "optimization.max_steps=2"]
    run = train(load_recipe(tiny.make_recipe(workplace), options))
    out = export(run, workplace / "out", to="llava-stage1", dtype="float32")
    report = json.loads((out / "export_report.json").read_text())
    assert report["max_logit_difference"] == {"image": 0.0, "text": 0.0}
    assert report["logit_columns"] == json.loads((out / "config.json").read_text())["vocab_size"]
    assert any("whole paths" in note for note in report["notes"])
    trained = torch.load(out / "mm_projector.bin", weights_only=True)
    assert {key: tuple(each.shape) for key, each in trained.items()} == {
        key: tuple(each.shape) for key, each in made.projector([32, 32, 32]).items()
    }
    first = load_model(run).model.model.multi_modal_projector.linear_1.weight
    assert torch.equal(first, trained["model.mm_projector.0.weight"])


@pytest.mark.parametrize(
    ("parts", "options", "expected"),
    [
        (("llama", "clip"), ["model.connector=pixel_shuffle"], "connector 'pixel_shuffle' has no place"),
        (("llama", "dinov2"), [], "one CLIP or SigLIP as its encoder, not dinov2"),
        (("llama", "clip"), ["model.vision_feature_layer=[-3, -2]"], r"one layer of its encoder, not \[-3, -2\]"),
        (("llama", "clip"), ["model.image_aspect_ratio=square"], "image_aspect_ratio pad, crop, anyres, not square"),
        (
            ("llama", "siglip"),
            ["model.vision_feature_select_strategy=full", "model.vision_feature_layer=-1"],
            "reads SigLIP before its last layer, not vision_feature_layer -1",
        ),
        (
            ("llama", "clip"),
            ["model.fusion=cross_attention", "model.fusion_options={every: 1}"],
            "this is llava_cross_attention",
        ),
        (("phi", "clip"), [], "the original has no phi language model; it has llama, mistral"),
    ],
)
def test_what_the_layout_cannot_carry(
    tmp_path: Path, parts: tuple[str, str], options: list[str], expected: str
) -> None:
    tiny.make_llm(tmp_path / "llm", parts[0])
    tiny.make_tower(tmp_path / "vision", parts[1])
    model = load_recipe(tiny.make_recipe(tmp_path), options).model
    processor = build_image_processor(str(model.vision), model.image_aspect_ratio, 28)
    assembly = assemble(model, "", "plain", processor, seed=0)
    for to in ("llava", "llava-stage1", "llava-lora"):
        assert re.search(expected, TARGETS[to].refusal(assembly) or "")


@pytest.mark.parametrize(
    ("tune", "to", "expected"),
    [
        ("llm.mode=lora", "llava-stage1", "its language model was trained too"),
        ("llm.mode=full", "llava-lora", "it has no adapters"),
        ("vision.mode=full", "llava-lora", "its encoder was trained too"),
        ("vision.mode=lora", "llava-lora", "its vision has adapters too"),
    ],
)
def test_what_else_was_trained(workplace: Path, tune: str, to: str, expected: str) -> None:
    options = ["optimization.max_steps=1", "checkpoint.save_every=0", f"tune.{tune}"]
    run = train(load_recipe(tiny.make_recipe(workplace), options))
    with pytest.raises(ExportError, match=f"target '{to}' cannot carry this model: .*{expected}.*targets that can: hf"):
        export(run, workplace / "out", to=to)
    assert not (workplace / "out").exists()
