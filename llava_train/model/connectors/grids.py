"""Connectors that make fewer tokens of the patch grid: space to depth, and two ways to average, each with an MLP.

Shapes: N images, H x W positions of V features (or C channels).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import LlavaConfig

from llava_train.model.connectors.base import Connector, Option, Widths, register, square


class GridConnector(Connector):
    """One that reads the positions as a square grid, and whose tokens are a square again."""

    @classmethod
    @abstractmethod
    def side(cls, side: int, settings: dict[str, Any]) -> int:
        """Tokens a side of a grid of `side` x `side` positions; RecipeError where it does not suit."""

    @classmethod
    def grid(cls, positions: int, options: dict[str, Any]) -> tuple[int, int]:
        """Rows and columns of the tokens. RecipeError for positions that are no square grid or too small a one."""
        settings, found = cls.settings(options), square(positions)
        if found is None:
            raise cls.fault(
                f"it needs a square grid of patches, and {positions} positions are none; where CLS is among them, "
                "drop it: model.vision_feature_select_strategy: default"
            )
        side = cls.side(found[0], settings)
        return side, side

    @classmethod
    def tokens(cls, positions: int, options: dict[str, Any]) -> int:
        """Rows times columns of the tokens."""
        rows, columns = cls.grid(positions, options)
        return rows * columns


@register("pixel_shuffle")
class PixelShuffle(GridConnector):
    """Space to depth: r x r neighbours become one token of r * r times the width, then LayerNorm and a two-layer MLP.

    As InternVL 1.5 (arXiv 2404.16821) and Idefics3 (arXiv 2408.12637). Option `r`. A grid that r does not divide is
    filled up with zeros below and to the right, as NVILA does (arXiv 2412.04468): 27 x 27 positions of SigLIP become
    14 x 14 tokens. bf16: products by autocast, the norm's statistics in float32.
    """

    options = {"r": Option(int, 2, (2, 3, 4))}

    def __init__(self, widths: Widths, r: int) -> None:
        super().__init__()
        self.r = r
        self.layers = nn.Sequential(nn.LayerNorm(r * r * widths.vision), *_mlp(r * r * widths.vision, widths.llm))

    def forward(self, features_NPV: torch.Tensor) -> torch.Tensor:
        """(N, P, V) -> (N, tokens, LLM width); a token holds its r x r patches row by row."""
        r, grid_NHWV = self.r, on_grid(features_NPV)
        missing = -grid_NHWV.shape[1] % r
        grid_NHWV = pad(grid_NHWV, (0, 0, 0, missing, 0, missing))
        count, height, width, depth = grid_NHWV.shape
        blocks = grid_NHWV.reshape(count, height // r, r, width // r, r, depth).transpose(2, 3)
        return self.layers(blocks.reshape(count, height * width // r**2, r * r * depth))

    @classmethod
    def build(cls, name: str, widths: Widths, config: LlavaConfig, options: dict[str, Any]) -> nn.Module:
        """See the class for the options."""
        return cls(widths, cls.settings(options)["r"])

    @classmethod
    def side(cls, side: int, settings: dict[str, Any]) -> int:
        """A token for r patches, the last perhaps for fewer."""
        return _parted(cls, side, settings["r"])


class _Pool(GridConnector):
    """Means of neighbouring features, then a two-layer MLP."""

    def __init__(self, widths: Widths, settings: dict[str, Any]) -> None:
        super().__init__()
        self.chosen = settings
        self.layers = nn.Sequential(*_mlp(widths.vision, widths.llm))

    def forward(self, features_NPV: torch.Tensor) -> torch.Tensor:
        """(N, P, V) -> (N, tokens, LLM width)."""
        grid_NHWV = on_grid(features_NPV)
        side = grid_NHWV.shape[1]
        return self.layers(means(grid_NHWV, self.windows(side, self.side(side, self.chosen))).flatten(1, 2))

    @abstractmethod
    def windows(self, side: int, count: int) -> list[slice]:
        """The positions of a side that each of `count` tokens of a side averages."""

    @classmethod
    def build(cls, name: str, widths: Widths, config: LlavaConfig, options: dict[str, Any]) -> nn.Module:
        """See the class for the options."""
        return cls(widths, cls.settings(options))


@register("avg_pool")
class AveragePool(_Pool):
    """Means of r x r neighbours, then Linear, GELU, Linear (as Matryoshka multimodal models, arXiv 2405.17430).

    Option `r`. Where it does not divide the grid, the last windows of a row and column are smaller ones. bf16:
    products by autocast, means in the precision of the features.
    """

    options = {"r": Option(int, 2)}

    def windows(self, side: int, count: int) -> list[slice]:
        """r neighbours each."""
        r = self.chosen["r"]
        return [slice(start, start + r) for start in range(0, side, r)]

    @classmethod
    def side(cls, side: int, settings: dict[str, Any]) -> int:
        """A token for r patches, the last perhaps for fewer."""
        return _parted(cls, side, settings["r"])


@register("adaptive_pool")
class AdaptivePool(_Pool):
    """Means that leave `side` x `side` tokens whatever the grid, then Linear, GELU, Linear (DeCo, arXiv 2405.20985).

    Option `side`: half of the grid's, rounded up, where it is not given. bf16: products by autocast, means in the
    precision of the features.
    """

    options = {"side": Option(int, None)}

    def windows(self, side: int, count: int) -> list[slice]:
        """Windows as those of torch's adaptive pooling."""
        return adaptive_windows(side, count)

    @classmethod
    def side(cls, side: int, settings: dict[str, Any]) -> int:
        """As many as asked for."""
        return pooled_side(cls, side, settings["side"])


def on_grid(features_NPV: torch.Tensor) -> torch.Tensor:
    """(N, P, V) -> (N, H, W, V) of a square grid, row by row."""
    return features_NPV.unflatten(1, whole_grid(features_NPV.shape[1]))


def whole_grid(positions: int) -> tuple[int, int]:
    """Rows and columns of positions that are known to be a square grid."""
    if (grid := square(positions)) is None:
        raise ValueError(f"{positions} positions are no square grid")
    return grid


def means(grid_NHWV: torch.Tensor, windows: list[slice]) -> torch.Tensor:
    """Means over the same windows of rows and of columns: (N, windows, windows, V).

    In so many words, because the backward pass of torch's adaptive pooling adds up in any order on a GPU.
    """
    rows = torch.stack([grid_NHWV[:, window].mean(1) for window in windows], 1)
    return torch.stack([rows[:, :, window].mean(2) for window in windows], 2)


def adaptive_windows(side: int, count: int) -> list[slice]:
    """`count` windows that cover `side` positions evenly, overlapping where count does not divide them."""
    return [slice(index * side // count, -(-(index + 1) * side // count)) for index in range(count)]


def pooled_side(connector: type[Connector], side: int, wanted: int | None) -> int:
    """Tokens a side that adaptive pooling leaves; RecipeError for more than there are."""
    if wanted is not None and wanted > side:
        raise connector.fault(f"side: {wanted}: the encoder gives a grid of {side} x {side} patches")
    return wanted or -(-side // 2)


def _parted(connector: type[Connector], side: int, r: int) -> int:
    if r > side:
        raise connector.fault(f"r: {r}: the encoder gives a grid of {side} x {side} patches")
    return -(-side // r)


def _mlp(inside: int, outside: int) -> list[nn.Module]:
    return [nn.Linear(inside, outside), nn.GELU(), nn.Linear(outside, outside)]
