"""What brings text and pictures to an exported model: tokenizer, image processor, template, and how to count tokens.

In the files of new readers and of old ones: transformers 4 reads `preprocessor_config.json` and `chat_template.json`,
and stumbles over an image processor inside `processor_config.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_train.data.templates.template import portable
from llava_train.files import write_json
from llava_train.model.assemble import Assembly
from llava_train.model.families.llava import Llava
from llava_train.model.families.table import family_of
from llava_train.model.llm import IMAGE_TOKEN
from llava_train.model.towers.shapes import vision_shape

_PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
}


def write_reading(assembly: Assembly, folder: Path) -> None:
    """Write all of it for a class of transformers, by the files of its parts: one for video need not be there."""
    family = family_of(assembly.model)
    # Our templates write `<image>` for a picture, which Qwen2-VL and Mllama do not know.
    template = portable(assembly.template).replace(f"{IMAGE_TOKEN}\\n", family.marker + repr(family.line_end)[1:-1])
    assembly.tokenizer.chat_template = template
    assembly.tokenizer.save_pretrained(folder)
    assembly.image_processor.save_pretrained(folder)
    if isinstance(family, Llava):
        write_json(folder / "processor_config.json", counting(assembly))
    complete_tokenizer(folder)
    write_template(template, folder)


def counting(assembly: Assembly) -> dict[str, Any]:
    """What the processors of LLaVA's classes must know to count a picture's tokens (processor_config.json)."""
    config, architecture = assembly.model.config, assembly.spec.architecture
    shape = vision_shape(config.vision_config, assembly.spec.image_size)
    strategy = config.vision_feature_select_strategy
    values = {"vision_feature_select_strategy": strategy, "image_token": IMAGE_TOKEN}
    if architecture == "llava_onevision":
        own = {"num_image_tokens": shape.tokens("full"), "vision_aspect_ratio": config.vision_aspect_ratio}
    else:
        own = {"patch_size": shape.patch_size, "num_additional_image_tokens": shape.tokens("full") - shape.patches}
    return {"processor_class": _PROCESSORS[architecture], **values, **own}


def complete_tokenizer(folder: Path) -> None:
    """Say of the tokenizer what readers before transformers 5 must know, in words that newer ones read too."""
    path = folder / "tokenizer_config.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key in ("backend", "is_local", "local_files_only"):  # how it was loaded here
        values.pop(key, None)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    # They would make `token_type_ids`, which no decoder takes.
    write_json(path, {**values, "model_input_names": ["input_ids", "attention_mask"]})


def write_template(template: str, folder: Path) -> None:
    """The chat template, for new readers and old ones."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(folder / "chat_template.json", {"chat_template": template})
