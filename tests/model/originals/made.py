"""Folders in the original LLaVA layout, written as the original code writes them."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TOWER = "model.vision_tower.vision_tower."
MM = {
    "mm_hidden_size": 32,
    "mm_patch_merge_type": "flat",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "image_aspect_ratio": "pad",
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": False,
    "use_mm_proj": True,
}


def projector(widths: list[int]) -> dict[str, torch.Tensor]:
    """Linear layers as nn.Sequential names them, GELU between them."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for number, (left, right) in enumerate(pairwise(widths)):
        tensors[f"model.mm_projector.{2 * number}.weight"] = torch.randn(right, left, generator=generator) / left**0.5
        tensors[f"model.mm_projector.{2 * number}.bias"] = torch.randn(right, generator=generator)
    return tensors


def write_config(folder: Path, llm: Path, vision: Path, **changes: Any) -> None:
    values = json.loads((llm / "config.json").read_text())
    kind = {"llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen"}[values["model_type"]]
    rope = values.pop("rope_parameters", None)
    if rope:
        values["rope_theta"] = rope["rope_theta"]
    values |= {"_name_or_path": str(llm), "model_type": kind, "architectures": ["LlavaForCausalLM"]}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**values, **MM, "mm_vision_tower": str(vision), **changes}))


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], kind: str) -> None:
    keys = sorted(tensors)
    halves = [{key: tensors[key] for key in part} for part in (keys[: len(keys) // 2], keys[len(keys) // 2 :])]
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
        for name, part in zip(names, halves):
            torch.save(part, folder / name, _use_new_zipfile_serialization=kind != "old shards")
        index = {"metadata": {}, "weight_map": {key: name for name, part in zip(names, halves) for key in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_full(
    folder: Path, llm: Path, vision: Path, kind: str = "shards", tower: bool = False, **changes: Any
) -> dict[str, torch.Tensor]:
    """A whole checkpoint; returns its tensors."""
    folder.mkdir()
    write_config(folder, llm, vision, **changes)
    config = json.loads((folder / "config.json").read_text())
    tensors = {
        **load_file(llm / "model.safetensors"),
        **projector([config["mm_hidden_size"], *[config["hidden_size"]] * 2]),
    }
    inverse = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = inverse  # what transformers once saved
    if tower:
        for key, tensor in load_file(vision / "model.safetensors").items():
            tensors[f"{TOWER}vision_model.{key.removeprefix('vision_model.')}"] = tensor
    write_weights(folder, tensors, kind)
    for file in llm.glob("tokenizer*"):
        shutil.copy(file, folder)
    return tensors


def write_lora(
    folder: Path, llm: Path, vision: Path, base: Path | None = None, **options: Any
) -> dict[str, torch.Tensor]:
    """Adapters on q_proj and down_proj with a trained projector; returns the adapters."""
    write_config(folder, llm, vision)
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base or llm),
        "r": 4,
        "lora_alpha": 12,
        "bias": "none",
        "target_modules": ["q_proj", "down_proj"],
        **options,
    }
    (folder / "adapter_config.json").write_text(json.dumps(values))
    generator, adapters = torch.Generator().manual_seed(7), {}
    for key, tensor in load_file(llm / "model.safetensors").items():
        if key.endswith(("q_proj.weight", "down_proj.weight")):
            name = f"base_model.model.{key.removesuffix('.weight')}"
            adapters[f"{name}.lora_A.weight"] = torch.randn(4, tensor.shape[1], generator=generator)
            adapters[f"{name}.lora_B.weight"] = torch.randn(tensor.shape[0], 4, generator=generator)
    save_file(adapters, folder / "adapter_model.safetensors")
    trained = {f"base_model.model.{key}": tensor + 1 for key, tensor in projector([32, 32, 32]).items()}
    torch.save(trained, folder / "non_lora_trainables.bin")
    return adapters
