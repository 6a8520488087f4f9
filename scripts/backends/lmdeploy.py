#!/usr/bin/env python3
"""Weight names of `hf` exports against LMDeploy's PyTorch engine, which runs on no CPU: its LLaVA file, from its wheel.

    python scripts/backends/lmdeploy.py --work runs/backends

Its own `load_weights` is run over the weights of exports; every weight must find its place, every place its weight.
Nothing is generated.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common import FailedError, main, step

VERSION = "0.18.0"
FILE = "lmdeploy/pytorch/models/llava.py"
MODELS = {"llama-clip": "LlavaForConditionalGeneration", "llama-clip-anyres": "LlavaNextForConditionalGeneration"}
REFUSED = "qwen2-siglip"


def prove(work: Path, environments: Path) -> dict[str, Any]:
    """What the JSON says."""
    from models import exported, make_model
    from wheels import find_wheel

    wheel = find_wheel("lmdeploy", VERSION, environments / "wheels")
    found: dict[str, Any] = {}
    for name, class_name in MODELS.items():
        folder = exported(make_model(work, name))
        with step(f"LMDeploy {VERSION}: weights of {name}"):
            found[name] = placed(wheel, folder, class_name)
        if found[name]["unplaced"] or found[name]["unfilled"]:
            raise FailedError(f"{name}: {found[name]}")
    folder = exported(make_model(work, REFUSED))
    try:
        placed(wheel, folder, MODELS["llama-clip"])
    except NotImplementedError as error:
        found[REFUSED] = {"refused": str(error)}
    else:
        raise FailedError(
            f"{REFUSED}: LMDeploy now takes its encoder; docs/backends.md and exporters/backends.py say no"
        )
    return {"version": VERSION, "weights": found, "generated": False}


def placed(wheel: Path, folder: Path, class_name: str) -> dict[str, Any]:
    """Where a class of LMDeploy puts the weights of an export; NotImplementedError for an encoder it does not have."""
    from torch import nn
    from transformers import AutoConfig
    from wheels import Decoder, Record, load_module, place, tensors_of

    record = Record()

    def linear(width: int, out: int, bias: bool, **_: Any) -> nn.Linear:
        return nn.Linear(width, out, bias)

    def joined(width: int, num_q_heads: int, num_kv_heads: int, head_size: int, bias: bool, **_: Any) -> nn.Linear:
        return nn.Linear(width, (num_q_heads + 2 * num_kv_heads) * head_size, bias)

    given = {
        "build_colwise_linear": linear,
        "build_rowwise_linear": linear,
        "build_qkv_proj": joined,
        "build_model_from_hf_config": lambda config, **_: Decoder(config, record),
        "load_weight": lambda parameter, weight, shard_id=None: record.put(parameter, weight, shard_id),
        "vlm_model": lambda kind: kind,
        **{name: type(name, (), {"__init__": lambda *_, **__: None}) for name in ("BaseModelInputProcessor",)},
    }
    module = load_module(wheel, FILE, given)
    model = getattr(module, class_name)(AutoConfig.from_pretrained(folder), None)
    return {**place(model, tensors_of(folder), record), "unfilled": record.unfilled(model)}


if __name__ == "__main__":
    sys.exit(main("lmdeploy", __doc__ or "", prove))
