"""Attention over packed rows: a token sees its own stretch up to itself, and the stretch that stands before it.

Registered with transformers as an attention of its own, so that the stock decoder calls it: every implementation below
gives the same result, none makes a mask of all positions against all (`dense`, for comparison, does).

Shapes: B = 1 row, H heads, G key-value heads (H a multiple of G), T positions, C channels a head.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from llava_train.errors import RecipeError
from llava_train.registry import Registry

NAME = "llava_train"
"""What transformers knows it by."""


@dataclass(frozen=True, eq=False)
class Layout:
    """How a packed row is made up.

    Attributes:
        lengths: tokens of each stretch; they follow one another and fill the row.
        parents: number of the stretch that each one sees besides itself, -1: none. A parent has none.
        kind: which of `ATTENTIONS` computes; "auto" takes the best for the device.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    device: torch.device
    kind: str = "auto"

    @cached_property
    def starts(self) -> list[int]:
        """First position of each stretch."""
        return [sum(self.lengths[:number]) for number in range(len(self.lengths))]

    @cached_property
    def alike(self) -> dict[tuple[int, int], list[int]]:
        """Numbers of the stretches of each shape: (tokens, tokens that the last of them sees)."""
        groups: dict[tuple[int, int], list[int]] = {}
        for number, (length, parent) in enumerate(zip(self.lengths, self.parents)):
            before = self.lengths[parent] if parent >= 0 else 0
            groups.setdefault((length, before + length), []).append(number)
        return groups

    @cached_property
    def masks(self) -> dict[tuple[int, int], torch.Tensor]:
        """For the shapes of stretches with a parent: the last query sees every key, others fewer; bool."""
        return {
            (queries, keys): torch.ones(queries, keys, dtype=torch.bool, device=self.device).tril(keys - queries)
            for queries, keys in self.alike
            if keys > queries
        }

    @cached_property
    def owners(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each position its stretch and that one's parent, both (T,)."""
        lengths = torch.tensor(self.lengths, device=self.device)
        size = sum(self.lengths)
        numbers = torch.arange(len(self.lengths), device=self.device).repeat_interleave(lengths, output_size=size)
        return numbers, torch.tensor(self.parents, device=self.device)[numbers]

    @cached_property
    def mask(self) -> torch.Tensor:
        """Whether a position (row) sees another (column), bool (T, T)."""
        numbers, parents = self.owners
        place = torch.arange(len(numbers), device=self.device)
        related = (numbers[:, None] == numbers) | (parents[:, None] == numbers)
        return related & (place[:, None] >= place)

    @cached_property
    def block_mask(self) -> Any:
        """The same for flex attention."""
        from torch.nn.attention.flex_attention import create_block_mask

        numbers, parents = self.owners

        def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
            related = (numbers[query] == numbers[key]) | (parents[query] == numbers[key])
            return related & (query >= key)

        size = len(numbers)
        return create_block_mask(sees, None, None, size, size, device=self.device)

    @cached_property
    def ragged(self) -> tuple[torch.Tensor, torch.Tensor, int, int, torch.Tensor | None]:
        """For varlen attention: bounds of queries and of keys, the longest of each, and which keys, in their order.

        The keys of a stretch are those of its parent, then its own; None where no stretch has a parent.
        """
        seen = [
            (self.lengths[parent] if parent >= 0 else 0) + length for length, parent in zip(self.lengths, self.parents)
        ]
        bounds = [torch.tensor([0, *each], device=self.device).cumsum(0).int() for each in (self.lengths, seen)]
        if all(parent < 0 for parent in self.parents):
            return *bounds, max(self.lengths), max(seen), None  # type: ignore[return-value]
        places = [
            torch.arange(self.starts[number], self.starts[number] + self.lengths[number])
            for own, parent in enumerate(self.parents)
            for number in ((parent, own) if parent >= 0 else (own,))
        ]
        return *bounds, max(self.lengths), max(seen), torch.cat(places).to(self.device)  # type: ignore[return-value]


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Layout, float, float], torch.Tensor]
"""Queries (1, H, T, C), keys and values (1, G, T, C), layout, scale, dropout -> (1, H, T, C)."""

