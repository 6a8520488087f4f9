"""A stock `LlavaForConditionalGeneration` folder as a model of ours."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from llava_train.errors import CheckpointError
from llava_train.model.assemble import Assembly
from llava_train.model.encoders import key_report, vision_shape
from llava_train.model.screening import screen_configs, screen_weights
from llava_train.model.spec import ModelSpec, PartSource


def load_stock(folder: Path, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa") -> Assembly:
    """A stock LlavaForConditionalGeneration folder, strictly."""
    screen_configs(folder)
    screen_weights(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what is wrong with a folder comes as many types
        raise CheckpointError(f"{folder}: is no model: {error}") from error
    if not isinstance(config, LlavaConfig):
        raise CheckpointError(f"{folder}: holds a {config.model_type!r} model, not a Llava model")
    try:
        model, info = LlavaForConditionalGeneration.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
        )
        processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except Exception as error:  # what is wrong with weights comes as many types
        raise CheckpointError(f"{folder}: cannot be loaded as a Llava model: {error}") from error
    missing = [k for k in info["missing_keys"] if not (config.tie_word_embeddings and k.endswith("lm_head.weight"))]
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        raise CheckpointError(f"{folder}: the weights do not fit a stock Llava model: {key_report(missing, info)}")
    source = PartSource(str(folder), kind="llava")
    size = processor.image_processor.crop_size or processor.image_processor.size
    spec = ModelSpec(
        vision=source,
        llm=source,
        connector="mlp2x_gelu",
        connector_options={},
        image_size=int(size["height"]),
        image_tokens=_stock_image_tokens(config, int(size["height"])),
        image_aspect_ratio="pad" if getattr(processor.image_processor, "do_pad", False) else "crop",
        template="tokenizer",
    )
    template = processor.chat_template or processor.tokenizer.chat_template
    if not template:
        raise CheckpointError(f"{folder}: carries no chat template")
    return Assembly(
        model.eval(),
        processor.tokenizer,
        processor.image_processor,
        spec,
        template,
        int(model.get_input_embeddings().weight.shape[0]),
    )


def _stock_image_tokens(config: LlavaConfig, size: int) -> int:
    return vision_shape(config.vision_config, size).tokens(config.vision_feature_select_strategy)
