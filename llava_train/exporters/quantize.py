"""Quantised weights for target `hf`: the language model's linear layers as `pack-quantized` of compressed-tensors.

    int8   levels -128 to 127, one scale an output channel
    int4   levels -8 to 7, one scale for each 32 weights of a channel (as in GGUF's q4_0)

Weights only, symmetric, rounded to the nearest level under the scale of least squared error (int4: among a few): no
data is looked at, so the figures of a model do not hang on a choice of texts. Head, embeddings, encoder and connector
stay as they are, and so do layers whose width is no multiple of 32 (int4).

compressed-tensors, not bitsandbytes and not torchao: it is the one format of the three that transformers, vLLM and
SGLang all read as they are installed. vLLM reads bitsandbytes by a plugin only (since 0.28), SGLang reads no torchao
checkpoint, and what torchao writes is bound to its version. The price: transformers unpacks the weights as it begins
to compute, so there the folder is smaller, not the model in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from llava_train.errors import ExportError
from llava_train.exporters.verify import Reference, compare

EXTRA = "pip install 'llava-train[quantize]'"
FORMAT = "pack-quantized"
TOLERANCE = 1e-3
"""Largest difference of a logit between the folder as a reader unpacks it and the model rounded here, relative to the
largest logit. Both compute with the same numbers in the same precision and should not differ at all; another kernel
may add up in another order. A layer that is packed wrongly is far beyond it."""


@dataclass(frozen=True)
class Packing:
    """How weights are rounded.

    Attributes:
        bits: of a weight.
        group: how many weights of a channel share a scale; None: all.
        shares: scales to try, as shares of the one under which nothing is cut off. With 256 levels cutting off never
            pays.
    """

    bits: int
    group: int | None
    shares: tuple[float, ...] = (1.0,)

    @property
    def arguments(self) -> dict[str, Any]:
        """The same in the words of compressed-tensors."""
        own = {"strategy": "channel"} if self.group is None else {"strategy": "group", "group_size": self.group}
        return {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False, **own}


PACKINGS = {
    "int8": Packing(8, None),
    "int4": Packing(4, 32, (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)),
}


@contextmanager
def packed(model: PreTrainedModel, kind: str | None) -> Iterator[None]:
    """Inside, the model holds packed weights and says so in its configuration: save it there. Afterwards its layers
    hold what a reader unpacks, in the precision they had. Nothing happens where `kind` is None.

    Raises ExportError: the library is missing, or no layer can be packed.
    """
    if kind is None:
        yield
        return
    packing = PACKINGS[kind]
    compressor, scheme = _library(packing)
    layers = packable(model, packing)
    if not layers:
        raise ExportError(f"no linear layer of the language model can be written in {kind}: its widths are odd")
    for layer in tqdm(layers.values(), desc=f"to {kind}", unit=" layers", delay=2):
        weight = layer.weight.detach().float()
        state = compressor.compress(
            {"weight": weight, "weight_scale": scales(weight, packing, layer.weight.dtype)}, scheme
        )
        state["weight_scale"] = state["weight_scale"].to(layer.weight.dtype)
        _put(layer, state)
    model.config.quantization_config = config_of(model, packing, layers)
    yield
    del model.config.quantization_config
    for layer in layers.values():
        state = {name: layer.get_parameter(name).detach() for name in ("weight_packed", "weight_scale", "weight_shape")}
        _put(layer, {"weight": compressor.decompress(state, scheme)["weight"]})


def to_precision(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Bring weights to a precision and leave alone what is computed and not saved (frequencies of positions), as
    `from_pretrained` does: a model rounded by `Module.to` computes otherwise than what is loaded from its folder."""
    computed = {name: buffer.clone() for name, buffer in model.named_buffers() if name not in model.state_dict()}
    model.to(dtype)
    for name, buffer in computed.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer)


def _library(packing: Packing) -> tuple[Any, Any]:
    """What packs and unpacks, and the scheme it is told."""
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    except ImportError as error:
        raise ExportError(f"quantised weights need compressed-tensors, which is not installed: {EXTRA}") from error
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**packing.arguments))
    return BaseCompressor.get_value_from_registry(FORMAT), scheme


def packable(model: PreTrainedModel, packing: Packing) -> dict[str, nn.Linear]:
    """The language model's linear layers that a packing has a place for, by name."""
    found = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    inside = {id(module) for module in model.model.language_model.modules()}
    return {
        name: module
        for name, module in found.items()
        if id(module) in inside and module.in_features % (packing.group or 1) == 0
    }


def scales(weight: torch.Tensor, packing: Packing, dtype: torch.dtype) -> torch.Tensor:
    """The scale of least squared error for each group, (out, groups) float32 with values that `dtype` has.

    Args:
        weight: (out, in) float32.
        packing: bits and size of a group.
        dtype: precision that the scales are written in.
    """
    highest = 2 ** (packing.bits - 1) - 1
    groups = weight.unflatten(1, (-1, packing.group or weight.shape[1]))
    largest = groups.abs().amax(-1, keepdim=True) / highest
    best, least = torch.ones_like(largest), torch.full_like(largest, math.inf)
    for share in packing.shares:
        scale = (largest * share).to(dtype).float()
        scale = torch.where(scale == 0, 1.0, scale)  # a group of zeros, or of what `dtype` has no numbers for
        error = (groups / scale).round_().clamp_(-highest - 1, highest).mul_(scale).sub_(groups).square_()
        error = error.sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best.squeeze(-1)


def _put(layer: nn.Linear, state: dict[str, torch.Tensor]) -> None:
    for name in ("weight", "weight_packed", "weight_scale", "weight_shape"):
        if name in layer._parameters:
            delattr(layer, name)
    for name, tensor in state.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def config_of(model: PreTrainedModel, packing: Packing, layers: dict[str, nn.Linear]) -> dict[str, Any]:
    """What config.json says: every linear layer but those named, by patterns that fit the names of any reader.

    Layers have other names in each reader (`model.language_model.layers.0` in transformers,
    `language_model.model.layers.0` in vLLM), and parts keep theirs (`vision_tower`).
    """
    parts = [name for name, part in model.model.named_children() if part is not model.model.language_model]
    inside = model.model.language_model.named_modules()
    packed_ones = {id(layer) for layer in layers.values()}
    left = [name for name, module in inside if type(module) is nn.Linear and id(module) not in packed_ones]
    ignored = [rf"re:.*\b{name}\b.*" for name in ("lm_head", *parts)] + [rf"re:.*\b{re.escape(name)}$" for name in left]
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": packing.arguments, "format": FORMAT}},
        "ignore": ignored,
    }


def difference(reference: Reference, rounded: Reference) -> dict[str, Any]:
    """How far rounding moved a model's answers to the probe: stated, not limited, because it is what was asked for."""
    found = compare(reference, rounded.asked, math.inf, [])
    return {key: found[key] for key in ("max_logit_difference", "greedy_tokens_equal", "greedy_tokens")}
