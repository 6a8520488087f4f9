"""Gated cross-attention blocks, and which picture each position of a text sees.

A picture is one `<image>` in the text. From there on its row sees it, until the next: each position sees one picture or
none, as in Flamingo (arXiv 2204.14198) and Llama 3.2-Vision. Only pairs of a position and a picture that there are cost
anything.

Shapes: B rows, T positions, D LLM width, I pictures of the batch in reading order, P positions of a picture, K pairs
(position, picture) that there are, N the most positions that see one picture, H heads, C channels a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

_EPS = 1e-5
"""Of the norms, as in Llama 3.2-Vision"""


def pictures_seen(
    input_ids_BT: torch.Tensor,
    image_token_id: int,
    lengths: Sequence[int] = (),
    parents: Sequence[int] = (),
    attention_mask_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Index into the batch's pictures, in reading order, of the one that each position sees, -1: none; int64 (B, T).

    It is the last one shown in the row up to the position itself. `lengths` and `parents` of a packed row are those of
    `llava_train.data.collate`: a stretch sees its own pictures, and before the first of them its parent's last. Where
    the mask is 0 nothing is seen.
    """
    rows, columns = input_ids_BT.shape
    device = input_ids_BT.device
    sizes = torch.tensor(lengths or (columns,) * rows, device=device)
    of = torch.tensor(parents or (-1,) * rows, device=device)
    so_far = (input_ids_BT == image_token_id).flatten().cumsum(0)
    after = so_far[sizes.cumsum(0) - 1]
    before = torch.cat([after.new_zeros(1), after[:-1]])
    inherited = torch.where((of >= 0) & (after[of] > before[of]), after[of] - 1, -1)
    numbers = torch.arange(len(sizes), device=device).repeat_interleave(sizes, output_size=rows * columns)
    seen = torch.where(so_far > before[numbers], so_far - 1, inherited[numbers]).view_as(input_ids_BT)
    return seen if attention_mask_BT is None else seen.masked_fill(attention_mask_BT == 0, -1)


@dataclass(frozen=True, eq=False)
class Reading:
    """Who sees what. Index tensors, int64.

    Attributes:
        places: positions in the flattened (B, T), those that see one picture after those that see the one before, (K,).
        order: of each picture the pairs that are its own, filled up with any, (I, N).
        slots: of each pair its place in the flattened `order`, (K,).
    """

    places: torch.Tensor
    order: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def of(cls, seen_BT: torch.Tensor, pictures: int) -> Reading | None:
        """From the index of the picture that each position sees, -1: none. None where no position sees any."""
        seen = seen_BT.flatten()
        places = (seen >= 0).nonzero()[:, 0]
        if not len(places):
            return None
        owners, by_picture = seen[places].sort(stable=True)
        pairs = torch.arange(len(places), device=seen.device)
        ranks = pairs - torch.searchsorted(owners, owners)
        longest = int(ranks.max()) + 1
        slots = owners * longest + ranks
        order = torch.zeros(pictures * longest, dtype=torch.int64, device=seen.device).index_copy(0, slots, pairs)
        return cls(places[by_picture], order.view(pictures, longest), slots)

    @classmethod
    def first(cls, pictures: int, device: torch.device) -> Reading:
        """The first position sees the first picture, and no other any."""
        none = torch.zeros(1, dtype=torch.int64, device=device)
        return cls(none, none.expand(pictures, 1), none)


class GatedBlock(GradientCheckpointingLayer):
    """Cross-attention and a feed-forward part, each added times tanh of a gate that begins at zero.

    Norms of queries and keys by head as in Llama 3.2-Vision, the feed-forward part as in Flamingo.
    """

    def __init__(self, width: int, heads: int, head_width: int, feed_forward: int) -> None:
        """`feed_forward` in widths."""
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.input_norm = LlamaRMSNorm(width, _EPS)
        self.picture_norm = LlamaRMSNorm(width, _EPS)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.q_norm = LlamaRMSNorm(head_width, _EPS)
        self.k_norm = LlamaRMSNorm(head_width, _EPS)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward_norm = LlamaRMSNorm(width, _EPS)
        self.up_proj = nn.Linear(width, feed_forward * width, bias=False)
        self.down_proj = nn.Linear(feed_forward * width, width, bias=False)
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        states_IPD: torch.Tensor,
        reading: Reading,
        keys: tuple[torch.Tensor, torch.Tensor] | None = None,
        silent: bool = False,
    ) -> torch.Tensor:
        """Hidden states after the block, (B, T, D): others than before only where `reading` has a pair.

        `keys` are `keys_values` of the states, where they were made before. `silent` adds nothing, and yet every weight
        and `states_IPD` have a gradient, of zero.
        """
        before_KD = hidden_BTD.flatten(0, 1).index_select(0, reading.places)
        found_KD = self._attend(before_KD, reading, keys or self.keys_values(states_IPD))
        after_KD = before_KD + (self.attention_gate.tanh() * found_KD).to(before_KD.dtype)
        made_KD = self.down_proj(gelu(self.up_proj(self.feed_forward_norm(after_KD))))
        after_KD = after_KD + (self.feed_forward_gate.tanh() * made_KD).to(before_KD.dtype)
        if silent:
            after_KD = before_KD + 0.0 * after_KD
        return hidden_BTD.flatten(0, 1).index_copy(0, reading.places, after_KD).view_as(hidden_BTD)

    def keys_values(self, states_IPD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the block reads of pictures, both (I, H, P, C)."""
        states = self.picture_norm(states_IPD)
        keys, values = (each(states).unflatten(-1, (self.heads, -1)) for each in (self.k_proj, self.v_proj))
        return self.k_norm(keys).transpose(1, 2), values.transpose(1, 2)

    def _attend(self, rows_KD: torch.Tensor, reading: Reading, keys: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Each row to its picture. Rows that fill up an `order` are computed and given to nobody: no mask."""
        key, value = keys
        queries_KHC = self.q_norm(self.q_proj(self.input_norm(rows_KD)).unflatten(-1, (self.heads, -1)))
        queries = queries_KHC.index_select(0, reading.order.flatten()).unflatten(0, reading.order.shape)
        # Norms may leave queries and keys in float32 under autocast.
        found = scaled_dot_product_attention(queries.transpose(1, 2).to(value.dtype), key.to(value.dtype), value)
        return self.o_proj(found.transpose(1, 2).flatten(0, 1).index_select(0, reading.slots).flatten(1))
