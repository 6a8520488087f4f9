"""Ask a base with adapters over it, as stock transformers and PEFT load them: a script for a fresh process.

    python -I adapter_probe.py FOLDER DTYPE PICTURE QUESTION OUT.safetensors

It imports nothing of ours but `stock_probe`, which lies beside it and does neither. Writes and prints what that does.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file


def _beside(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(folder: str, dtype: str, picture: str, question: str, out: str) -> None:
    """See the head of this file."""
    stock = _beside("stock_probe")
    config = peft.PeftConfig.from_pretrained(folder)
    base, info = transformers.AutoModelForImageTextToText.from_pretrained(
        config.base_model_name_or_path,
        revision=config.revision or "main",
        dtype=getattr(torch, dtype),
        output_loading_info=True,
    )
    kind, tied = type(base).__name__, getattr(base.config, "tie_word_embeddings", False)
    processor = stock.load_processor(folder, base.config, False)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    loaded = peft.set_peft_model_state_dict(model, peft.load_peft_weights(folder, device="cpu"))
    own = [key for key in loaded.missing_keys if ".lora_" in key or ".modules_to_save." in key]
    tensors, prompts = {}, {}
    shown: dict[str, list[Image.Image]] = {"image": [Image.open(picture)], "text": []}
    for name, images in shown.items():
        prompts[name], found = stock.ask(model, processor, question, images)
        tensors.update({f"{name}.{key}": value for key, value in found.items()})
    save_file(tensors, out)
    missing = [k for k in info["missing_keys"] if not (tied and k.endswith("lm_head.weight"))]
    result = {
        "missing": missing + own,
        "unexpected": sorted([*info["unexpected_keys"], *loaded.unexpected_keys]),
        "prompts": {name: prompt for name, prompt in prompts.items() if prompt},
        "class": kind,
        "versions": f"transformers {transformers.__version__} and peft {peft.__version__}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
