"""Tiny random checkpoints of published vision-language models: the files, names and layout that their folders have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from tests.tiny import TEXTS

_QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN_TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
{%- if messages and messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{%- set seen.images = seen.images + 1 -%}
{%- if add_vision_id -%}{{- 'Picture ' ~ seen.images ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' or 'video' in part -%}
{%- set seen.videos = seen.videos + 1 -%}
{%- if add_vision_id -%}{{- 'Video ' ~ seen.videos ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""Writes what the template of Qwen/Qwen2-VL-2B-Instruct writes."""
_QWEN_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "max_window_layers": 2,
    "sliding_window": 512,
    "use_sliding_window": False,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
}


def make_qwen2_vl(folder: Path) -> Path:
    """As Qwen/Qwen2-VL-2B-Instruct: embeddings and head are one."""
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2, "in_chans": 3}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}
    return _make_qwen(folder, Qwen2VLForConditionalGeneration, Qwen2VLConfig, vision, tied=True)


def make_qwen2_5_vl(folder: Path) -> Path:
    """As Qwen/Qwen2.5-VL-7B-Instruct: a head of its own; windows of 2 x 2 tokens in the tower's first layer."""
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}
    vision |= {"window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2, "in_chans": 3}
    return _make_qwen(folder, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, vision, tied=False)


def _make_qwen(folder: Path, kind: type[PreTrainedModel], config: Any, vision: dict[str, Any], tied: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _qwen_tokenizer(folder)
    ids = dict(zip(_QWEN_SPECIAL, tokenizer.convert_tokens_to_ids(list(_QWEN_SPECIAL))))
    values = {
        **_QWEN_TEXT,
        "architectures": [kind.__name__],
        "model_type": config.model_type,
        "vocab_size": len(tokenizer),
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "vision_config": vision,
    }
    torch.manual_seed(0)
    kind(config(**values)).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))  # published ones are flat
    eos = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    sampling = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.0}
    generation = {"bos_token_id": eos[1], "eos_token_id": eos, "pad_token_id": eos[1], **sampling}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor" if tied else "Qwen2_5_VLProcessor",
        "min_pixels": 4 * 28 * 28,
        "max_pixels": 16 * 28 * 28,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": _QWEN_TEMPLATE}))
    return folder


def _qwen_tokenizer(folder: Path) -> Qwen2Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    learned = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        learned["vocab"],
        [tuple(merge) for merge in learned["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[*_QWEN_SPECIAL],
    )
    tokenizer.chat_template = _QWEN_TEMPLATE
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    (folder / "vocab.json").write_text(json.dumps(learned["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(merge) for merge in learned["merges"]))
    return tokenizer


_LLAMA3 = ["begin_of_text", "end_of_text", "finetune_right_pad_id", "start_header_id", "end_header_id", "eot_id"]
_MLLAMA_TEMPLATE = """{{- bos_token }}
{%- set shown = namespace(any=false) %}
{%- for message in messages %}{%- for part in message['content'] %}{%- if part['type'] == 'image' %}
{%- set shown.any = true %}
{%- endif %}{%- endfor %}{%- endfor %}
{%- if not shown.any %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n' }}
{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\\n\\n<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['content'] is string %}{{- message['content'] }}{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '<|image|>' }}{%- else %}{{- part['text'] }}{%- endif %}
{%- endfor %}{%- endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
"""Dates only where no picture is shown, which it sees only where contents are lists: as Meta's."""


def make_mllama(folder: Path) -> Path:
    """As meta-llama/Llama-3.2-11B-Vision-Instruct: a head shorter than the embeddings; gates open."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _llama3_tokenizer()
    config = MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "intermediate_layers_indices": [0, 2],
            "vision_output_dim": 96,
        },
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "cross_attention_layers": [1, 3],
            "vocab_size": len(tokenizer) - 1,  # the embeddings have 8 rows more, `<|image|>` among them
            "max_position_embeddings": 512,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if "gate" in name and weight.numel() == 1:
            torch.nn.init.constant_(weight, 0.7)
        elif name.endswith("embedding.weight"):  # of tiles
            torch.nn.init.normal_(weight)
        elif "cross_attn" in name and weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    model.save_pretrained(folder)
    weights = {_published(name): tensor for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": _MLLAMA_TEMPLATE}))
    values = {
        "image_processor_type": "MllamaImageProcessor",
        "size": {"height": 28, "width": 28},
        "max_image_tiles": 4,
        "resample": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        **dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_pad"), True),
        "rescale_factor": 1 / 255,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def _published(name: str) -> str:
    """The name by which the published checkpoints hold a weight of an Mllama."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1)


def _llama3_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the control tokens of Llama 3, `<|image|>` the last of all."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    tokens = [f"<|{name}|>" for name in [*_LLAMA3, "python_tag", "image"]]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.add_special_tokens({"bos_token": tokens[0], "eos_token": "<|eot_id|>", "pad_token": tokens[2]})
    return tokenizer
