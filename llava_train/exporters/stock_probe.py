"""Ask an exported folder with stock transformers: a script for a fresh process, which imports nothing of ours.

    python -I stock_probe.py FOLDER PICTURE QUESTION OUT.safetensors [--trust-remote-code]

Writes logits, ids and greedy tokens of the question with the picture (`image.*`) and without (`text.*`); prints one
JSON: missing and unexpected keys, rendered prompts, the class, versions.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

GREEDY_TOKENS = 16


def load_processor(folder: str, config: Any, trust_remote_code: bool) -> Any:
    """The folder's processor, without a part for video, which nobody here has a use for."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    trust: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if int(transformers.__version__.partition(".")[0]) < 5:
        processor = AutoProcessor.from_pretrained(folder, **trust)
        # Said to the processor, it would ask for a slow tokenizer, too.
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, use_fast=False, **trust)
        return processor
    plain = {"backend": "pil"}
    if trust_remote_code:
        return AutoProcessor.from_pretrained(folder, **trust, **plain)
    kind = PROCESSOR_MAPPING[type(config)]
    if "video_processor" not in kind.get_attributes():
        return AutoProcessor.from_pretrained(folder, **plain)
    # The part for video cannot be loaded without torchvision.
    kind = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(folder, **plain)
    file = os.path.join(folder, "processor_config.json")  # noqa: PTH118
    own = {}
    if os.path.exists(file):  # noqa: PTH110
        with open(file, encoding="utf-8") as opened:  # noqa: PTH123
            own = json.load(opened)
    own.pop("processor_class", None)
    return kind(image_processor, tokenizer, video_processor=None, chat_template=tokenizer.chat_template, **own)


def ask(model: Any, processor: Any, question: str, images: list[Image.Image]) -> tuple[str, dict[str, torch.Tensor]]:
    """The rendered prompt; its ids (T,), logits (T, vocabulary) and greedy tokens, unless it is empty."""
    content: list[Any] = [*[{"type": "image"}] * len(images), {"type": "text", "text": question}]
    messages: list[Any] = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if not prompt:
        return prompt, {}
    inputs = processor(text=[prompt], images=images or None, return_tensors="pt", add_special_tokens=False)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        logits = model(**inputs).logits[0].float()
        out = model.generate(**inputs, max_new_tokens=GREEDY_TOKENS, do_sample=False)
    ids = inputs["input_ids"][0]
    return prompt, {"ids": ids, "logits": logits.contiguous(), "greedy": out[0, len(ids) :].contiguous()}


def main(folder: str, picture: str, question: str, out: str, *flags: str) -> None:
    """See the head of this file."""
    trust = "--trust-remote-code" in flags
    options: dict[str, Any] = {"trust_remote_code": True} if trust else {}
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, torch_dtype="auto", output_loading_info=True, **options
    )
    processor = load_processor(folder, model.config, trust)
    tensors, prompts = {}, {}
    shown: dict[str, list[Image.Image]] = {"image": [Image.open(picture)], "text": []}
    for name, images in shown.items():
        prompts[name], found = ask(model, processor, question, images)
        tensors.update({f"{name}.{key}": value for key, value in found.items()})
    save_file(tensors, out)
    tied = getattr(model.config, "tie_word_embeddings", False)
    result = {
        "missing": [k for k in info["missing_keys"] if not (tied and k.endswith("lm_head.weight"))],
        "unexpected": sorted(info["unexpected_keys"]),
        "prompts": prompts,
        "class": type(model).__name__,
        "transformers": transformers.__version__,
        "our_package": "llava_train" in sys.modules,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
