"""A perceiver resampler: learned latents that read the features and one another.

Shapes: N images, P positions, L latents, D the resampler's width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlavaConfig

from llava_train.model.connectors.base import Connector, Option, Widths, register


@register("resampler")
class Resampler(Connector):
    """Latents attend to features and themselves, layer by layer, then a norm and a projection.

    As Flamingo's (arXiv 2204.14198), in the sizes of Idefics2's (arXiv 2405.02246). Options: `num_latents` (64),
    `depth` (3), `heads` (16), `hidden_size` (the features' width). What the features say of their place is the tower's
    position embedding. bf16: products by autocast; softmax and the statistics of norms in float32.
    """

    options = {
        "num_latents": Option(int, 64),
        "depth": Option(int, 3),
        "heads": Option(int, 16),
        "hidden_size": Option(int, None),
    }

    def __init__(self, widths: Widths, settings: dict[str, Any]) -> None:
        super().__init__()
        width = settings["hidden_size"]
        self.latents = nn.Parameter(torch.randn(1, settings["num_latents"], width) * 0.02)
        self.entry = nn.Linear(widths.vision, width)
        self.layers = nn.ModuleList(_Layer(width, settings["heads"]) for _ in range(settings["depth"]))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, widths.llm)

    def forward(self, features_NPV: torch.Tensor) -> torch.Tensor:
        """(N, P, V) -> (N, latents, LLM width)."""
        features_NPD = self.entry(features_NPV)
        latents_NLD = self.latents.expand(len(features_NPV), -1, -1)
        for layer in self.layers:
            latents_NLD = layer(latents_NLD, features_NPD)
        return self.projection(self.norm(latents_NLD))

    @classmethod
    def build(cls, name: str, widths: Widths, config: LlavaConfig, options: dict[str, Any]) -> nn.Module:
        """See the class for the options."""
        settings = cls.settings(options)
        settings["hidden_size"] = settings["hidden_size"] or widths.vision
        if settings["hidden_size"] % settings["heads"]:
            raise cls.fault(f"hidden_size {settings['hidden_size']} must be a multiple of heads {settings['heads']}")
        return cls(widths, settings)

    @classmethod
    def tokens(cls, positions: int, options: dict[str, Any]) -> int:
        """One token a latent, whatever the picture's size."""
        return int(cls.settings(options)["num_latents"])


class _Layer(nn.Module):
    """Attention of the latents to features and latents, then an MLP; norms before, sums after."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_features, self.norm_latents, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, latents_NLD: torch.Tensor, features_NPD: torch.Tensor) -> torch.Tensor:
        normed_NLD = self.norm_latents(latents_NLD)
        # Where the two are of different precision under autocast, the product brings both to one.
        normed_NPD = self.norm_features(features_NPD).to(normed_NLD.dtype)
        key, value = self.key_value(torch.cat([normed_NPD, normed_NLD], 1)).chunk(2, -1)
        query, key, value = (self._heads(each) for each in (self.query(normed_NLD), key, value))
        read_NLD = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        latents_NLD = latents_NLD + self.out(read_NLD)
        return latents_NLD + self.mlp(self.norm_mlp(latents_NLD))

    def _heads(self, states_NTD: torch.Tensor) -> torch.Tensor:
        return states_NTD.unflatten(-1, (self.heads, -1)).transpose(1, 2)
