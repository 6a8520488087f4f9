"""An export proves itself: what was written is loaded by the stock class in a fresh process and compared.

The probe is one picture with one question and the same question without a picture.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_train.errors import ExportError
from llava_train.inference import Prompt, batch_inputs, message, prompt_ids, read_pictures, render
from llava_train.model.assemble import Assembly

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference of a logit, relative to the largest logit."""
QUESTION = "What is in the picture?"

_STOCK = """
import json, os, sys
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
folder, picture, question, out = sys.argv[1:]
model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
kind = PROCESSOR_MAPPING[type(model.config)]
if "video_processor" in kind.get_attributes():
    # Its part for video, which the probe has no use for, cannot be loaded without torchvision.
    kind = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    file = os.path.join(folder, "processor_config.json")
    own = json.load(open(file)) if os.path.exists(file) else {}
    own.pop("processor_class", None)
    processor = kind(image_processor, tokenizer, video_processor=None, chat_template=tokenizer.chat_template, **own)
else:
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
tensors, prompts = {}, {}
for name, images in (("image", [Image.open(picture)]), ("text", [])):
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompts[name] = prompt
    if not prompt:
        continue
    inputs = processor(text=[prompt], images=images or None, return_tensors="pt", add_special_tokens=False)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        tensors[name + ".logits"] = model(**inputs).logits[0].float()
        tensors[name + ".ids"] = inputs["input_ids"][0]
save_file(tensors, out)
tied = model.config.tie_word_embeddings
print(json.dumps({
    "missing": [k for k in info["missing_keys"] if not (tied and k.endswith("lm_head.weight"))],
    "unexpected": sorted(info["unexpected_keys"]),
    "prompts": prompts,
    "class": type(model).__name__,
    "our_package": "llava_train" in sys.modules,
}))
"""


def probe_picture(size: int) -> Image.Image:
    """A picture of seeded noise, wider than high, so that padding and cropping are part of the check."""
    noise = np.random.default_rng(0).integers(0, 256, (size, size * 3 // 2, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def verify(assembly: Assembly, folder: Path) -> dict[str, Any]:
    """Compare the folder, as stock transformers loads it, with the model it was made from.

    Returns the report: largest logit differences, tolerance, and that prompts and ids are equal.
    Raises ExportError naming what differs.
    """
    model = assembly.model
    with TemporaryDirectory() as scratch:
        picture, out = Path(scratch) / "probe.png", Path(scratch) / "stock.safetensors"
        image = probe_picture(assembly.spec.image_size)
        image.save(picture)
        stock = _run_stock(folder, picture, out)
        theirs = load_file(str(out))
    faults = [f"{kind} keys: {', '.join(stock[kind][:10])}" for kind in ("missing", "unexpected") if stock[kind]]
    if stock["class"] != type(model).__name__:
        faults.append(f"it is loaded as a {stock['class']}, not a {type(model).__name__}")
    differences = {}
    for name, images in (("image", [image]), ("text", [])):
        prompt = stock["prompts"][name]
        ours = Prompt((message("user", QUESTION, len(images)),), read_pictures(assembly, images))
        if render(assembly, ours.messages) != prompt:
            faults.append(f"{name}: the prompt renders as {prompt!r}")
            continue
        if not prompt:  # the `plain` template says nothing without a picture
            continue
        if prompt_ids(assembly, ours) != theirs[f"{name}.ids"].tolist():
            faults.append(f"{name}: the prompt's ids differ")
            continue
        with torch.inference_mode():
            logits = model(**batch_inputs(assembly, [ours])).logits[0].float().cpu()
        scale = logits.abs().max().clamp_min(1.0)
        differences[name] = float((logits - theirs[f"{name}.logits"]).abs().max() / scale)
    tolerance = TOLERANCE[model.dtype]
    faults += [
        f"{name}: logits differ by {d:.2e} (at most {tolerance:g})" for name, d in differences.items() if d > tolerance
    ]
    if faults:
        raise ExportError(f"{folder}: the export does not match the model: {'; '.join(faults)}")
    return {
        "verified": True,
        "loaded_with": f"transformers.{stock['class']} in a fresh process",
        "max_logit_difference": differences,
        "tolerance": tolerance,
        "prompts_equal": True,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _run_stock(folder: Path, picture: Path, out: Path) -> dict[str, Any]:
    # -I leaves the current folder and PYTHONPATH out; our package is not imported by what runs there.
    command = [sys.executable, "-I", "-c", _STOCK, str(folder.absolute()), str(picture), QUESTION, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ExportError(f"{folder}: stock transformers cannot load the export: {last[0]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    if result.pop("our_package"):
        raise ExportError("the check imported llava_train: it proves nothing")
    return result
