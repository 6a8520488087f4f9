"""Read `model.gguf` and `mmproj.gguf` back: a script for a fresh process, which imports nothing of ours.

    python -I read_back.py FOLDER PICTURE QUESTION PROMPTS OUT.safetensors

Weights are dequantised by the gguf package, find their places in transformers' classes by its table of names, and the
classes' settings come from the files' metadata; transformers builds the tokenizer from the file. PROMPTS
(JSON) are taken where the file has no chat template. Writes logits, ids and greedy tokens as `stock_probe.py` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import normalizers, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

GREEDY_TOKENS = 16


class File:
    """A GGUF file: metadata and tensors, read when asked for."""

    def __init__(self, path: Path) -> None:
        self.reader = gguf.GGUFReader(path)
        self.rows = {row.name: row for row in self.reader.tensors}
        self.taken: set[str] = set()

    def value(self, key: str, default: Any = None) -> Any:
        """A piece of metadata."""
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def tensor(self, name: str | None) -> torch.Tensor:
        """float32, in the shape of torch."""
        assert name in self.rows, name
        self.taken.add(name)
        row = self.rows[name]
        values = gguf.dequantize(row.data, row.tensor_type).astype(np.float32)
        return torch.from_numpy(values.reshape(tuple(int(size) for size in reversed(row.shape))).copy())


def text_config(file: File) -> Any:
    """Configuration of the decoder. llama.cpp's architectures are named as transformers' kinds are."""
    kind = file.value("general.architecture")
    of = lambda key, default=None: file.value(f"{kind}.{key}", default)  # noqa: E731
    return AutoConfig.for_model(
        kind,
        vocab_size=len(file.value("tokenizer.ggml.tokens")),
        hidden_size=of("embedding_length"),
        intermediate_size=of("feed_forward_length"),
        num_hidden_layers=of("block_count"),
        num_attention_heads=of("attention.head_count"),
        num_key_value_heads=of("attention.head_count_kv"),
        head_dim=of("attention.key_length"),
        max_position_embeddings=of("context_length"),
        rms_norm_eps=of("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": of("rope.freq_base")},
        tie_word_embeddings="output.weight" not in file.rows,
        sliding_window=None,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
    )


def vision_config(file: File) -> Any:
    """Configuration of the encoder: CLIP with a class embedding, SigLIP without."""
    of = lambda key: file.value(f"clip.vision.{key}")  # noqa: E731
    clip = "v.class_embd" in file.rows
    gelu = file.value("clip.use_gelu")
    return AutoConfig.for_model(
        "clip_vision_model" if clip else "siglip_vision_model",
        hidden_size=of("embedding_length"),
        intermediate_size=of("feed_forward_length"),
        num_hidden_layers=of("block_count"),
        num_attention_heads=of("attention.head_count"),
        image_size=of("image_size"),
        patch_size=of("patch_size"),
        layer_norm_eps=of("attention.layer_norm_epsilon"),
        hidden_act=("gelu" if clip else "gelu_pytorch_tanh") if gelu else "quick_gelu",
        **({} if clip else {"vision_use_head": False}),
    )


def halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows whose rotary pairs are neighbours -> halves of each head, as transformers has them."""
    width = len(rows) // heads
    order = torch.arange(width).reshape(-1, 2).T.flatten()
    return rows[torch.cat([order + head * width for head in range(heads)])]


def decoder_weights(file: File, names: list[str], config: Any) -> dict[str, torch.Tensor]:
    """transformers' names -> weights, by the gguf package's table of names for the architecture."""
    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[file.value("general.architecture")]
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = {}
    for name in names:
        theirs = table.get_name(name.replace("model.language_model.", "model."), try_suffixes=(".weight", ".bias"))
        weight = file.tensor(theirs)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if config.model_type == "llama" and heads:
            weight = halves(weight, heads)
        found[name] = weight - 1 if config.model_type == "gemma" and name.endswith("norm.weight") else weight
    return found


