"""Connectors: from the tower's features to the LLM's embeddings. A class and a registry row each.

Shapes: features_NPV (images, patches, vision width times feature layers) -> (images, tokens, LLM width).
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, LlavaConfig
from transformers.activations import ACT2FN
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_train.errors import RecipeError
from llava_train.registry import Registry


@dataclass(frozen=True)
class Widths:
    """Input and output width of a connector."""

    vision: int
    llm: int


class Connector(nn.Module):
    """What a connector says of itself besides `forward`."""

    @classmethod
    @abstractmethod
    def build(cls, name: str, widths: Widths, config: LlavaConfig, options: dict[str, Any]) -> nn.Module:
        """The module with fresh weights; RecipeError for options it does not know."""

    @classmethod
    def tokens(cls, positions: int, options: dict[str, Any]) -> int:
        """Tokens an image in the LLM, for `positions` features of the tower."""
        return positions


CONNECTORS: Registry[type[Connector]] = Registry("connector")


@CONNECTORS.register("linear")
class Linear(Connector):
    """One linear layer (LLaVA v1, arXiv 2304.08485)."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.linear = nn.Linear(widths.vision, widths.llm)

    def forward(self, features_NPV: torch.Tensor) -> torch.Tensor:
        """(N, P, V) -> (N, P, LLM width)."""
        return self.linear(features_NPV)

    @classmethod
    def build(cls, name: str, widths: Widths, config: LlavaConfig, options: dict[str, Any]) -> nn.Module:
        """No options."""
        _only(name, options)
        return cls(widths)


@CONNECTORS.register("mlp")
class Mlp(Connector):
    """`mlp<N>x_gelu`: N linear layers with GELU between (LLaVA-1.5, arXiv 2310.03744, N = 2).

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
        _only(name, options)
        depth = int(re.fullmatch(r"mlp(\d+)x_gelu", name).group(1))  # type: ignore[union-attr]
        return LlavaMultiModalProjector(config) if depth == 2 else cls(widths, depth)


@CONNECTORS.register("identity")
class Identity(Connector):
    """Features as they are; the widths must agree."""

    def forward(self, features_NPV: torch.Tensor) -> torch.Tensor:
        """(N, P, V) unchanged."""
        return features_NPV

    @classmethod
    def build(cls, name: str, widths: Widths, config: LlavaConfig, options: dict[str, Any]) -> nn.Module:
        """No options."""
        _only(name, options)
        if widths.vision != widths.llm:
            raise RecipeError(
                f"connector 'identity': the encoder gives width {widths.vision}, the LLM takes {widths.llm}"
            )
        return cls()


@CONNECTORS.register("qformer")
class QFormer(Connector):
    """Learned queries that read the image through transformers' Blip2QFormerModel, then a projection.

    BLIP-2, arXiv 2301.12597. Options: `num_queries` (32), `num_hidden_layers` (6), `hidden_size` (768),
    `num_attention_heads` (12), `intermediate_size` (4 x hidden), `cross_attention_frequency` (2).
    It computes in the precision of its weights, outside autocast: float32 in every training run (transformers
    keeps its Q-Former so), the model's own precision at inference.
    """

    defaults: dict[str, Any] = {
        "num_queries": 32,
        "num_hidden_layers": 6,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "cross_attention_frequency": 2,
        "intermediate_size": None,
    }

    def __init__(self, widths: Widths, options: dict[str, Any]) -> None:
        super().__init__()
        width = options["hidden_size"]
        config = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=options["num_hidden_layers"],
            num_attention_heads=options["num_attention_heads"],
            intermediate_size=options["intermediate_size"] or 4 * width,
            cross_attention_frequency=options["cross_attention_frequency"],
            encoder_hidden_size=widths.vision,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.queries = nn.Parameter(torch.randn(1, options["num_queries"], width) * config.initializer_range)
        self.qformer = Blip2QFormerModel(config)
        self.projection = nn.Linear(width, widths.llm)

    def forward(self, features_NPV: torch.Tensor) -> torch.Tensor:
        """(N, P, V) -> (N, queries, LLM width)."""
        with torch.autocast(features_NPV.device.type, enabled=False):
            queries = self.queries.expand(len(features_NPV), -1, -1)
            features = features_NPV.to(queries.dtype)
            read = self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
            return self.projection(read)

    @classmethod
    def build(cls, name: str, widths: Widths, config: LlavaConfig, options: dict[str, Any]) -> nn.Module:
        """See the class for the options."""
        _only(name, options, *cls.defaults)
        settings = {**cls.defaults, **options}
        if settings["hidden_size"] % settings["num_attention_heads"]:
            raise RecipeError(f"connector {name!r}: hidden_size must be a multiple of num_attention_heads")
        return cls(widths, settings)

    @classmethod
    def tokens(cls, positions: int, options: dict[str, Any]) -> int:
        """One token a query, whatever the picture's size."""
        return int(options.get("num_queries", cls.defaults["num_queries"]))


def connector_class(name: str) -> type[Connector]:
    """The class behind a name; `mlp2x_gelu`, `mlp3x_gelu`, ... are one row."""
    if re.fullmatch(r"mlp[1-9]\d*x_gelu", name):
        return CONNECTORS["mlp"]
    if name == "mlp":
        raise RecipeError("connector 'mlp': write its depth, e.g. 'mlp2x_gelu'")
    return CONNECTORS[name]


def build_connector(name: str, widths: Widths, config: LlavaConfig, options: dict[str, Any]) -> nn.Module:
    """A connector with fresh weights. Raises RecipeError for an unknown name or option."""
    return connector_class(name).build(name, widths, config, options)


def connector_tokens(name: str, positions: int, options: dict[str, Any]) -> int:
    """Tokens an image in the LLM."""
    return connector_class(name).tokens(positions, options)


def _only(name: str, options: dict[str, Any], *known: str) -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise RecipeError(
            f"connector {name!r}: unknown option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}"
        )
