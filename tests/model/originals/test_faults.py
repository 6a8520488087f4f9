"""Folders in the original LLaVA layout: what of them is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_train.errors import CheckpointError
from llava_train.model.originals.loading import load_original
from tests.model.originals.made import projector, write_config, write_full, write_lora, write_weights


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"use_dora": True}, "use_dora: only plain LoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: only plain LoRA"),
        ({"bias": "lora_only"}, "bias: only plain LoRA"),
        ({"peft_type": "IA3"}, "describes no LoRA"),
        ({"r": 5}, "4 mismatched: adapter of"),
        (
            {"target_modules": ["q_proj", "down_proj", "k_proj"]},
            "2 missing: adapter of llm.model.layers.0.self_attn.k_p",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(workplace: Path, options: dict, expected: str) -> None:
    write_lora(workplace / "o", workplace / "llm", workplace / "vision", **options)
    with pytest.raises(CheckpointError, match=expected):
        load_original(workplace / "o")


def test_half_an_adapter_and_a_stray_one_are_listed(workplace: Path) -> None:
    adapters = write_lora(workplace / "o", workplace / "llm", workplace / "vision")
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    del adapters[key]
    adapters["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
    (workplace / "o" / "adapter_model.safetensors").unlink()
    torch.save(adapters, workplace / "o" / "adapter_model.bin")
    with pytest.raises(CheckpointError) as caught:
        load_original(workplace / "o")
    assert "lora_B of llm.model.layers.1.self_attn.q_proj.weight" in str(caught.value)
    assert "1 unexpected: adapter of llm.model.layers.9.self_attn.q_proj.weight" in str(caught.value)


@pytest.mark.parametrize("kind", ["shards", "safetensors"])
def test_keys_that_do_not_fit_are_listed(workplace: Path, kind: str) -> None:
    folder = workplace / "o"
    tensors = write_full(folder, workplace / "llm", workplace / "vision", kind)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.stray"] = torch.zeros(2)
    tensors["model.mm_projector.0.bias"] = torch.zeros(3)
    write_weights(folder, tensors, kind)
    with pytest.raises(CheckpointError) as caught:
        load_original(folder)
    for part in (
        "1 missing: llm.model.layers.1.mlp.up_proj.weight",
        "1 unexpected: model.stray",
        "1 mismatched: model.mm_projector.0.bias (3,) instead of (32,)",
    ):
        assert part in str(caught.value)


class Payload:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize(
    "file", ["pytorch_model.bin", "mm_projector.bin", "non_lora_trainables.bin", "adapter_model.bin"]
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_pickles_run_no_code(workplace: Path, file: str, form: str) -> None:
    folder, trace = workplace / "o", workplace / "trace"
    if file == "pytorch_model.bin":
        write_full(folder, workplace / "llm", workplace / "vision", "bin")
    elif file == "mm_projector.bin":
        write_config(folder, workplace / "llm", workplace / "vision")
    else:
        write_lora(folder, workplace / "llm", workplace / "vision")
        (folder / "adapter_model.safetensors").unlink()
    if form == "zip":
        torch.save({"model.x": Payload(trace)}, folder / file)
    else:
        (folder / file).write_bytes(pickle.dumps({"model.x": Payload(trace)}))
    with pytest.raises(CheckpointError, match="no file of tensors alone"):
        load_original(folder)
    assert not trace.exists()


def _compressed(folder: Path) -> None:
    with zipfile.ZipFile(folder / "pytorch_model.bin") as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def _outside(folder: Path) -> None:
    shutil.move(folder / "pytorch_model.bin", folder.parent)
    index = {"weight_map": {"lm_head.weight": "../pytorch_model.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _link(folder: Path) -> None:
    shutil.move(folder / "pytorch_model.bin", folder.parent)
    (folder / "pytorch_model.bin").symlink_to(folder.parent / "pytorch_model.bin")


def _huge(folder: Path) -> None:
    torch.save({"model.embed_tokens.weight": torch.zeros(1).expand(10**6, 10**6)}, folder / "pytorch_model.bin")


def _no_tensors(folder: Path) -> None:
    torch.save({"model": {"a": 1}}, folder / "pytorch_model.bin")


def _cut(folder: Path) -> None:
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])


def _code(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "auto_map": {"AutoModel": "model.Model"}}))


def _layers(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 10**9}))


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (_compressed, "is compressed"),
        (_outside, "leads out of the folder"),
        (_link, "leads out of the folder"),
        (_huge, "larger than the file"),
        (_no_tensors, "more than named tensors"),
        (_cut, "no file of tensors alone"),
        (_code, "auto_map names code"),
        (_layers, "layers, but the weights are"),
    ],
)
def test_hostile_and_damaged_folders(workplace: Path, attack: Any, expected: str) -> None:
    write_full(workplace / "o", workplace / "llm", workplace / "vision", "bin")
    attack(workplace / "o")
    with pytest.raises(CheckpointError, match=expected):
        load_original(workplace / "o")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "llava_mpt"}, "model_type: 'llava_mpt': known: llava, llava_llama"),
        ({"mm_projector_type": "ldp"}, "mm_projector_type: 'ldp'"),
        ({"mm_projector_type": "mlp3x_gelu"}, r"2 missing: connector\.layers\.4"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer: None: must be"),
        ({"mm_vision_select_layer": -9}, "this encoder has hidden states 0 to 3"),
        ({"mm_vision_select_feature": "mean"}, "mm_vision_select_feature: mean: patch or cls_patch"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size: 1024, but .* gives width 32"),
        ({"mm_vision_tower": None}, r"model\.vision: name the vision encoder"),
        ({"mm_vision_tower": "no/such-tower"}, r"model\.vision names a local copy"),
        ({"mm_hidden_size": 32, "_name_or_path": "no/such-llm"}, r"model\.llm names a local copy"),
        ({"mm_hidden_size": 32, "mm_use_im_start_end": True}, "start from a full checkpoint"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio: anyres_max_9"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type: spatial_unpad"),
        ({"s2": True}, "s2: True"),
        ({"vocab_size": 99}, "mismatched: lm_head.weight"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end: the vocabulary of .* rows has none for <im_start>"),
    ],
)
def test_what_cannot_be_honoured_is_refused(workplace: Path, changes: dict, expected: str) -> None:
    parts = (workplace / "llm", workplace / "vision")
    if "mm_hidden_size" in changes:  # stage 1
        write_config(workplace / "o", *parts, **changes)
        torch.save(projector([32, 32, 32]), workplace / "o" / "mm_projector.bin")
    else:
        write_full(workplace / "o", *parts, **changes)
    with pytest.raises(CheckpointError, match=expected):
        load_original(workplace / "o")
