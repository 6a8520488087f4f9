"""How packed rows are made up, and who sees whom in them.

A token sees its own stretch up to itself, and the stretch that stands before it, its parent. Where a layer has a
sliding window, it sees the last `window` positions of these two together, its own the last.

Shapes: T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Layout:
    """How a packed row is made up.

    Attributes:
        lengths: tokens of each stretch; they follow one another and fill the row.
        parents: number of the stretch that each one sees besides itself, -1: none. A parent has none.
        kind: which of `ATTENTIONS` computes; "auto" takes the best for the device.
        window: how many positions a token sees, itself among them; None: all before it.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    device: torch.device
    kind: str = "auto"
    window: int | None = None

    def within(self, window: int | None) -> Layout:
        """The layout for layers with this window, made once: itself where every stretch fits in."""
        if window is None or window >= max(seen for _, seen in self.alike):
            return self
        if window not in self._windows:
            self._windows[window] = replace(self, window=window)
        return self._windows[window]

    @cached_property
    def _windows(self) -> dict[int, Layout]:
        return {}

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
        """For shapes of stretches that are not plainly causal: which keys a query sees, bool.

        The last query stands at the last key.
        """
        return {shape: self._shown(*shape) for shape in self.alike if shape[1] > min(shape[0], self.window or shape[0])}

    def _shown(self, queries: int, keys: int) -> torch.Tensor:
        shown = torch.ones(queries, keys, dtype=torch.bool, device=self.device).tril(keys - queries)
        return shown if self.window is None else shown.triu(keys - queries - self.window + 1)

    @cached_property
    def owners(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each position its stretch and that one's parent, both (T,)."""
        numbers = self._spread(range(len(self.lengths)))
        return numbers, torch.tensor(self.parents, device=self.device)[numbers]

    @cached_property
    def places(self) -> torch.Tensor:
        """Of each position its place in what its stretch sees, which begins with the parent's: (T,)."""
        before = [self.lengths[parent] if parent >= 0 else 0 for parent in self.parents]
        shifts = [seen - start for seen, start in zip(before, self.starts)]
        return torch.arange(sum(self.lengths), device=self.device) + self._spread(shifts)

    def _spread(self, values: Sequence[int]) -> torch.Tensor:
        """Numbers of the stretches, each for all positions of its own: (T,)."""
        lengths, each = (torch.tensor(list(numbers), device=self.device) for numbers in (self.lengths, values))
        return each.repeat_interleave(lengths, output_size=sum(self.lengths))

    @cached_property
    def mask(self) -> torch.Tensor:
        """Whether a position (row) sees another (column), bool (T, T)."""
        place = torch.arange(sum(self.lengths), device=self.device)
        return self._rule()(place[:, None], place)

    @cached_property
    def block_mask(self) -> Any:
        """The same for flex attention."""
        from torch.nn.attention.flex_attention import create_block_mask

        rule, size = self._rule(), sum(self.lengths)
        return create_block_mask(lambda b, h, query, key: rule(query, key), None, None, size, size, device=self.device)

    def _rule(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Whether positions see others. It holds tensors alone, so that it can be compiled."""
        (numbers, parents), places, window = self.owners, self.places, self.window

        def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            related = (numbers[query] == numbers[key]) | (parents[query] == numbers[key])
            seen = related & (query >= key)
            return seen if window is None else seen & (places[query] - places[key] < window)

        return sees

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
