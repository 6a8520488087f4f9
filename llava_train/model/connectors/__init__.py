"""Connectors: from the tower's features to the LLM's embeddings. A class and a registry row each; docs/connectors.md.

Shapes: features_NPV (images, positions, vision width times feature layers) -> (images, tokens, LLM width).

    build_connector("pixel_shuffle", Widths(vision=1024, llm=4096), config, {"r": 2})
    connector_tokens("pixel_shuffle", 576, {"r": 2})        # 144
    connector_grid("pixel_shuffle", 576, {"r": 2})          # (12, 12)
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import LlavaConfig

from llava_train.errors import RecipeError

# Imported for their rows, too.
from llava_train.model.connectors.base import CONNECTORS, Connector, Widths
from llava_train.model.connectors.c_abstractor import CAbstractor
from llava_train.model.connectors.grids import AdaptivePool, AveragePool, PixelShuffle
from llava_train.model.connectors.plain import Identity, Linear, Mlp
from llava_train.model.connectors.qformer import QFormer
from llava_train.model.connectors.resampler import Resampler

__all__ = [
    "CONNECTORS",
    "AdaptivePool",
    "AveragePool",
    "CAbstractor",
    "Connector",
    "Identity",
    "Linear",
    "Mlp",
    "PixelShuffle",
    "QFormer",
    "Resampler",
    "Widths",
    "build_connector",
    "connector_class",
    "connector_grid",
    "connector_tokens",
    "initialise_connector",
    "lasting_options",
]


def connector_class(name: str) -> type[Connector]:
    """The class behind a name; `mlp2x_gelu`, `mlp3x_gelu`, ... are one row. RecipeError for an unknown one."""
    if re.fullmatch(r"mlp[1-9]\d*x_gelu", name):
        return CONNECTORS["mlp"]
    if name == "mlp":
        raise RecipeError("connector 'mlp': write its depth, e.g. 'mlp2x_gelu'")
    return CONNECTORS[name]


def build_connector(name: str, widths: Widths, config: LlavaConfig, options: dict[str, Any]) -> nn.Module:
    """A connector with fresh weights. Raises RecipeError for an unknown name, option or value."""
    return connector_class(name).build(name, widths, config, options)


def connector_tokens(name: str, positions: int, options: dict[str, Any]) -> int:
    """Tokens an image in the LLM. Raises RecipeError where so many positions do not suit the connector."""
    return connector_class(name).tokens(positions, options)


def connector_grid(name: str, positions: int, options: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of an image's tokens, row by row; None where they lie on no grid."""
    return connector_class(name).grid(positions, options)


def initialise_connector(name: str, connector: nn.Module, options: dict[str, Any]) -> tuple[str, ...]:
    """Put the weights into a fresh connector that its options name a file for (`qformer`'s `init_from`).

    For models that are assembled; one that is loaded has weights of its own. Returns the names of the connector's
    weights that the file did not bring and that stay as they were; nothing where no file is named.
    """
    return connector_class(name).initialise(connector, options)


def lasting_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that build the same connector where the files that they name are no longer there."""
    return connector_class(name).lasting(options)
