import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from llava_train import export, load_model, load_recipe, train
from llava_train.errors import ExportError, StorageError
from llava_train.exporters.huggingface import long_lived_key
from llava_train.exporters.verify import reference_of, verify
from llava_train.model.checkpoint import merged
from tests import tiny

FILES = {
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "export_report.json",
    "README.md",
}


def quick_run(folder: Path, llm: str = "llama", tower: str = "clip", *overrides: str) -> Path:
    tiny.make_llm(folder / "llm", llm)
    tiny.make_tower(folder / "vision", tower)
    options = ["optimization.max_steps=2", "checkpoint.save_every=0", *overrides]
    if tower == "siglip":
        options.append("model.vision_feature_select_strategy=full")
    return train(load_recipe(tiny.make_recipe(folder), options))


def test_a_stock_folder_with_everything_old_and_new_readers_want(finished: Path, tmp_path: Path) -> None:
    out = export(finished, tmp_path / "hf", dtype="float32")
    assert {path.name for path in out.iterdir()} == FILES
    report = json.loads((out / "export_report.json").read_text())
    assert report["verified"]
    assert max(report["max_logit_difference"].values()) <= 1e-4
    assert report["greedy_tokens_equal"] == report["greedy_tokens"]
    with safe_open(out / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert {key.split(".")[0] for key in keys} == {"language_model", "vision_tower", "multi_modal_projector"}
    assert "language_model.lm_head.weight" in keys
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in keys
    assert all(k.startswith("vision_tower.vision_model.") for k in keys if k.startswith("vision_tower"))
    assert not any("lora" in key or "base_layer" in key for key in keys)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["rope_theta"] == 10000.0
    assert json.loads((out / "preprocessor_config.json").read_text())["do_pad"]
    assert "generation" not in (out / "chat_template.jinja").read_text().replace("add_generation_prompt", "")


def test_the_export_of_an_export_is_the_same(finished: Path, tmp_path: Path) -> None:
    first = export(finished, tmp_path / "one", dtype="float32")
    second = export(first, tmp_path / "two", dtype="float32")
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (first / "chat_template.jinja").read_text() == (second / "chat_template.jinja").read_text()


@pytest.mark.slow(reason="each case starts a fresh process with transformers")
@pytest.mark.parametrize(
    ("llm", "tower", "overrides"),
    [
        ("llama-tied", "clip", ["tune.llm.mode=full"]),
        ("qwen2", "siglip", ["data.template=chatml"]),
        ("gemma", "dinov2", []),
        ("phi3", "clip", ["model.connector=linear"]),
        ("mistral", "clip", ["model.vision_feature_layer=[-3, -2]", "model.image_aspect_ratio=square"]),
        ("qwen3", "clip", ["model.vision_feature_select_strategy=full", "model.image_aspect_ratio=crop"]),
        ("llama", "clip", ["model.image_aspect_ratio=anyres", "data.max_length=1024"]),
        ("llama", "siglip", ["model.image_aspect_ratio=anyres_max_2", "data.max_length=1024"]),
    ],
)
def test_families_towers_and_connectors(tmp_path: Path, llm: str, tower: str, overrides: list[str]) -> None:
    run = quick_run(tmp_path, llm, tower, *overrides)
    report = json.loads((export(run, tmp_path / "hf", dtype="float32") / "export_report.json").read_text())
    assert max(report["max_logit_difference"].values()) <= 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precisions_stay_within_their_tolerance(finished: Path, tmp_path: Path, dtype: str) -> None:
    out = export(finished, tmp_path / "hf", dtype=dtype)
    assert {str(t.dtype) for t in load_file(out / "model.safetensors").values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("connector", ["mlp3x_gelu", "identity"])
def test_connectors_without_a_place_are_refused_by_name(tmp_path: Path, connector: str) -> None:
    extra = ["tune.llm.mode=full"] if connector == "identity" else []
    run = quick_run(tmp_path, "llama", "clip", f"model.connector={connector}", *extra)
    with pytest.raises(ExportError, match=f"'hf' cannot carry this model: connector '{connector}' has no place"):
        export(run, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("llm", "tower", "message"),
    [
        ("phi", "clip", "a phi head has a bias"),
        ("gemma2", "clip", "a gemma2 model caps or scales what its head gives"),
        ("llama", "dinov2-registers", "one encoder, without registers"),
    ],
)
def test_what_the_stock_class_leaves_out_is_refused(tmp_path: Path, llm: str, tower: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export(quick_run(tmp_path, llm, tower), tmp_path / "hf")


def test_a_class_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no class for a llava_cross_attention model"):
        export(
            quick_run(tmp_path, "llama", "clip", "model.fusion=cross_attention", "model.fusion_options={every: 1}"),
            tmp_path / "hf",
        )


def test_requests_that_are_wrong(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="exists"):
        export(finished, tmp_path)
    with pytest.raises(ExportError, match="dtype 'int3'"):
        export(finished, tmp_path / "hf", dtype="int3")
    with pytest.raises(Exception, match="unknown export target 'gguff'"):
        export(finished, tmp_path / "hf", to="gguff")
    import llava_train.files

    usage = llava_train.files.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(llava_train.files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="the export needs"):
        export(finished, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_the_check_finds_a_wrong_weight_a_missing_key_and_a_wrong_prompt(finished: Path, tmp_path: Path) -> None:
    out = export(finished, tmp_path / "hf", dtype="float32")
    reference = reference_of(merged(load_model(finished)))
    path = out / "model.safetensors"
    tensors = load_file(path)
    name = "multi_modal_projector.linear_2.weight"
    save_file({**tensors, name: tensors[name] + 0.5}, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match="image: logits differ"):
        verify(reference, out, 1e-4)
    save_file({k: v for k, v in tensors.items() if k != name}, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"missing keys: .*linear_2\.weight"):
        verify(reference, out, 1e-4)
    save_file(tensors, path, metadata={"format": "pt"})
    for template in (out / "chat_template.jinja", out / "chat_template.json"):
        template.write_text(template.read_text().replace("USER: ", "user: "))
    with pytest.raises(ExportError, match="the prompt renders as"):
        verify(reference, out, 1e-4)


def test_stock_transformers_needs_nothing_of_ours(finished: Path, tmp_path: Path) -> None:
    out = export(finished, tmp_path / "hf", dtype="float32")
    model, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    code = (
        "import sys; from transformers import AutoProcessor; "
        f"AutoProcessor.from_pretrained({str(out)!r}); assert 'llava_train' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=False).returncode == 0
    assert model.config.image_seq_length == 4


def test_key_dialect() -> None:
    for tower, expected in (
        ("clip_vision_model", "vision_tower.vision_model.encoder.w"),
        ("siglip_vision_model", "vision_tower.vision_model.encoder.w"),
        ("dinov2", "vision_tower.encoder.w"),
    ):
        assert long_lived_key("vision_tower.encoder.w", tower) == expected
        assert long_lived_key(long_lived_key("vision_tower.encoder.w", tower), tower) == expected
    assert long_lived_key("language_model.lm_head.weight", "clip_vision_model") == "language_model.lm_head.weight"
