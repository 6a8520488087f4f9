#!/usr/bin/env python3
"""An `hf` export in stock transformers, the oldest and the newest version that we say reads it, without our package.

    python scripts/backends/transformers_stock.py oldest --work runs/backends

Every model is trained, exported and asked one question with a picture and one without; logits, prompts and greedy
tokens are compared with those of the model before it was exported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common import environment, main, step

OLDEST, NEWEST = "4.49.0", "5.23.0"
"""Older ones lack `LlavaImageProcessor`, which pads a picture to a square."""
MODELS = ("llama-clip", "qwen2-siglip", "llama-clip-anyres", "qwen2-siglip-anyres_max")


def prove(version: str, work: Path, environments: Path) -> dict[str, Any]:
    """What the JSON says."""
    from models import exported, make_model

    from llava_train.exporters.verify import ask_stock, compare

    python = environment(environments, f"transformers-{version}", pins(version))
    found = {}
    for name in MODELS if version == OLDEST else MODELS[:2]:  # the newest reads each export that is made
        tiny = make_model(work, name)
        folder = exported(tiny)
        with step(f"transformers {version}: {name}"):
            stock, asked = ask_stock(folder, tiny.reference.image, python=str(python))
            faults = [f"{kind} keys: {', '.join(stock[kind])}" for kind in ("missing", "unexpected") if stock[kind]]
            report = compare(tiny.reference, asked, 1e-4, faults)
        found[name] = report
    return {
        "version": version,
        "max_logit_difference": max(max(each["max_logit_difference"].values()) for each in found.values()),
        "equal_tokens": all(each["greedy_tokens_equal"] == each["greedy_tokens"] for each in found.values()),
        "models": list(found),
    }


def pins(version: str) -> list[str]:
    """What stands in the environment; the newest serves, too."""
    serving = ["accelerate", "openai>=1.98", "uvicorn", "fastapi", "starlette", "rich"] if version == NEWEST else []
    return [f"transformers=={version}", "pillow", "safetensors", "numpy", "jinja2", *serving]


if __name__ == "__main__":
    which = sys.argv.pop(1) if sys.argv[1:2] in (["oldest"], ["newest"]) else "newest"
    number = OLDEST if which == "oldest" else NEWEST
    sys.exit(main(f"transformers-{which}", __doc__ or "", lambda work, kept: prove(number, work, kept)))
