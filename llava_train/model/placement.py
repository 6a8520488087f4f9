"""Where and how a model stands when it answers: device or devices, precision, attention, quantised or not."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import nn
from transformers import PreTrainedModel

from llava_train.errors import LlavaTrainError
from llava_train.model.assemble import Assembly
from llava_train.model.checkpoint import load_model, merged
from llava_train.model.connectors.base import Connector
from llava_train.model.cross.fused import CrossAttentionForConditionalGeneration
from llava_train.model.tuning import linear_layers

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
MAPS = ("auto", "balanced", "sequential")


@dataclass(frozen=True)
class Placement:
    """How a model is loaded.

    Attributes:
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        dtype: of weights that are not quantised, and of what is computed; auto is bfloat16 on a GPU, float32 on a CPU.
        attn_implementation: of the language model: sdpa, eager or flash_attention_2.
        load_in: the linear layers of the language model in 8 bits (LLM.int8) or 4 (NF4), by bitsandbytes. Its head and
            embeddings, the tower and the connector stay as they are.
        device_map: spread the layers over all GPUs, and the CPU for what is left: auto and balanced fill GPUs evenly,
            sequential one after the other.
    """

    device: str = "auto"
    dtype: str = "auto"
    attn_implementation: str = "sdpa"
    load_in: Literal["8bit", "4bit"] | None = None
    device_map: Literal["auto", "balanced", "sequential"] | None = None


def load_placed(path: str | Path, placement: Placement = Placement()) -> Assembly:
    """Load a model as `placement` says; see `load_model` for what a path may be.

    Adapters are merged where layers are quantised or spread. A model to be quantised is loaded in full into the
    machine's memory first; its layers go to the device one by one, so that this never holds them twice.

    Raises LlavaTrainError for what contradicts itself or is not to be had here, before anything is loaded, and what
    `load_model` does.
    """
    _check(placement)
    device = _device(placement)
    name = placement.dtype if placement.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    _check_attention(placement.attn_implementation, device, name)
    assembly = load_model(path, getattr(torch, name), placement.attn_implementation)
    if placement.load_in or placement.device_map:
        assembly = merged(assembly)
    if placement.load_in:
        quantise(assembly.model, placement.load_in, torch.device("cpu") if placement.device_map else device)
    if placement.device_map:
        _spread(assembly.model, placement)
    else:
        assembly.model.to(device)
    return assembly


def _check(placement: Placement) -> None:
    """LlavaTrainError for a value that is none, or two that exclude each other."""
    for name, values in (
        ("dtype", DTYPES),
        ("attn_implementation", ATTENTIONS),
        ("load_in", (None, "8bit", "4bit")),
        ("device_map", (None, *MAPS)),
    ):
        if getattr(placement, name) not in values:
            known = ", ".join(map(str, values))
            raise LlavaTrainError(f"{name}: {getattr(placement, name)!r} is not known; choose from {known}")
    if placement.device_map and placement.device != "auto":
        raise LlavaTrainError(f"device: {placement.device}: device_map chooses the devices; leave one of the two out")
    if placement.device_map and placement.load_in and not torch.cuda.is_available():
        raise LlavaTrainError(f"device_map with {placement.load_in}: torch sees no GPU; leave device_map out on a CPU")
    if placement.load_in and importlib.util.find_spec("bitsandbytes") is None:
        raise LlavaTrainError(
            f"load_in: {placement.load_in}: bitsandbytes is not installed; pip install 'llava-train[bitsandbytes]'"
        )


def _device(placement: Placement) -> torch.device:
    """The device asked for; LlavaTrainError where it is not there."""
    if placement.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", placement.device):
        raise LlavaTrainError(f"device: {placement.device!r} is not known; choose auto, cpu, cuda or cuda:N")
    device = torch.device(placement.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LlavaTrainError(f"device: {placement.device}: torch sees no GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LlavaTrainError(f"device: {placement.device}: torch sees only {torch.cuda.device_count()} GPUs")
    return device


def _check_attention(attn_implementation: str, device: torch.device, dtype: str) -> None:
    if attn_implementation != "flash_attention_2":
        return
    reasons = (
        (device.type != "cuda", "runs on GPUs only; choose sdpa on a CPU"),
        (dtype == "float32", "computes in bfloat16 or float16 only; choose such a dtype"),
        (importlib.util.find_spec("flash_attn") is None, "needs the package flash-attn, not installed; or choose sdpa"),
    )
    for applies, reason in reasons:
        if applies:
            raise LlavaTrainError(f"attn_implementation: flash_attention_2: {reason}")


def quantise(model: PreTrainedModel, load_in: str, device: torch.device) -> None:
    """Put the linear layers of the language model onto `device` in 8 or 4 bits, one by one, in place.

    LLM.int8: https://arxiv.org/abs/2208.07339. NF4 with its scales quantised too: https://arxiv.org/abs/2305.14314.
    """
    names = linear_layers(model, "llm")
    if not names:
        raise LlavaTrainError(f"load_in: {load_in}: the language model has no linear layers that could be quantised")
    quantised = _QUANTISED[load_in]
    for name in names:
        made = quantised(model.get_submodule(name))
        made.bias = model.get_submodule(name).bias
        model.set_submodule(name, made.to(device).requires_grad_(False).eval())


def _eight_bits(linear: nn.Linear) -> nn.Linear:
    import bitsandbytes.nn as bnb

    # At every layer of every step it would say that it computes in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    made: nn.Linear = bnb.Linear8bitLt(*_empty(linear), has_fp16_weights=False, threshold=6.0, device="meta")
    made.weight = bnb.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return made


def _four_bits(linear: nn.Linear) -> nn.Linear:
    import bitsandbytes.nn as bnb

    weight = linear.weight.data
    made: nn.Linear = bnb.Linear4bit(*_empty(linear), compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    made.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return made


def _empty(linear: nn.Linear) -> tuple[int, int, bool]:
    return linear.in_features, linear.out_features, linear.bias is not None


_QUANTISED: dict[str, Callable[[nn.Linear], nn.Linear]] = {"8bit": _eight_bits, "4bit": _four_bits}


def _spread(model: PreTrainedModel, placement: Placement) -> None:
    """Spread the layers over all devices, as transformers' `device_map` does, in place."""
    whole = sorted({*model._no_split_modules, *(type(each).__name__ for each in model.modules() if _is_ours(each))})
    most: dict[Any, Any] | None = None
    if placement.device_map != "sequential":
        most = get_balanced_memory(model, no_split_module_classes=whole)
    found = infer_auto_device_map(model, max_memory=most, no_split_module_classes=whole)
    used = {str(device) for device in found.values()}
    if "disk" in used:
        raise LlavaTrainError("device_map: the model does not fit into GPUs and memory together; load it in 4 bits")
    if placement.load_in and "cpu" in used:
        raise LlavaTrainError(f"device_map: the model does not fit into the GPUs in {placement.load_in}")
    if len(used) > 1 and isinstance(model, CrossAttentionForConditionalGeneration):
        raise LlavaTrainError("device_map: a model with cross-attention cannot be spread; choose one device")
    dispatch_model(model, found, skip_keys=sorted(model._skip_keys_device_placement))


def _is_ours(module: nn.Module) -> bool:
    """Whether a module computes in ways that devices must not part."""
    return isinstance(module, Connector)