ATTENTIONS: Registry[Attention] = Registry("attention")


@ATTENTIONS.register("blocks")
def blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float, dropout: float
) -> torch.Tensor:
    """Stretch by stretch, those of one shape together: the work is that of the blocks. What a CPU wants."""
    key, value = (_repeated(each, query.shape[1]) for each in (key, value))
    queries, keys, values = (each.split(layout.lengths, dim=2) for each in (query, key, value))
    outputs: dict[int, torch.Tensor] = {}
    for shape, numbers in layout.alike.items():
        mask = layout.masks.get(shape)
        seen, shown = (_with_parents(each, numbers, layout) for each in (keys, values))
        own = torch.cat([queries[number] for number in numbers])
        made = scaled_dot_product_attention(
            own, seen, shown, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale
        )
        outputs.update(zip(numbers, made.split(1)))
    return torch.cat([outputs[number] for number in range(len(queries))], dim=2)


def _with_parents(stretches: Sequence[torch.Tensor], numbers: list[int], layout: Layout) -> torch.Tensor:
    """Of stretches of one shape what each sees: its parent's part, if it has one, then its own; one below the other."""
    own = torch.cat([stretches[number] for number in numbers])
    if layout.parents[numbers[0]] < 0:
        return own
    return torch.cat([torch.cat([stretches[layout.parents[number]] for number in numbers]), own], dim=2)


def _without_dropout(kind: str, dropout: float) -> None:
    if dropout:
        raise RecipeError(f"speed.attention: {kind} has no dropout in attention, which this language model asks for")


@ATTENTIONS.register("flex")
def flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float, dropout: float
) -> torch.Tensor:
    """PyTorch's flex attention, compiled where there is a GPU. RecipeError for dropout, which it does not have."""
    _without_dropout("flex", dropout)
    grouped = key.shape[1] != query.shape[1]
    attend = _flex(query.device.type)
    return attend(query, key, value, block_mask=layout.block_mask, scale=scale, enable_gqa=grouped)


@ATTENTIONS.register("varlen")
def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float, dropout: float
) -> torch.Tensor:
    """PyTorch's varlen attention (the flash kernels): CUDA, half precision."""
    from torch.nn.attention.varlen import varlen_attn

    _without_dropout("varlen", dropout)
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
        window_size=(-1, 0),  # causal, counted from the last key
        **grouped,
    )
    return made.transpose(0, 1)[None]


@ATTENTIONS.register("dense")
def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float, dropout: float
) -> torch.Tensor:
    """One mask of all positions against all: the plain definition, to compare with."""
    key, value = (_repeated(each, query.shape[1]) for each in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=layout.mask, dropout_p=dropout, scale=scale)


def best(query: torch.Tensor) -> str:
    """The attention for the device and precision of `query`, and for this version of torch."""
    if query.device.type != "cuda":
        return "blocks"
    flash = query.dtype in (torch.float16, torch.bfloat16) and "window_size" in _varlen_takes()
    return "varlen" if flash else "flex"


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention layers call; the result is (1, T, H, C)."""
    assert layout is not None, "a packed batch brings its layout"
    _refuse(module, layout, others)
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings may leave queries and keys in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    kind = best(query) if layout.kind == "auto" else layout.kind
    made = ATTENTIONS[kind](query, key, value, layout, scale, dropout)
    return made.transpose(1, 2), None


def _refuse(module: torch.nn.Module, layout: Layout, others: dict[str, Any]) -> None:
    """RecipeError for what a layer asks of its attention beyond scale and dropout."""
    asked = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    longest = max(seen for _, seen in layout.alike)
    if (others.get("sliding_window") or math.inf) < longest:
        asked.append("sliding_window")
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
