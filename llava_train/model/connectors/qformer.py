"""The Q-Former: learned queries that read the image, at random or from a BLIP-2 folder, with the instruction or not.

Shapes: N images, P positions, V vision width, Q queries, L tokens of text, W the Q-Former's width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    LlavaConfig,
)

from llava_train.model.connectors.base import Connector, Option, Widths, register
from llava_train.model.connectors.blip2 import SIZES, read_sizes, take_weights

_LONGEST = 512
"""Positions of text with an embedding of their own; those beyond share the last."""


@register("qformer")
class QFormer(Connector):
    """Learned queries that read the image through transformers' Q-Former, then a projection (BLIP-2, arXiv 2301.12597).

    Options: `num_queries` (32), `num_hidden_layers` (6), `hidden_size` (768), `num_attention_heads` (12),
    `intermediate_size` (4 x hidden), `cross_attention_frequency` (2); or `init_from`, a BLIP-2 folder that brings sizes
    and weights, with `reset_cross_attention` where its encoder had another width than this one. `instruction` has the
    queries read the text, too (InstructBLIP, arXiv 2305.06500), by an embedding table of the Q-Former's own.

    bf16: it computes in the precision of its weights, outside autocast: float32 in every training run (transformers
    keeps its Q-Former so), the model's own precision at inference.
    """

    options = {
        "num_queries": Option(int, 32),
        "num_hidden_layers": Option(int, 6),
        "hidden_size": Option(int, 768),
        "num_attention_heads": Option(int, 12),
        "intermediate_size": Option(int, None),
        "cross_attention_frequency": Option(int, 2),
        "instruction": Option(bool, False),
        "init_from": Option(str, None),
        "reset_cross_attention": Option(bool, False),
    }

    def __init__(self, widths: Widths, settings: dict[str, Any], vocabulary: int) -> None:
        super().__init__()
        sizes = {name: settings[name] for name in SIZES if name != "num_queries"}
        sizes |= {"encoder_hidden_size": widths.vision, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.reads_text = settings["instruction"]
        config: Any
        if self.reads_text:
            # No id is padding: which tokens count is for the mask to say.
            config = InstructBlipQFormerConfig(
                vocab_size=vocabulary, max_position_embeddings=_LONGEST, pad_token_id=None, **sizes
            )
        else:
            config = Blip2QFormerConfig(**sizes)
        width = config.hidden_size
        self.queries = nn.Parameter(torch.randn(1, settings["num_queries"], width) * config.initializer_range)
        self.qformer = InstructBlipQFormerModel(config) if self.reads_text else Blip2QFormerModel(config)
        if self.reads_text:  # nothing reads what the last layer would make of the text
            last = self.qformer.encoder.layer[-1]
            last.intermediate, last.output = nn.Identity(), _Unchanged()
        self.projection = nn.Linear(width, widths.llm)

    def forward(
        self,
        features_NPV: torch.Tensor,
        text_NL: torch.Tensor | None = None,
        text_mask_NL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(N, P, V) -> (N, queries, LLM width).

        Where `reads_text`: `text_NL` are ids of the LLM's tokenizer, `text_mask_NL` is 0 at padding, on either side.
        Without text the queries read the image alone, and the weights for text still get a gradient, of zero: ranks
        whose pictures come without would otherwise keep the others waiting.
        """
        with torch.autocast(features_NPV.device.type, enabled=False):
            queries_NQW = self.queries.expand(len(features_NPV), -1, -1)
            features = features_NPV.to(queries_NQW.dtype)
            text = self._text(text_NL, text_mask_NL, len(features)) if self.reads_text else {}
            read = self.qformer(query_embeds=queries_NQW, encoder_hidden_states=features, **text).last_hidden_state
            return self.projection(read[:, : queries_NQW.shape[1]])

    def _text(self, text_NL: torch.Tensor | None, mask_NL: torch.Tensor | None, images: int) -> dict[str, torch.Tensor]:
        if text_NL is None or not text_NL.shape[1]:
            text_NL = torch.zeros(images, 1, dtype=torch.long, device=self.queries.device)
            mask_NL = torch.zeros_like(text_NL)
        mask_NL = torch.ones_like(text_NL) if mask_NL is None else mask_NL.to(text_NL.dtype)
        positions_NL = (mask_NL.cumsum(1) - 1).clamp(0, _LONGEST - 1)
        seen_NQ = mask_NL.new_ones(images, self.queries.shape[1])
        return {
            "input_ids": text_NL,
            "position_ids": positions_NL,
            "attention_mask": torch.cat([seen_NQ, mask_NL], 1),
        }

    @classmethod
    def settings(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Options, defaults, and the sizes that `init_from` brings."""
        settings = super().settings(options)
        folder = settings["init_from"]
        if folder is not None:
            given = [name for name in SIZES if name in options]
            if given:
                raise cls.fault(f"{', '.join(given)}: init_from brings the sizes; remove it")
            if settings["instruction"]:
                raise cls.fault("instruction: a BLIP-2 Q-Former has no weights for text; leave out init_from")
            settings |= read_sizes(Path(folder))[0]
        elif settings["reset_cross_attention"]:
            raise cls.fault("reset_cross_attention: is for init_from, which is not set")
        settings["intermediate_size"] = settings["intermediate_size"] or 4 * settings["hidden_size"]
        if settings["hidden_size"] % settings["num_attention_heads"]:
            raise cls.fault("hidden_size must be a multiple of num_attention_heads")
        return settings

    @classmethod
    def build(cls, name: str, widths: Widths, config: LlavaConfig, options: dict[str, Any]) -> nn.Module:
        """See the class for the options."""
        settings = cls.settings(options)
        if settings["init_from"] is not None and not settings["reset_cross_attention"]:
            expected = read_sizes(Path(settings["init_from"]))[1]
            if expected != widths.vision:
                raise cls.fault(
                    f"init_from: {settings['init_from']}: its Q-Former reads features of width {expected}, this "
                    f"encoder gives {widths.vision}; reset_cross_attention: true takes all but their projections"
                )
        return cls(widths, settings, int(config.text_config.vocab_size))

    @classmethod
    def tokens(cls, positions: int, options: dict[str, Any]) -> int:
        """One token a query, whatever the picture's size."""
        return int(cls.settings(options)["num_queries"])

    @classmethod
    def initialise(cls, connector: nn.Module, options: dict[str, Any]) -> tuple[str, ...]:
        """Take the weights of `init_from`. Raises CheckpointError, listing them, for keys that do not fit."""
        settings = cls.settings(options)
        if settings["init_from"] is None:
            return ()
        return take_weights(connector, Path(settings["init_from"]), settings["reset_cross_attention"])

    @classmethod
    def lasting(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The sizes in place of the folder that brought them."""
        if options.get("init_from") is None:
            return options
        settings = cls.settings(options)
        return {name: settings[name] for name in SIZES}


class _Unchanged(nn.Module):
    def forward(self, made: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return before
