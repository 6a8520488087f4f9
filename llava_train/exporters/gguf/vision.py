"""`mmproj.gguf`: encoder and connector, as llama.cpp's LLaVA graph (`tools/mtmd/models/llava.cpp`) reads them.

That graph is: patches, positions, a pre-norm if there is one, layers up to the deepest feature layer, features of the
layers named side by side, then `mm.0`, GELU and `mm.2` over every patch.

CLIP's class embedding: since 2025 the graph puts it behind the patches, while the rows taken out are counted as if it
came first (ggml-org/llama.cpp#25814). Positions are therefore written in the order patches, class: the encoder then
computes what it should. What remains cannot be had by any order: features of the first patch are never taken out, those
of the others arrive one place early, and those of the class come last. A reader that puts the class first finds
positions one place off, as llama.cpp today does in a file that has them in CLIP's order.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_train.exporters.gguf.llm import picture_scale
from llava_train.exporters.gguf.writing import Entry
from llava_train.model.assemble import Assembly

PROCESSOR_KEY = "llava_train.image_processor"
"""Our own metadata: the image processor of training, as JSON."""

CLASS_KEY = "llava_train.class_embedding_last"
"""Our own metadata: whether positions are in the order patches, class."""

_TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}
"""Towers of llama.cpp's graph, and the only `vision_feature_select_strategy` that it has of each."""
_GELU = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}
_LAYER = {
    "layer_norm1": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm2": "ln2",
    # llama.cpp takes them in either order, told by their shapes.
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_SCALE = 2.0**20


def vision_refusal(assembly: Assembly) -> str | None:
    """Why llama.cpp's LLaVA graph cannot run a model's encoder and connector, as a clause; None if it can."""
    config = assembly.model.config
    tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    if tower not in _TOWERS:
        return f"llama.cpp's LLaVA graph has CLIP and SigLIP encoders, not {tower}"
    if strategy != _TOWERS[tower]:
        return (
            f"llama.cpp takes the patches of a {tower} and nothing else (vision_feature_select_strategy {strategy!r})"
        )
    if config.vision_config.hidden_act not in _GELU:
        return f"its encoder has {config.vision_config.hidden_act} layers, llama.cpp's has {', '.join(_GELU)}"
    layers = feature_layers(config)
    if layers != sorted(set(layers)) or layers[0] < 1:
        return f"llama.cpp puts features side by side from the lowest layer up, not as {config.vision_feature_layer}"
    projector = assembly.model.model.multi_modal_projector
    if isinstance(projector, LlavaMultiModalProjector) and config.projector_hidden_act != "gelu":
        return f"llama.cpp has GELU between the connector's layers, not {config.projector_hidden_act}"
    return None


def feature_layers(config: Any) -> list[int]:
    """Numbers of the hidden states that the connector reads; 0 is what the first layer reads."""
    named, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return [layer if layer >= 0 else depth + 1 + layer for layer in ([named] if isinstance(named, int) else named)]


def has_class_embedding(assembly: Assembly) -> bool:
    """Whether the encoder has a position that is no patch, which llama.cpp misplaces."""
    return bool(assembly.model.config.vision_config.model_type == "clip_vision_model")


def add_vision(writer: Any, assembly: Assembly) -> None:
    """Metadata of encoder, connector and pixels."""
    config, processor = assembly.model.config.vision_config, assembly.image_processor
    layers = feature_layers(assembly.model.config)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_bool("clip.use_gelu", _GELU[config.hidden_act])
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_projection_dim(assembly.model.config.text_config.hidden_size)
    # Layers above the last that is read are left out. Without the second key, llama.cpp stops one layer below.
    writer.add_vision_block_count(layers[-1])
    writer.add_array("clip.vision.feature_layer", layers)
    writer.add_vision_image_mean(list(processor.image_mean))
    writer.add_vision_image_std(list(processor.image_std))
    writer.add_string("clip.vision.mm_patch_merge_type", "flat")
    writer.add_bool(CLASS_KEY, has_class_embedding(assembly))
    writer.add_string(PROCESSOR_KEY, json.dumps(processor.to_dict()))


def vision_entries(assembly: Assembly) -> list[Entry]:
    """Tensors of the encoder up to the last layer that is read, and of the connector."""
    state = assembly.model.model.vision_tower.state_dict()
    state = {key.removeprefix("vision_model."): tensor for key, tensor in state.items()}
    entries = [
        # The kernel of a convolution must be float16 or float32, and rows of a table float32.
        Entry("v.patch_embd.weight", state["embeddings.patch_embedding.weight"], exact=True),
        Entry(
            "v.position_embd.weight", state["embeddings.position_embedding.weight"], _positions(assembly), exact=True
        ),
    ]
    if has_class_embedding(assembly):
        entries.append(Entry("v.class_embd", state["embeddings.class_embedding"]))
        # transformers spells it so.
        entries += [Entry(f"v.pre_ln.{end}", state[f"pre_layrnorm.{end}"]) for end in ("weight", "bias")]
    else:
        entries.append(Entry("v.patch_embd.bias", state["embeddings.patch_embedding.bias"]))
    for layer in range(feature_layers(assembly.model.config)[-1]):
        for name, theirs in _LAYER.items():
            entries += [
                Entry(f"v.blk.{layer}.{theirs}.{end}", state[f"encoder.layers.{layer}.{name}.{end}"])
                for end in ("weight", "bias")
            ]
    return entries + _connector(assembly)


def _positions(assembly: Assembly) -> Callable[[torch.Tensor], torch.Tensor] | None:
    return (lambda rows: torch.cat([rows[1:], rows[:1]])) if has_class_embedding(assembly) else None


def _connector(assembly: Assembly) -> list[Entry]:
    """Two layers; a linear connector becomes two by `x = gelu(x) - gelu(-x)`.

    llama.cpp rounds what GELU reads to float16 unless it is beyond 10, so numbers are made large (a power of two) in
    between, which leaves them as they are.
    """
    projector, scale = assembly.model.model.multi_modal_projector, picture_scale(assembly)
    if isinstance(projector, LlavaMultiModalProjector):
        layers = (("mm.0", projector.linear_1, 1.0), ("mm.2", projector.linear_2, scale))
        return [each for name, layer, by in layers for each in _linear(name, layer, by)]
    linear = projector.linear
    width, read = linear.weight.shape

    def both(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, -values]) * _SCALE

    def difference(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.eye(width), -torch.eye(width)], dim=1) / _SCALE * scale

    return [
        Entry("mm.0.weight", linear.weight, both, exact=True, shape=(2 * width, read)),
        Entry("mm.0.bias", linear.bias, both, exact=True, shape=(2 * width,)),
        Entry("mm.2.weight", linear.weight, difference, exact=True, shape=(width, 2 * width)),
        Entry("mm.2.bias", torch.zeros(width), exact=True),
    ]


def _linear(name: str, layer: nn.Linear, by: float) -> list[Entry]:
    """A layer times a number; llama.cpp always adds a bias."""
    bias = layer.bias if layer.bias is not None else torch.zeros(layer.out_features)

    def times(values: torch.Tensor) -> torch.Tensor:
        return values * by

    return [Entry(f"{name}.weight", layer.weight, times), Entry(f"{name}.bias", bias, times)]
