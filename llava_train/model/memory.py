"""What autograd keeps of a forward pass until the backward pass, measured on tensors without values.

Measured, not calculated: so it is right for any architecture, adapters, precision and attention, and takes a second.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from llava_train.model.attention import NAME, Layout
from llava_train.model.costs import without_values
from llava_train.model.cross.blocks import Reading
from llava_train.model.towers.features import image_features, layer_inputs

_FEW = 16
"""Tokens of a sample where values are needed after all"""
_LOGITS = 12
"""Bytes a logit in the backward pass of the loss: log-probability, its gradient and that of the logit, in float32"""


@dataclass(frozen=True)
class Kept:
    """Bytes that are kept from forward to backward, by unit.

    Attributes:
        layer: a decoder layer, a token.
        entry: what a decoder layer reads, a token: all that is kept of one that is recomputed.
        rest: the decoder outside its layers, a token.
        image: tower and connector, an image.
        image_entry: the same where the tower's layers are recomputed.
        logits: a supervised position between head and loss, at the peak.
        copies: weights in the precision of autocast, whatever the batch.
    """

    layer: float
    entry: float
    rest: float
    image: float
    image_entry: float
    logits: float
    copies: float


@dataclass(frozen=True)
class Conditions:
    """How a model will run.

    Attributes:
        dtypes: precision of each weight by name, as forward sees it.
        autocast: what autocast computes in; None where there is none.
        device: type of the device.
        length: tokens of a sample, a typical one.
        attention: of packed rows, where the decoder reads such.
        image_size: pixels a side; None: the tower's own.
    """

    dtypes: Mapping[str, torch.dtype]
    autocast: torch.dtype | None
    device: str
    length: int
    attention: str = "auto"
    image_size: int | None = None


def measure_kept(model: PreTrainedModel, run: Conditions) -> Kept:
    """What a model that is tuned, but not placed yet, keeps of a micro-batch. It may be on the meta device.

    Call it before recompute is switched on and before kernels are exchanged for others.
    """
    embedding = model.get_input_embeddings().weight
    dtype = run.dtypes[next(name for name, weight in model.named_parameters() if weight is embedding)]
    vocabulary, width = model.lm_head.weight.shape
    on_cpu = replace(run, device="cpu")
    with _training(model):
        image, image_entry, copies = _first(lambda: _vision(model, run), lambda: _vision(model, on_cpu))
        layer, rest, decoder_copies = _first(
            lambda: _decoder(model, run, dtype), lambda: _decoder_with_values(model, on_cpu, dtype)
        )
    rest += _looking(model, on_cpu, dtype)
    if run.autocast and run.dtypes.get("lm_head.weight", dtype) != run.autocast:
        copies += vocabulary * width * run.autocast.itemsize
    return Kept(
        layer, float(width * dtype.itemsize), rest, image, image_entry, _LOGITS * vocabulary, copies + decoder_copies
    )


def _looking(model: PreTrainedModel, run: Conditions, dtype: torch.dtype) -> float:
    """Bytes a token of all gated layers of cross-attention, where every token sees a picture."""
    blocks = getattr(model.model, "cross_attention", ())
    if not len(blocks):
        return 0.0
    width = model.config.text_config.hidden_size

    def kept(count: int) -> int:
        with FakeTensorMode():
            hidden = torch.empty(1, count, width, dtype=dtype, requires_grad=True)
            pairs, states = torch.arange(count), torch.empty(1, 1, width, dtype=dtype)
            reading = Reading(pairs, pairs[None], pairs)
            return _kept(model, run, lambda whole, x: whole.model.cross_attention[0](x, states, reading), hidden)

    return len(blocks) * _line(kept)[0]


def _vision(model: PreTrainedModel, run: Conditions) -> tuple[float, float, float]:
    """Bytes an image, the same with the tower's layers recomputed, and bytes of copies."""
    size = run.image_size or model.config.vision_config.image_size

    def kept(features: Callable[..., torch.Tensor], count: int) -> int:
        with FakeTensorMode():
            pixels = torch.empty(count, 3, size, size, device=run.device)
            return _kept(model, run, lambda whole, x: whole.model.multi_modal_projector(features(whole, x)), pixels)

    image, copies = _line(lambda count: kept(image_features, count))
    if not any(weight.requires_grad for weight in model.model.vision_tower.parameters()):
        return image, image, copies
    connector, _ = _line(lambda count: kept(torch.no_grad()(image_features), count))
    with FakeTensorMode(), _autocast(run):
        pixels = torch.empty(1, 3, size, size, device=run.device)
        states, _ = without_values(model, image_features, pixels, dtypes=run.dtypes, device=run.device)
    return image, connector + layer_inputs(model, states) * states.element_size(), copies


