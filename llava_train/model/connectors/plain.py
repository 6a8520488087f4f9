"""Connectors that treat each position by itself: as many tokens as positions."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import LlavaConfig
from transformers.activations import ACT2FN
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_train.model.connectors.base import Connector, Widths, register, square


class _Plain(Connector):
    @classmethod
    def grid(cls, positions: int, options: dict[str, Any]) -> tuple[int, int] | None:
        """The patches' own; None where CLS is among the positions."""
        return square(positions)


@register("linear")
class Linear(_Plain):
    """One linear layer (LLaVA v1, arXiv 2304.08485). bf16: the product, by autocast."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.linear = nn.Linear(widths.vision, widths.llm)

    def forward(self, features_NPV: torch.Tensor) -> torch.Tensor:
        """(N, P, V) -> (N, P, LLM width)."""
        return self.linear(features_NPV)

    @classmethod
    def build(cls, name: str, widths: Widths, config: LlavaConfig, options: dict[str, Any]) -> nn.Module:
        """No options."""
        cls.settings(options)
        return cls(widths)


@register("mlp")
class Mlp(_Plain):
    """`mlp<N>x_gelu`: N linear layers with GELU between (LLaVA-1.5, arXiv 2310.03744, N = 2). bf16: by autocast.

    N = 2 is transformers' own LlavaMultiModalProjector, so such a model is a stock Llava model.
    """

    def __init__(self, widths: Widths, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(widths.vision, widths.llm)]
        for _ in range(depth - 1):
            layers += [ACT2FN["gelu"], nn.Linear(widths.llm, widths.llm)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features_NPV: torch.Tensor) -> torch.Tensor:
        """(N, P, V) -> (N, P, LLM width)."""
        return self.layers(features_NPV)

    @classmethod
    def build(cls, name: str, widths: Widths, config: LlavaConfig, options: dict[str, Any]) -> nn.Module:
        """No options; the depth is in the name."""
        cls.settings(options)
        depth = int(re.fullmatch(r"mlp(\d+)x_gelu", name).group(1))  # type: ignore[union-attr]
        return LlavaMultiModalProjector(config) if depth == 2 else cls(widths, depth)


@register("identity")
class Identity(_Plain):
    """Features as they are, in the tower's precision; the widths must agree."""

    def forward(self, features_NPV: torch.Tensor) -> torch.Tensor:
        """(N, P, V) unchanged."""
        return features_NPV

    @classmethod
    def build(cls, name: str, widths: Widths, config: LlavaConfig, options: dict[str, Any]) -> nn.Module:
        """No options."""
        cls.settings(options)
        if widths.vision != widths.llm:
            raise cls.fault(f"the encoder gives width {widths.vision}, the LLM takes {widths.llm}")
        return cls()
