"""Attention over packed rows, whose layout says who sees whom.

Registered with transformers as an attention of its own, so that the stock decoder calls it: every implementation below
gives the same result, none makes a mask of all positions against all (`dense`, for comparison, does).

Shapes: B = 1 row, H heads, G key-value heads (H a multiple of G), T positions, C channels a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from llava_train.errors import RecipeError
from llava_train.model.layout import Layout
from llava_train.registry import Registry

NAME = "llava_train"
"""What transformers knows it by."""


class Attention(Protocol):
    """One way to compute it."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: Layout,
        scale: float,
        dropout: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Queries (1, H, T, C), keys and values (1, G, T, C) -> (1, H, T, C).

        `softcap` bounds scores before the softmax: softcap * tanh(score / softcap).
        """


ATTENTIONS: Registry[Attention] = Registry("attention")


@ATTENTIONS.register("blocks")
def blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scale: float,
    dropout: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Stretch by stretch, those of one shape together: the work is that of the blocks. What a CPU wants."""
    key, value = (_repeated(each, query.shape[1]) for each in (key, value))
    queries, keys, values = (each.split(layout.lengths, dim=2) for each in (query, key, value))
    outputs: dict[int, torch.Tensor] = {}
    for shape, numbers in layout.alike.items():
        mask = layout.masks.get(shape)
        seen, shown = (_with_parents(each, numbers, layout) for each in (keys, values))
        own = torch.cat([queries[number] for number in numbers])
        made = _computed(own, seen, shown, mask, scale, dropout, softcap)
        outputs.update(zip(numbers, made.split(1)))
    return torch.cat([outputs[number] for number in range(len(queries))], dim=2)


def _with_parents(stretches: Sequence[torch.Tensor], numbers: list[int], layout: Layout) -> torch.Tensor:
    """Of stretches of one shape what each sees: its parent's part, if it has one, then its own; one below the other."""
    own = torch.cat([stretches[number] for number in numbers])
    if layout.parents[numbers[0]] < 0:
        return own
    return torch.cat([torch.cat([stretches[layout.parents[number]] for number in numbers]), own], dim=2)


def _computed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of blocks with as many key heads as heads; without a mask, all are square and causal."""
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale
        )
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype)
    return torch.dropout(weights, dropout, True) @ value


def _require_none(kind: str, **asked: float | None) -> None:
    """RecipeError for what a kernel does not compute."""
    if names := [name for name, value in asked.items() if value]:
        raise RecipeError(
            f"speed.attention: {kind} has no {' and no '.join(names)} in attention, which this language model asks for"
        )


@ATTENTIONS.register("flex")
def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scale: float,
    dropout: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """PyTorch's flex attention, compiled where there is a GPU. RecipeError for dropout, which it does not have."""
    _require_none("flex", dropout=dropout)
    grouped = key.shape[1] != query.shape[1]
    attend = _flex(query.device.type)
    capped = None if softcap is None else _capped(softcap)
    made: torch.Tensor = attend(query, key, value, capped, layout.block_mask, scale=scale, enable_gqa=grouped)
    return made


@cache
def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    """The same function for the same number, so that flex attention compiles it once."""
    return lambda score, *_: softcap * torch.tanh(score / softcap)


@ATTENTIONS.register("varlen")
def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scale: float,
    dropout: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """PyTorch's varlen attention (the flash kernels): CUDA, half precision. RecipeError for dropout and softcap."""
    from torch.nn.attention.varlen import varlen_attn

    _require_none("varlen", dropout=dropout, softcap=softcap)
    grouped: dict[str, Any] = {"enable_gqa": key.shape[1] != query.shape[1]} if "enable_gqa" in _varlen_takes() else {}
    if not grouped:  # before torch 2.12
        key, value = (_repeated(each, query.shape[1]) for each in (key, value))
    query_bounds, key_bounds, longest, longest_seen, places = layout.ragged
    queries, keys, values = (each[0].transpose(0, 1) for each in (query, key, value))
    if places is not None:
        keys, values = keys.index_select(0, places), values.index_select(0, places)
    made: Any = varlen_attn(
        queries,
        keys,
        values,
        query_bounds,
        key_bounds,
        longest,
        longest_seen,
        scale=scale,
        # Causal, counted from the last key; positions before a token's own are counted without it.
        window_size=(-1 if layout.window is None else layout.window - 1, 0),
        **grouped,
    )
    return made.transpose(0, 1)[None]


@ATTENTIONS.register("dense")
def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scale: float,
    dropout: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """One mask of all positions against all: the plain definition, to compare with."""
    key, value = (_repeated(each, query.shape[1]) for each in (key, value))
    return _computed(query, key, value, layout.mask, scale, dropout, softcap)


def best(query: torch.Tensor, softcap: float | None = None) -> str:
    """The attention for the device and precision of `query`, and for this version of torch."""
    if query.device.type != "cuda":
        return "blocks"
    flash = query.dtype in (torch.float16, torch.bfloat16) and "window_size" in _varlen_takes()
    return "varlen" if flash and softcap is None else "flex"


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention layers call, each with its own window; the result is (1, T, H, C)."""
    assert layout is not None, "a packed batch brings its layout"
    _refuse(module, others)
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings may leave queries and keys in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    kind = best(query, softcap) if layout.kind == "auto" else layout.kind
    made = ATTENTIONS[kind](query, key, value, layout.within(sliding_window), scale, dropout, softcap)
    return made.transpose(1, 2), None


def _refuse(module: torch.nn.Module, others: dict[str, Any]) -> None:
    """RecipeError for what a layer asks of its attention that changes the result and is not computed here."""
    asked = [name for name in ("s_aux", "position_bias") if others.get(name) is not None]
    if asked:
        raise RecipeError(
            f"speed.packing: {type(module).__name__} asks its attention for {', '.join(asked)}, which packed rows do "
            "not have; set speed.packing=false"
        )


AttentionInterface.register(NAME, torch.compiler.disable(_attend))


def use_packed_attention(language_model: PreTrainedModel) -> None:
    """Make a decoder read packed rows. RecipeError where it computes its attention in a way of its own."""
    if not language_model._supports_attention_backend:
        raise RecipeError(
            f"speed.packing: {type(language_model).__name__} does not take another attention; set speed.packing=false"
        )
    language_model.config._attn_implementation = NAME


def _repeated(heads: torch.Tensor, count: int) -> torch.Tensor:
    """Key-value heads (1, G, T, C), each for its group of queries: (1, count, T, C)."""
    return heads if heads.shape[1] == count else heads.repeat_interleave(count // heads.shape[1], dim=1)


@cache
def _varlen_takes() -> frozenset[str]:
    """Names of what this torch's varlen attention takes; none before 2.10, `window_size` since 2.11."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


@cache
def _flex(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
