"""What the original layout calls a model's weights, and what of a model it cannot carry.

The layout is that of github.com/haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT: `llava/model/llava_arch.py`,
`multimodal_encoder/` and `multimodal_projector/builder.py`. `llava_train.model.originals` reads it; import and export
are inverse to each other, bit for bit.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_train.model.assemble import Assembly
from llava_train.model.connectors.plain import Identity, Linear, Mlp
from llava_train.model.llm import sample_rows
from llava_train.model.originals.config import TOWER
from llava_train.model.towers.shapes import vision_shape

KINDS = {
    "llama": ("llava", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
    "gemma": ("llava_gemma", "LlavaGemmaForCausalLM"),
    "qwen3": ("llava_qwen3", "LlavaQwen3ForCausalLM"),
    "gemma2": ("llava_gemma2", "LlavaGemma2ForCausalLM"),
    "phi3": ("llava_phi3", "LlavaPhi3ForCausalLM"),
}
"""The decoder's `model_type` in transformers -> (`model_type`, class) of the original; the last three are forks'.
LLaVA-1.5 is published as `llava`, which SGLang finds in transformers; the code says `llava_llama` and reads both."""

_NAMES = {
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
    "model.vision_tower.vision_model.": f"{TOWER}vision_model.",
    "model.vision_tower.": f"{TOWER}vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.multi_modal_projector.linear.": "model.mm_projector.",
    "model.multi_modal_projector.layers.": "model.mm_projector.",
    "model.image_newline": "model.image_newline",
}
"""How names of ours begin -> how the original's do; the first that fits counts."""
_ASPECTS = {"clip_vision_model": ("pad", "crop", "anyres"), "siglip_vision_model": ("pad", "square", "anyres")}
"""Towers of the original, and what it does with pictures for each: `pad`, the tower's own processor's way, tiles."""


def original_key(name: str) -> str:
    """The original's name of a weight of a LLaVA model.

    >>> original_key("model.multi_modal_projector.linear_2.bias")
    'model.mm_projector.2.bias'
    >>> original_key("model.language_model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    ours = next(prefix for prefix in _NAMES if name.startswith(prefix))
    return _NAMES[ours] + name.removeprefix(ours)


def connector_tensors(assembly: Assembly) -> dict[str, torch.Tensor]:
    """The projector and, of tiles, the newline, by their names in the original."""
    model = assembly.model
    named = [(name, weight) for name, weight in model.state_dict().items() if _is_connector(name)]
    return {original_key(name): weight for name, weight in named}


def model_tensors(assembly: Assembly, tower: bool) -> dict[str, torch.Tensor]:
    """All weights by their names in the original, the tower's if `tower`; of tied ones the embeddings alone."""
    model, rows = assembly.model, kept_rows(assembly)
    vocabulary = {id(each.weight) for each in (model.get_input_embeddings(), model.get_output_embeddings())}
    tensors = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if not tied and (tower or not name.startswith("model.vision_tower.")):
            tensors[original_key(name)] = (weight[:rows] if id(weight) in vocabulary else weight).detach()
    return tensors


def kept_rows(assembly: Assembly) -> int:
    """How many rows of the vocabulary are written: those before `<image>` where an import draws the others again.

    An import adds `<image>` and grows the vocabulary by rows that follow from those before them. Where ours are not
    these (another seed, or training moved them), all are kept, so that no bit is lost.
    """
    embedding, head = assembly.model.get_input_embeddings().weight, assembly.model.get_output_embeddings().weight
    old, rows = assembly.old_vocabulary, int(embedding.shape[0])
    if not 0 < old < rows:
        return rows
    drawn = sample_rows(embedding[:old].detach(), rows - old, seed=0).to(embedding.device, embedding.dtype)
    return old if torch.equal(embedding[old:], drawn) and torch.equal(head[old:], drawn) else rows


def is_shortened(assembly: Assembly) -> bool:
    """Whether a SigLIP lacks its last layer and its head, as LLaVA-NeXT saves it."""
    config = assembly.model.config
    vision, layer = config.vision_config, config.vision_feature_layer
    without_head = not getattr(vision, "vision_use_head", True)
    return vision.model_type == "siglip_vision_model" and without_head and layer in (-1, vision.num_hidden_layers)


def refusal(assembly: Assembly) -> str | None:
    """Why no folder of the original can hold such a model, as a clause; None if one can."""
    spec, config = assembly.spec, assembly.model.config
    if spec.architecture not in ("llava", "llava_next"):
        return f"the original has pictures among the text, whole or in LLaVA-NeXT's tiles; this is {spec.architecture}"
    if config.text_config.model_type not in KINDS:
        return f"the original has no {config.text_config.model_type} language model; it has {', '.join(KINDS)}"
    return _tower_refusal(assembly) or _connector_refusal(assembly)


def _tower_refusal(assembly: Assembly) -> str | None:
    spec, config = assembly.spec, assembly.model.config
    vision, layer = config.vision_config, config.vision_feature_layer
    if vision.model_type not in _ASPECTS:
        return f"the original has one CLIP or SigLIP as its encoder, not {vision.model_type}"
    if not isinstance(layer, int):
        return f"the original reads one layer of its encoder, not {layer}"
    before_last = layer in (-2, vision.num_hidden_layers - 1)
    if vision.model_type == "siglip_vision_model" and not (before_last or is_shortened(assembly)):
        return f"the original reads SigLIP before its last layer, not vision_feature_layer {layer}"
    if spec.image_aspect_ratio not in _ASPECTS[vision.model_type]:
        own = ", ".join(_ASPECTS[vision.model_type])
        return f"with such an encoder the original has image_aspect_ratio {own}, not {spec.image_aspect_ratio}"
    size = vision_shape(vision).image_size
    if spec.image_size != size:
        return f"the original shows pictures in its encoder's size, {size} pixels, not {spec.image_size}"
    return None


def _connector_refusal(assembly: Assembly) -> str | None:
    spec, connector = assembly.spec, assembly.model.model.multi_modal_projector
    if isinstance(connector, LlavaMultiModalProjector):
        act, biased = assembly.model.config.projector_hidden_act, connector.linear_1.bias is not None
        return None if act == "gelu" and biased else f"the original's projector has GELU and biases; this one has {act}"
    if isinstance(connector, Identity | Linear | Mlp):
        return None
    return f"connector {spec.connector!r} has no place in it: it has linear, identity and mlp<N>x_gelu"


def projector_type(connector: nn.Module) -> str:
    """`mm_projector_type` of a connector that `refusal` lets pass."""
    if isinstance(connector, LlavaMultiModalProjector):
        return "mlp2x_gelu"
    if isinstance(connector, Mlp):
        return f"mlp{sum(isinstance(each, nn.Linear) for each in connector.layers)}x_gelu"
    return "linear" if isinstance(connector, Linear) else "identity"


def hub_name(path: Any) -> str | None:
    """A part's source if it names something on the hub; None for a folder or a file."""
    named = isinstance(path, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path)
    return str(path) if named and not path.endswith(".gguf") else None


def _is_connector(name: str) -> bool:
    return name.startswith(("model.multi_modal_projector.", "model.image_newline"))