def _decoder(model: PreTrainedModel, run: Conditions, dtype: torch.dtype) -> tuple[float, float, float]:
    """Bytes a token of a layer and outside the layers, and bytes of all copies."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _measured_decoder(model, run, dtype)


def _decoder_with_values(model: PreTrainedModel, run: Conditions, dtype: torch.dtype) -> tuple[float, float, float]:
    """The same for a decoder whose path depends on values, or a kernel that must have them.

    A layer or two, a few tokens, plain attention, values of any kind.
    """
    config = model.model.language_model.config
    attention = config._attn_implementation
    config._attn_implementation = "sdpa" if model.model.language_model._supports_sdpa else "eager"
    try:
        with torch.random.fork_rng(devices=[]):
            return _measured_decoder(model, replace(run, length=_FEW), dtype)
    finally:
        config._attn_implementation = attention


def _measured_decoder(model: PreTrainedModel, run: Conditions, dtype: torch.dtype) -> tuple[float, float, float]:
    decoder = model.model.language_model
    every = decoder.layers
    lines = []
    for layers in (1, 2):
        decoder.layers = every[:layers]
        try:
            lines.append(_line(lambda count: _kept(model, run, _decode, *_rows(model, run, dtype, count))))
        finally:
            decoder.layers = every
    (sample, copies), (longer, more) = lines
    layer = longer - sample
    return layer / run.length, (sample - layer) / run.length, copies + (len(every) - 1) * (more - copies)


def _rows(model: PreTrainedModel, run: Conditions, dtype: torch.dtype, count: int) -> tuple[Any, ...]:
    """Embeddings, places and further arguments for `count` samples: packed, or a row each."""
    config = model.model.language_model.config
    packed = config._attn_implementation == NAME
    shape = (1, count * run.length) if packed else (count, run.length)
    embeddings = torch.empty(*shape, config.hidden_size, dtype=dtype, device=run.device, requires_grad=True)
    places = torch.arange(run.length, device=run.device).repeat(count).view(shape)
    if packed:
        layout = Layout((run.length,) * count, (-1,) * count, embeddings.device, run.attention)
        return embeddings, places, {"layout": layout}
    mask = torch.ones(count, 1, run.length, run.length, dtype=torch.bool, device=run.device)
    return embeddings, places, {"attention_mask": mask} if config._attn_implementation in ("sdpa", "eager") else {}


def _decode(
    model: PreTrainedModel, embeddings: torch.Tensor, places: torch.Tensor, others: dict[str, Any]
) -> torch.Tensor:
    decoder = model.model.language_model
    hidden: torch.Tensor = decoder(
        inputs_embeds=embeddings, position_ids=places, use_cache=False, **others
    ).last_hidden_state
    return hidden


class _Box:
    """Holds a tensor for autograd, and goes when its graph goes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _kept(model: PreTrainedModel, run: Conditions, call: Callable[..., Any], *inputs: Any) -> int:
    """Bytes that the graph of `call`'s result holds, weights left out."""
    boxes: weakref.WeakSet[_Box] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Box:
        box = _Box(tensor)
        boxes.add(box)
        return box

    with _autocast(run), saved_tensors_hooks(pack, attrgetter("tensor")):
        result, weights = without_values(model, call, *inputs, dtypes=run.dtypes, device=run.device)
    own = {weight.untyped_storage()._cdata for weight in weights}
    # The graph lives as long as its result.
    storages = {box.tensor.untyped_storage()._cdata: box.tensor.untyped_storage().nbytes() for box in boxes}
    del result
    return sum(size for address, size in storages.items() if address not in own)


def _autocast(run: Conditions) -> Any:
    return torch.autocast(run.device, run.autocast) if run.autocast else nullcontext()


def _first(*attempts: Callable[[], tuple[float, float, float]]) -> tuple[float, float, float]:
    """What the first attempt gives that does not fail."""
    for attempt in attempts[:-1]:
        try:
            return attempt()
        except Exception:  # comes as many types: FakeTensorMode's own, a kernel's, a compiler's
            continue
    return attempts[-1]()


def _line(measure: Callable[[int], int]) -> tuple[float, float]:
    """Slope and constant of what is measured for one and for two."""
    one, two = measure(1), measure(2)
    return float(two - one), float(2 * one - two)


@contextmanager
def _training(model: PreTrainedModel) -> Iterator[None]:
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)