def encoder_weights(file: File, names: list[str]) -> dict[str, torch.Tensor]:
    """The same for the encoder."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, file.value("clip.vision.block_count"))
    found = {}
    for name in names:
        full = name.replace("model.vision_tower.", "vision_tower.vision_model.")
        weight = file.tensor(table.get_name(full, try_suffixes=(".weight", ".bias")))
        last = "position_embedding" in name and file.value("llava_train.class_embedding_last")
        found[name] = torch.cat([weight[-1:], weight[:-1]]) if last else weight
    return found


def linear(file: File, name: str, factor: float = 1.0) -> nn.Linear:
    """A layer of the connector."""
    weight, bias = file.tensor(f"{name}.weight") * factor, file.tensor(f"{name}.bias") * factor
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def build(text: File, vision: File) -> LlavaForConditionalGeneration:
    """transformers' LLaVA with the files' weights."""
    tokens = text.value("tokenizer.ggml.tokens")
    layers, clip = vision.value("clip.vision.feature_layer"), "v.class_embd" in vision.rows
    config = LlavaConfig(
        vision_config=vision_config(vision),
        text_config=text_config(text),
        image_token_id=tokens.index("<image>"),
        projector_hidden_act="gelu",
        vision_feature_layer=layers[0] if len(layers) == 1 else layers,
        vision_feature_select_strategy="default" if clip else "full",
        tie_word_embeddings="output.weight" not in text.rows,
    )
    model = LlavaForConditionalGeneration(config).eval()
    # Gemma multiplies embeddings by the root of the width, and llama.cpp does it to pictures, too.
    factor = config.text_config.hidden_size**0.5 if config.text_config.model_type == "gemma" else 1.0
    model.model.multi_modal_projector.linear_1 = linear(vision, "mm.0")
    model.model.multi_modal_projector.linear_2 = linear(vision, "mm.2", factor)
    names = [name for name in model.state_dict() if "multi_modal_projector" not in name]
    unread = ("post_layernorm", "vision_tower.head")  # behind the features, so not in the file
    inner = [n for n in names if n.startswith("model.vision_tower.") and not any(part in n for part in unread)]
    outer = [n for n in names if not n.startswith("model.vision_tower.")]
    if config.tie_word_embeddings:
        outer.remove("lm_head.weight")
    weights = encoder_weights(vision, inner) | decoder_weights(text, outer, config.text_config)
    left = model.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys, left.unexpected_keys
    if "rope_freqs.weight" in text.rows:
        rotary = model.model.language_model.rotary_emb
        rotary.inv_freq = rotary.inv_freq / text.tensor("rope_freqs.weight")
    ends = [text.value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    model.generation_config.eos_token_id = [index for index in ends if index is not None]
    model.generation_config.pad_token_id = text.value("tokenizer.ggml.padding_token_id")
    return model


def read_tokenizer(folder: str, text: File) -> Any:
    """transformers' tokenizer of the file, with what it leaves out: spaces before a text, digits one by one."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    backend = tokenizer.backend_tokenizer
    if text.value("tokenizer.ggml.model") == "llama" and text.value("tokenizer.ggml.add_space_prefix"):
        # llama.cpp writes one behind control tokens, too.
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    if text.value("tokenizer.ggml.pre") == "smollm":
        steps = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def pixels(vision: File, image: Image.Image) -> torch.Tensor:
    """As in training: the file carries our image processor's settings."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "preprocessor_config.json"
        path.write_text(vision.value("llava_train.image_processor"), encoding="utf-8")
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    values: torch.Tensor = processor(images=[image], return_tensors="pt")["pixel_values"]
    return values


def ask(model: Any, tokenizer: Any, prompt: str, image: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """ids (T,), logits (T, vocabulary) and greedy tokens of a prompt."""
    config = model.config
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    text = prompt.replace("<image>", "<image>" * patches)
    inputs = dict(tokenizer(text, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False))
    if image is not None:
        inputs["pixel_values"] = image
    with torch.inference_mode():
        logits = model(**inputs).logits[0].float()
        out = model.generate(**inputs, max_new_tokens=GREEDY_TOKENS, do_sample=False)
    ids = inputs["input_ids"][0]
    return {"ids": ids, "logits": logits.contiguous(), "greedy": out[0, len(ids) :].contiguous()}


def main(folder: str, picture: str, question: str, prompts: str, out: str) -> None:
    """See the head of this file."""
    text, vision = File(Path(folder) / "model.gguf"), File(Path(folder) / "mmproj.gguf")
    model, tokenizer = build(text, vision), read_tokenizer(folder, text)
    shown, tensors, answers = json.loads(prompts), {}, {}
    for name in shown:
        if tokenizer.chat_template:
            parts = [{"type": "image"}] * (name == "image") + [{"type": "text", "text": question}]
            messages: Any = [{"role": "user", "content": parts}]
            shown[name] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        image = pixels(vision, Image.open(picture)) if name == "image" else None
        found = ask(model, tokenizer, shown[name], image)
        tensors.update({f"{name}.{key}": each for key, each in found.items()})
        answers[name] = tokenizer.decode(found["greedy"], skip_special_tokens=True)
    save_file(tensors, out)
    unused = [name for file in (text, vision) for name in file.rows.keys() - file.taken]
    result = {
        "prompts": shown,
        "answers": answers,
        "bos": tokenizer.bos_token if text.value("tokenizer.ggml.add_bos_token") else "",
        "faults": [f"a tensor that nothing reads: {name}" for name in sorted(unused)],
        "class_embedding": "v.class_embd" in vision.rows,
        "chat_template": bool(tokenizer.chat_template),
        "loaded_with": f"gguf {_version()}, transformers {transformers.__version__}: {type(model).__name__}, "
        "dequantised in a fresh process",
        "our_package": "llava_train" in sys.modules,
    }
    print(json.dumps(result))


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")


if __name__ == "__main__":
    main(*sys.argv[1:])
