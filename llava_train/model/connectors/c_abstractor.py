"""Honeybee's C-Abstractor: convolutions before and after an adaptive average, so that neighbours stay neighbours.

Shapes: N images, H x W positions, V features, C the abstractor's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate, silu
from transformers import LlavaConfig

from llava_train.model.connectors.base import Option, Widths, register
from llava_train.model.connectors.grids import (
    GridConnector,
    adaptive_windows,
    means,
    on_grid,
    pooled_side,
    whole_grid,
)
from llava_train.model.towers.shapes import vision_shape


@register("c_abstractor")
class CAbstractor(GridConnector):
    """Learned positions, `depth` ResNet blocks, means on `side` x `side`, `depth` blocks, a linear layer.

    Honeybee, arXiv 2312.06742. Options: `depth` (3), `side` (half of the grid's, rounded up: 144 tokens for 24 x 24,
    as in the paper), `hidden_size` (the features' width). Positions are those of the tower's own grid, interpolated
    for pictures of another size. bf16: products by autocast, the statistics of norms in float32.
    """

    options = {"depth": Option(int, 3), "side": Option(int, None), "hidden_size": Option(int, None)}

    def __init__(self, widths: Widths, grid: tuple[int, int], settings: dict[str, Any]) -> None:
        super().__init__()
        width, depth = settings["hidden_size"] or widths.vision, settings["depth"]
        self.chosen = settings
        self.positions = nn.Parameter(torch.randn(1, *grid, widths.vision) * 0.02)
        self.before = nn.Sequential(_Block(widths.vision, width), *(_Block(width, width) for _ in range(depth - 1)))
        self.after = nn.Sequential(*(_Block(width, width) for _ in range(depth)))
        self.projection = nn.Linear(width, widths.llm)

    def forward(self, features_NPV: torch.Tensor) -> torch.Tensor:
        """(N, P, V) -> (N, tokens, LLM width)."""
        grid_NHWV = on_grid(features_NPV)
        side = grid_NHWV.shape[1]
        made_NHWC = self.before(grid_NHWV + self._positions(side).to(grid_NHWV.dtype))
        windows = adaptive_windows(side, self.side(side, self.chosen))
        return self.projection(self.after(means(made_NHWC, windows)).flatten(1, 2))

    def _positions(self, side: int) -> torch.Tensor:
        if self.positions.shape[1:3] == (side, side):
            return self.positions
        table = self.positions.permute(0, 3, 1, 2).float()
        return interpolate(table, (side, side), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)

    @classmethod
    def build(cls, name: str, widths: Widths, config: LlavaConfig, options: dict[str, Any]) -> nn.Module:
        """See the class for the options."""
        settings = cls.settings(options)
        positions = vision_shape(config.vision_config).tokens(config.vision_feature_select_strategy)
        cls.grid(positions, options)  # says what does not suit
        return cls(widths, whole_grid(positions), settings)

    @classmethod
    def side(cls, side: int, settings: dict[str, Any]) -> int:
        """As many as asked for."""
        return pooled_side(cls, side, settings["side"])


class _Block(nn.Module):
    """RegNet's bottleneck with squeeze-and-excitation, channels last: products of 1 x 1 are linear layers."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        squeezed = max(1, inside // 4)
        self.enter = nn.Linear(inside, width, bias=False)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.squeeze, self.excite = nn.Linear(width, squeezed), nn.Linear(squeezed, width)
        self.leave = nn.Linear(width, width, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.shortcut = (
            nn.Identity()
            if inside == width
            else nn.Sequential(nn.Linear(inside, width, bias=False), nn.LayerNorm(width, eps=1e-6))
        )

    def forward(self, x_NHWC: torch.Tensor) -> torch.Tensor:
        made = silu(self.norms[0](self.enter(x_NHWC)))
        made = self.depthwise(made.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        made = silu(self.norms[1](made))
        gates = torch.sigmoid(self.excite(silu(self.squeeze(made.mean((1, 2), keepdim=True)))))
        return silu(self.norms[2](self.leave(made * gates)) + self.shortcut(x_NHWC))
