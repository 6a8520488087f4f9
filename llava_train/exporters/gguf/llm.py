"""The language model's GGUF file: metadata and tensors, as llama.cpp's own converter lays them out.

A kind is here once its logits were equal to transformers' in llama.cpp itself (`scripts/backends/llama_cpp.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llava_train.exporters.gguf.writing import Entry
from llava_train.model.assemble import Assembly

_FIXED = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
_IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_FUSED = {"self_attn.qkv_proj.weight": "attn_qkv.weight", "mlp.gate_up_proj.weight": "ffn_up.weight"}
_BIASES = {f"self_attn.{one}_proj.bias": f"attn_{one}.bias" for one in "qkv"}
_HEAD_NORMS = {f"self_attn.{one}_norm.weight": f"attn_{one}_norm.weight" for one in "qk"}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_SHORTEST_WINDOW = 1024


@dataclass(frozen=True)
class Kind:
    """How llama.cpp has an LLM of transformers.

    Attributes:
        architecture: llama.cpp's name.
        names: a weight in a layer -> its name there.
        activation: the only one of its feed-forward layers.
        paired: rotary dimensions are neighbours there, and half a head apart here: rows of q and k change places.
        scaled_rope: what rope may be besides `default`.
        shift: what its norms add to their weights.
        scales_pictures: llama.cpp multiplies pictures by the root of the width, too; transformers only embeddings.
    """

    architecture: str
    names: dict[str, str]
    activation: str = "silu"
    paired: bool = False
    scaled_rope: tuple[str, ...] = ()
    shift: float = 0.0
    scales_pictures: bool = False


_LLAMA = Kind("llama", _IN_LAYER, paired=True, scaled_rope=("llama3",))
KINDS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Kind("qwen2", {**_IN_LAYER, **_BIASES}),
    "qwen3": Kind("qwen3", {**_IN_LAYER, **_HEAD_NORMS}),
    "phi3": Kind("phi3", {**_IN_LAYER, **_FUSED}),
    "gemma": Kind("gemma", _IN_LAYER, activation="gelu_pytorch_tanh", shift=1.0, scales_pictures=True),
}
"""transformers' model_type -> how llama.cpp has it"""


def kind_of(assembly: Assembly) -> Kind:
    """The row of a model that is not refused."""
    return KINDS[assembly.model.config.text_config.model_type]


def picture_scale(assembly: Assembly) -> float:
    """What the connector's output must be multiplied by, for llama.cpp to read pictures as the model does."""
    return assembly.model.config.text_config.hidden_size**-0.5 if kind_of(assembly).scales_pictures else 1.0


def llm_refusal(assembly: Assembly) -> str | None:
    """Why llama.cpp cannot run a model's LLM as it is, as a clause; None if it can."""
    config = assembly.model.config.text_config
    name = config.model_type
    if name not in KINDS:
        return f"its LLM is of the kind {name!r}; proven in llama.cpp: {', '.join(KINDS)}"
    kind, rope = KINDS[name], _rope(config)
    if rope["rope_type"] not in ("default", *kind.scaled_rope):
        return f"llama.cpp's {kind.architecture} has not been shown to scale rope as {rope['rope_type']!r} does"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"its {name} turns only a part of each head, which has not been shown to agree in llama.cpp"
    if config.hidden_act != kind.activation and getattr(config, "hidden_activation", None) != kind.activation:
        return f"its {name} has {config.hidden_act} layers, llama.cpp's has {kind.activation}"
    window = _window(config)
    if window is not None and window < _SHORTEST_WINDOW:
        return f"its {name} looks back {window} tokens, and llama.cpp's {kind.architecture} always at all"
    unknown = [key for key in _decoder(assembly) if _gguf_name(key, kind) is None]
    return f"llama.cpp's {kind.architecture} has no place for {unknown[0]}" if unknown else None


def _decoder(assembly: Assembly) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = assembly.model.model.language_model.state_dict()
    return state


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", **(config.rope_parameters or {})}


def _window(config: Any) -> int | None:
    """How far back a decoder looks that does not look at everything."""
    layers = getattr(config, "layer_types", None)
    if layers is not None and "sliding_attention" not in layers:
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def context_length(config: Any) -> int:
    """Positions within which llama.cpp's attention over everything is the model's."""
    window = _window(config)
    longest: int = config.max_position_embeddings
    return longest if window is None else min(longest, window)


def add_llm(writer: Any, assembly: Assembly) -> None:
    """Metadata of the decoder."""
    config, architecture = assembly.model.config.text_config, kind_of(assembly).architecture
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(len(assembly.model.get_input_embeddings().weight))
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
        writer.add_sliding_window(0)  # without the key, its oldest files are assumed, which had windows


def llm_entries(assembly: Assembly) -> list[Entry]:
    """Tensors of the decoder and its head, in the decoder's order."""
    config, kind = assembly.model.config.text_config, kind_of(assembly)
    entries = [_entry(key, tensor, kind, config) for key, tensor in _decoder(assembly).items()]
    head = assembly.model.lm_head.weight
    if head.data_ptr() != assembly.model.get_input_embeddings().weight.data_ptr():
        entries.append(Entry("output.weight", head))
    if _rope(config)["rope_type"] == "llama3":
        entries.append(Entry("rope_freqs.weight", llama3_divisors(config), exact=True))
    return entries


def _gguf_name(key: str, kind: Kind) -> str | None:
    if key in _FIXED:
        return _FIXED[key]
    match = _LAYER.fullmatch(key)
    name = kind.names.get(match.group(2)) if match else None
    return f"blk.{match.group(1)}.{name}" if match and name else None


def _entry(key: str, tensor: torch.Tensor, kind: Kind, config: Any) -> Entry:
    name = _gguf_name(key, kind)
    assert name is not None
    change: Callable[[torch.Tensor], torch.Tensor] | None = None
    norm = name.endswith("_norm.weight")
    if kind.shift and norm:
        change = lambda values: values + kind.shift  # noqa: E731
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
    if kind.paired and heads:
        change = lambda values: neighbours(values, heads)  # noqa: E731
    return Entry(name, tensor, change, linear=key.startswith("layers.") and tensor.dim() == 2, exact=norm)


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection with the two halves of each head interleaved. Same shape.

    >>> neighbours(torch.arange(4)[:, None], 1).flatten().tolist()
    [0, 2, 1, 3]
    """
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def llama3_divisors(config: Any) -> torch.Tensor:
    """(head width / 2,) what each rotary frequency is divided by (Llama 3.1's scaling, in transformers' terms)."""
    rope = _rope(config)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = rope["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()
