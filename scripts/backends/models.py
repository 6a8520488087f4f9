"""Tiny models, trained and exported by our package, for back ends to answer with; each is made once in a work folder.

Sizes are what the back ends accept: heads of 32 dimensions, which vLLM on a CPU wants. Weights are random with a wide
spread, so that the tokens of an answer are far apart.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import step
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.utils.logging import disable_progress_bar

from llava_train import export, load_recipe, train
from llava_train.demo.run import BACKBONES
from llava_train.exporters.verify import Reference, reference_of
from llava_train.model.checkpoint import load_model, merged

disable_progress_bar()
SIDE, PATCH = 56, 14
_WIDE = 0.2
_LLM = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "initializer_range": _WIDE,
}
_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
LLMS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
}
TOWERS: dict[str, tuple[Any, Any, str]] = {
    "clip": (CLIPVisionModel, CLIPVisionConfig, "CLIPImageProcessor"),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, "SiglipImageProcessor"),
}
ANYRES = {"anyres": "model.image_aspect_ratio=anyres", "anyres_max": "model.image_aspect_ratio=anyres_max_2"}
"""A third word of a model's name: LLaVA-NeXT's class, LLaVA-OneVision's."""


@dataclass(frozen=True)
class Tiny:
    """A trained run and what it says before it is exported."""

    run: Path
    reference: Reference


def make_model(work: Path, name: str) -> Tiny:
    """The model `LLM-TOWER` or `LLM-TOWER-RESOLUTION` (`llama-clip`, `qwen2-siglip-anyres_max`), two steps old."""
    llm, tower, *resolution = name.split("-")
    folder = work / name
    run, done = folder / "run", folder / "done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        _make_llm(folder / "llm", llm)
        _make_tower(folder / "vision", tower)
        options = [f"model.vision_feature_select_strategy={'full' if tower == 'siglip' else 'default'}"]
        recipe = load_recipe(_make_recipe(folder), [*options, *(ANYRES[word] for word in resolution)])
        with step(f"train {name}"), _quiet(folder / "log.txt"):
            train(recipe)
        done.touch()
    return Tiny(run, reference_of(merged(load_model(run))))


def exported(tiny: Tiny, to: str = "hf") -> Path:
    """The model in the layout `to`, in float32."""
    folder = tiny.run.parent / to
    if not folder.exists():
        with step(f"export {folder.parent.name} --to {to}"), _quiet(folder.parent / f"export-{to}.txt"):
            export(tiny.run, folder, to=to, dtype="float32")
    return folder


@contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """What is printed meanwhile goes into a file."""
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        yield


def _make_llm(folder: Path, family: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BACKBONES / "llm")
    kind, config = LLMS[family]
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(2)
    kind(config(vocab_size=len(tokenizer), **_LLM, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_tower(folder: Path, family: str) -> None:
    kind, config, processor = TOWERS[family]
    torch.manual_seed(1)
    kind(config(**_TOWER)).save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    values = {
        "image_processor_type": processor,
        "size": {"shortest_edge": SIDE} if family == "clip" else square,
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
        **({"do_center_crop": True, "crop_size": square} if family == "clip" else {}),
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.25],
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def _make_recipe(folder: Path) -> Path:
    pictures = folder / "data"
    pictures.mkdir()
    records = []
    for colour in ("red", "green", "blue", "yellow"):
        Image.new("RGB", (SIDE, SIDE // 2), colour).save(pictures / f"{colour}.png")
        turns = [("human", "<image>\nwhat color is the shape?"), ("gpt", colour)]
        conversation = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": colour, "image": f"{colour}.png", "conversations": conversation})
    (pictures / "data.json").write_text(json.dumps(records))
    recipe = {
        "name": "tiny",
        "output": str(folder / "run"),
        "model": {"vision": str(folder / "vision"), "llm": str(folder / "llm")},
        "data": {"train": [{"path": str(pictures / "data.json")}], "template": "chatml", "max_length": 1024}
        | {"cache_dir": str(folder / "prepared"), "num_workers": 0},
        "tune": {"llm": {"mode": "lora", "learning_rate": 0.001}},
        "optimization": {"learning_rate": 0.001, "global_batch_size": 2, "micro_batch_size": 2, "max_steps": 2}
        | {"precision": "fp32"},
        "speed": {"recompute": "none"},
        "engine": {"device": "cpu"},
        "checkpoint": {"save_every": 0},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def answer_text(folder: Path, ids: list[int]) -> str:
    """Greedy tokens as a server spells them."""
    text = AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text
