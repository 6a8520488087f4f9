"""Tiny random models, tokenizers and data, made on the spot: real files for the real loading code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    ViTConfig,
    ViTModel,
)

TEXTS = [
    "What is in the picture? A red circle.",
    "What colour is it? It is blue.",
    "Is there a triangle? yes no green yellow shape",
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:",
    "<|im_start|>user assistant <|im_end|> [INST] [/INST] <<SYS>>",
]
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 1}

# Windows are shorter than the conversations of tests, and caps low enough to bend small scores.
_WINDOW = {"sliding_window": 8}
_MIXED = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_CAPS = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5}
_TIED = {"tie_word_embeddings": True}
LLMS = {
    "llama": (LlamaForCausalLM, LlamaConfig, _GROUPED),  # Llama 2 and 3, Vicuna
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {**_GROUPED, **_TIED}),  # Llama 3.2, SmolLM2
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _GROUPED),
    "qwen2-tied": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {**_GROUPED, **_MIXED, **_TIED, "use_sliding_window": True},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**_GROUPED, "head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, {**_GROUPED, **_WINDOW}),
    "gemma": (GemmaForCausalLM, GemmaConfig, {**_GROUPED, "head_dim": 16}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**_GROUPED, **_MIXED, **_CAPS, "head_dim": 16}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**_GROUPED, **_MIXED, "head_dim": 16}),
    "phi": (PhiForCausalLM, PhiConfig, _SMALL),
    "phi3": (Phi3ForCausalLM, Phi3Config, {**_SMALL, **_WINDOW, "num_key_value_heads": 2}),  # Phi-3 and 4
    "smollm3": (
        SmolLM3ForCausalLM,
        SmolLM3Config,
        {**_GROUPED, **_MIXED, "use_sliding_window": True, "no_rope_layers": [1, 0]},
    ),
    # Not named anywhere: any other causal LM of a similar make.
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, _GROUPED),
    "granite": (
        GraniteForCausalLM,
        GraniteConfig,
        {**_GROUPED, **_TIED, "embedding_multiplier": 3.0, "logits_scaling": 7.0, "attention_multiplier": 0.1},
    ),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig, _SMALL),
}
PADDED_LLMS = {"stablelm": (StableLmForCausalLM, StableLmConfig, {**_GROUPED, "num_key_value_heads": 2})}
"""They compute attention in a way of their own, which packed rows do not have."""
_TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TOWERS = {
    "clip": (
        CLIPVisionModel,
        CLIPVisionConfig,
        {**_TOWER, "intermediate_size": 48, "image_size": 28, "patch_size": 14},
        "CLIPImageProcessor",
    ),
    "siglip": (
        SiglipVisionModel,
        SiglipVisionConfig,
        {**_TOWER, "intermediate_size": 48, "image_size": 28, "patch_size": 14},
        "SiglipImageProcessor",
    ),
    "dinov2": (
        Dinov2Model,
        Dinov2Config,
        {**_TOWER, "mlp_ratio": 2, "image_size": 28, "patch_size": 14},
        "BitImageProcessor",
    ),
    "dinov2-registers": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig,
        {**_TOWER, "mlp_ratio": 2, "image_size": 28, "patch_size": 14, "num_register_tokens": 3},
        "BitImageProcessor",
    ),
    "dinov3": (
        DINOv3ViTModel,
        DINOv3ViTConfig,
        {**_TOWER, "intermediate_size": 48, "image_size": 28, "patch_size": 14, "num_register_tokens": 2},
        "BitImageProcessor",
    ),
    "vit": (
        ViTModel,
        ViTConfig,
        {**_TOWER, "intermediate_size": 48, "image_size": 28, "patch_size": 14},
        "ViTImageProcessor",
    ),
}
"""SigLIP2 of fixed resolution is SigLIP's class."""


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML and Llama control tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_llm(folder: Path, family: str = "llama") -> Path:
    """A random LLM folder with its tokenizer."""
    tokenizer = make_tokenizer(folder)
    model_class, config_class, sizes = {**LLMS, **PADDED_LLMS}[family]
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    torch.manual_seed(0)
    model_class(config_class(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(folder)
    return folder


def make_tower(folder: Path, family: str = "clip") -> Path:
    """A random vision encoder folder with its preprocessor file."""
    model_class, config_class, sizes, processor = TOWERS[family]
    torch.manual_seed(1)
    model_class(config_class(**sizes)).save_pretrained(folder)
    size = (
        {"shortest_edge": 28}
        if processor not in ("SiglipImageProcessor", "ViTImageProcessor")
        else {"height": 28, "width": 28}
    )
    values = {
        "image_processor_type": processor,
        "do_resize": True,
        "size": size,
        "do_center_crop": True,
        "crop_size": {"height": 28, "width": 28},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.25],
        "resample": 3,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def make_data(folder: Path, count: int = 24, name: str = "data.json") -> Path:
    """LLaVA records about coloured pictures; every fifth is text only, some have two turns."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30)}
    rng = np.random.default_rng(0)
    records = []
    for index in range(count):
        colour = list(colours)[index % 3]
        pixels = np.full((20 + index, 36, 3), colours[colour], dtype=np.uint8) + rng.integers(
            0, 30, (20 + index, 36, 3), dtype=np.uint8
        )
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat colour is it?"},
            {"from": "gpt", "value": f"It is {colour}."},
        ]
        if index % 4 == 3:
            turns += [{"from": "human", "value": "Is there a triangle?"}, {"from": "gpt", "value": "no"}]
        record = {"id": f"r{index}", "image": f"{index}.png", "conversations": turns}
        if index % 5 == 4:
            record = {
                "id": f"r{index}",
                "conversations": [{"from": "human", "value": "Say yes."}, {"from": "gpt", "value": "yes"}],
            }
        records.append(record)
    path = folder / name
    path.write_text(json.dumps(records))
    return path


def make_recipe(folder: Path, **changes: object) -> Path:
    """A recipe over tiny parts and data in `folder` that trains in a second or two."""
    vision = folder / "vision" if (folder / "vision").exists() else make_tower(folder / "vision")
    llm = folder / "llm" if (folder / "llm").exists() else make_llm(folder / "llm")
    data = folder / "data" / "data.json" if (folder / "data").exists() else make_data(folder / "data")
    values = {
        "name": "tiny",
        "output": str(folder / "run"),
        "seed": 3,
        "model": {"vision": str(vision), "llm": str(llm)},
        "data": {
            "template": "vicuna_v1",
            "train": [{"path": str(data)}],
            "validation_fraction": 0.2,
            "max_length": 256,
            "cache_dir": str(folder / "prepared"),
            "num_workers": 0,
        },
        "tune": {"llm": {"mode": "lora", "learning_rate": 0.01}, "lora": {"r": 4, "alpha": 8, "dropout": 0.1}},
        "optimization": {
            "learning_rate": 0.01,
            "global_batch_size": 6,
            "micro_batch_size": 2,
            "epochs": 2,
            "precision": "fp32",
        },
        "speed": {"recompute": "none"},  # "auto" measures for a second
        "engine": {"device": "cpu"},
        "checkpoint": {"save_every": 3},
        "monitor": {"eval_every": 4},
    }
    for dotted, value in changes.items():
        target = values
        *sections, last = dotted.split("__")
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values))
    return path


def write_gguf(gguf, path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """A float32 GGUF file of a Llama with a byte-level BPE vocabulary, as llama.cpp's converter lays it out."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    special = {row["id"] for row in backend["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index in special else 1 for index in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    linear = {
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "o": "attn_output",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    }
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for key, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        if key not in fixed:
            layer, kind = key.split(".")[2], key.split(".")[-2]
            head = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(kind)
            if head:  # llama.cpp pairs neighbouring rotary dimensions
                array = array.reshape(head, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            key_out = f"blk.{layer}.{names.get(kind) or linear[kind.removesuffix('_proj')]}.weight"
        else:
            key_out = fixed[key]
        writer.add_tensor(key_out, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
