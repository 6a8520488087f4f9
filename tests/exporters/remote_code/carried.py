"""Models of every kind that the target carries, made without training, and their folders asked in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_train import load_recipe
from llava_train.exporters import stock_probe
from llava_train.exporters.remote_code.target import RemoteCode
from llava_train.exporters.target import Request
from llava_train.exporters.verify import QUESTION, Asked, Reference, compare
from llava_train.model.assemble import Assembly
from llava_train.training.setup import build
from tests import tiny

FUSED = ("model.fusion=cross_attention", "model.fusion_options={every: 1}")


def assembly_of(folder: Path, llm: str = "llama", towers: tuple[str, ...] = ("clip",), *overrides: str) -> Assembly:
    """A model of tiny parts with random weights everywhere, gates and biases of heads, too."""
    tiny.make_llm(folder / "llm", llm)
    paths = [str(tiny.make_tower(folder / f"vision{number}", tower)) for number, tower in enumerate(towers)]
    chosen = [f"model.vision={json.dumps(paths if len(paths) > 1 else paths[0])}", *overrides]
    if towers == ("siglip",):
        chosen.append("model.vision_feature_select_strategy=full")
    assembly = build(load_recipe(tiny.make_recipe(folder), chosen))
    torch.manual_seed(5)
    for name, parameter in assembly.model.named_parameters():
        if name.endswith(("_gate", "lm_head.bias")):
            torch.nn.init.normal_(parameter)
    return assembly


def write(assembly: Assembly, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A model's folder; the model is in `dtype` from then on."""
    assert RemoteCode().refusal(assembly) is None
    assembly.model.to(dtype)
    folder.mkdir()
    RemoteCode().write(assembly, folder, Request(dtype))
    return folder


def load(folder: Path) -> tuple[Any, Any]:
    """Model and processor by transformers' own loaders and the folder's code, with every weight in its place."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not any(type(module).__module__.startswith("llava_train.") for module in model.modules())
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def compared(reference: Reference, folder: Path, tolerance: float) -> dict[str, Any]:
    """The report of `compare` for a folder that is loaded in this process. Raises ExportError."""
    model, processor = load(folder)
    found = {}
    for name, images in (("image", [reference.image]), ("text", [])):
        prompt, tensors = stock_probe.ask(model, processor, QUESTION, images)
        ids, greedy = tensors["ids"].tolist(), tensors["greedy"].tolist()
        found[name] = Asked(prompt, ids, tensors["logits"], greedy, torch.empty(0))
    return compare(reference, found, tolerance, [])
