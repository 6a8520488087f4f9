#!/usr/bin/env python3
"""Weight names of exports against SGLang, which has no engine for this CPU: its LLaVA classes, from its wheel.

    python scripts/backends/sglang.py --work runs/backends

  llava  the original layout: the class is built from the export's config.json, its own `load_weights` takes the
         encoder from the folder that is named there, and the weights; each must find its place, each place its weight
  hf     transformers' layout: the class refuses CLIP's strategy `default`; other encoders than Pixtral's are not in its
         table of classes. Both are looked up, so that a version that takes them is noticed

Nothing is generated.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import FailedError, main, step

VERSION = "0.5.23"
FILE = "sglang/srt/models/llava.py"
MODELS = ("llama-clip", "qwen2-siglip")
TOWERS = ("CLIPVisionModel", "SiglipVisionModel")


def prove(work: Path, environments: Path) -> dict[str, Any]:
    """What the JSON says."""
    from models import exported, make_model
    from wheels import find_wheel

    wheel = find_wheel("sglang", VERSION, environments / "wheels")
    found: dict[str, Any] = {}
    for name in MODELS:
        folder = exported(make_model(work, name), "llava")
        with step(f"SGLang {VERSION}: weights of {name}, original layout"):
            found[name] = placed(wheel, folder)
        if found[name]["unplaced"] or found[name]["unfilled"]:
            raise FailedError(f"{name}: {found[name]}")
    refusal, towers = strategy_refusal(wheel), sorted({*TOWERS} & registered(wheel))
    if not refusal or towers:
        raise FailedError(f"SGLang takes more of transformers' layout than docs/backends.md says: {refusal}, {towers}")
    return {"version": VERSION, "weights": found, "hf": {"default": refusal, "encoders": towers}, "generated": False}


@contextmanager
def chdir(folder: Path) -> Iterator[None]:
    """Work in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def load(wheel: Path, record: Any, values: dict[str, Any] | None = None) -> Any:
    """SGLang's LLaVA module, whose decoders are made by the values of a config.json."""
    from transformers import LlamaConfig, Qwen2Config
    from wheels import Decoder, load_module

    def decoder(kind: Any) -> Any:
        return lambda *_, **__: Decoder(kind.from_dict(values), record)

    given = {"LlamaForCausalLM": decoder(LlamaConfig), "Qwen2ForCausalLM": decoder(Qwen2Config)}
    helpers = {"default_weight_loader": record.put, "add_prefix": lambda name, prefix: f"{prefix}.{name}"}
    return load_module(wheel, FILE, {**given, **helpers})


def placed(wheel: Path, folder: Path) -> dict[str, Any]:
    """Where the class that an export in the original layout names puts its weights, and what it `needs` besides."""
    from transformers import AutoConfig, LlavaConfig
    from wheels import Record, place, tensors_of

    record, needs = Record(), []
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        config = AutoConfig.from_pretrained(folder)
    except ValueError:  # SGLang asks transformers, and has no model types of the original code
        needs.append("model_type 'llava' in config.json")
        config = LlavaConfig.from_dict({**values, "model_type": "llava"})
    if (folder / values["mm_vision_tower"]).is_dir():
        needs.append("to be started in the folder: it looks for the encoder beside itself")
    model = getattr(load(wheel, record, values), values["architectures"][0])(config)
    with chdir(folder):
        found = place(model, tensors_of(folder), record)
    record.filled |= {id(each): {None} for each in model.vision_tower.parameters()}  # it reads them from that folder
    return {**found, "unfilled": record.unfilled(model), "needs": needs}


def strategy_refusal(wheel: Path) -> str:
    """What the class for transformers' layout says of the strategy that LLaVA-1.5 has; empty if it takes it."""
    from wheels import Record

    module = load(wheel, Record())
    model = SimpleNamespace(vision_feature_select_strategy="default", named_parameters=dict)
    try:
        module.LlavaForConditionalGeneration.load_weights(model, [])
    except ValueError as error:
        return str(error)
    return ""


def registered(wheel: Path) -> set[str]:
    """Classes that SGLang finds by name: what its model files list under `EntryClass`."""
    names: set[str] = set()
    with zipfile.ZipFile(wheel) as archive:
        for file in archive.namelist():
            if file.startswith("sglang/srt/models/") and file.endswith(".py"):
                # Only what follows is parsed: the files are long, and it is their last statement or nearly.
                for table in re.findall(r"^EntryClass = .*", archive.read(file).decode(), re.MULTILINE | re.DOTALL):
                    value = ast.parse(table).body[0].value  # type: ignore[attr-defined]
                    names |= {each.id for each in ast.walk(value) if isinstance(each, ast.Name)}
    return names


if __name__ == "__main__":
    sys.exit(main("sglang", __doc__ or "", prove))
