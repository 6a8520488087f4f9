"""A folder in transformers' own layout as a model of ours: LLaVA, and every other class in the table of families."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from llava_train.errors import CheckpointError
from llava_train.files import sha256_file
from llava_train.model.assemble import Assembly
from llava_train.model.families.table import FAMILIES
from llava_train.model.llm import attention_or_own
from llava_train.model.screening import own_file, read_config, screen_configs, screen_weights
from llava_train.model.spec import ModelSpec, PartSource
from llava_train.model.towers.loading import key_report

REPORT = "export_report.json"
"""What an export of ours says of itself, with the sha256 of its files."""
OWN_CODE = "llava_train"
"""`model_type` of the exports that bring their own code."""
_WANTED = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]


def load_stock(folder: Path, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa") -> Assembly:
    """A folder of a class that we know, strictly. Raises CheckpointError."""
    config, tokenizer, image_processor = read_stock(folder)
    screen_weights(folder)
    require_unchanged(folder)
    _unpack(config, folder)
    try:
        model, info = FAMILIES[config.model_type].model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention_or_own(attn_implementation),
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # what is wrong with weights comes as many types
        raise CheckpointError(f"{folder}: cannot be loaded as a {config.model_type} model: {error}") from error
    missing = [k for k in info["missing_keys"] if not (config.tie_word_embeddings and k.endswith("lm_head.weight"))]
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        raise CheckpointError(
            f"{folder}: the weights do not fit a stock {config.model_type} model: {key_report(missing, info)}"
        )
    spec = stock_spec(folder, config, image_processor)
    rows = int(model.get_input_embeddings().weight.shape[0])
    return Assembly(model.eval(), tokenizer, image_processor, spec, str(tokenizer.chat_template), rows)


def read_stock(folder: Path) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, Any]:
    """Configuration, tokenizer (with the chat template) and image processor of a folder, without its weights.

    Raises CheckpointError.
    """
    if (folder / "config.json").is_file() and read_config(folder, "config.json").get("model_type") == OWN_CODE:
        raise CheckpointError(f"{folder}: is an export of target remote-code, for others; load the run it was made of")
    screen_configs(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what is wrong with a folder comes as many types
        raise CheckpointError(f"{folder}: is no model: {error}") from error
    config.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)  # some classes never tie, nor say so
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"{folder}: holds a {config.model_type!r} model, not one of those we know: {known}")
    try:
        # Not the processor as a whole: some bring a part for video that cannot be loaded without torchvision.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{folder}: its tokenizer or image processor cannot be read: {error}") from error
    tokenizer.chat_template = _chat_template(folder, tokenizer)
    return config, tokenizer, image_processor


def stock_spec(folder: Path, config: PretrainedConfig, image_processor: Any) -> ModelSpec:
    """What such a folder's model is made of: all of it comes from there."""
    source = PartSource(str(folder), kind="llava")
    described = FAMILIES[config.model_type].describe(config, image_processor)
    return ModelSpec(
        vision=source,
        llm=source,
        connector_options={},
        template="tokenizer",
        architecture=config.model_type,
        **described,
    )


def from_hub(name: str, hint: str) -> Path:
    """The folder of a model on the hub (`organisation/name`), fetched unless it is there. Raises CheckpointError."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise CheckpointError(f"{name}: no such folder ({hint})")
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except Exception as error:  # offline, not there, not allowed, no space: many types
        raise CheckpointError(f"{name}: no such folder, and not to be had from the hub: {error}") from error


def require_unchanged(folder: Path) -> None:
    """CheckpointError if weights that an export of ours wrote are not those any more."""
    if not (folder / REPORT).is_file():
        return
    files = read_config(folder, REPORT).get("files")
    for name, digest in files.items() if isinstance(files, dict) else ():
        if name.endswith((".safetensors", ".bin")) and sha256_file(own_file(folder, name)) != digest:
            raise CheckpointError(f"{folder / name}: does not match its sha256 in {REPORT}: changed or damaged")


def _unpack(config: PretrainedConfig, folder: Path) -> None:
    """Have quantised weights unpacked as they are loaded: a model of ours computes, trains and is written with plain
    layers. Raises CheckpointError for what is not read."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method != "compressed-tensors":
        raise CheckpointError(f"{folder}: its weights are quantised by {method!r}; only compressed-tensors is read")
    if find_spec("compressed_tensors") is None:
        raise CheckpointError(f"{folder}: its weights are quantised: pip install 'llava-train[quantize]' to read them")
    found["dequantize"] = True


def _chat_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """From wherever the versions of transformers have put it. CheckpointError if it is nowhere."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        template = read_config(folder, "chat_template.json").get("chat_template")
    else:
        template = tokenizer.chat_template
    if not isinstance(template, str) or not template:
        raise CheckpointError(f"{folder}: carries no chat template")
    return template
