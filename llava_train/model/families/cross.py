"""Pictures by cross-attention: layers of the decoder look at the connector's output; see `llava_train.model.cross`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from llava_train.model.cross import fused
from llava_train.model.cross.blocks import pictures_seen
from llava_train.model.cross.fused import CrossAttentionForConditionalGeneration, decoder_inputs
from llava_train.model.families.base import Pictures, Text
from llava_train.model.families.llava import Llava


class CrossAttention(Llava):
    """`CrossAttentionForConditionalGeneration`: a picture is one `<image>` in the text."""

    model_class = CrossAttentionForConditionalGeneration

    def states(self, model: PreTrainedModel, pictures: Pictures) -> torch.Tensor:
        """The connector's output, (I, P, D)."""
        return self.projected(model, pictures)

    def complete(self, model: PreTrainedModel, seed: int | None) -> None:
        """The gated blocks, and the decoder's way to them."""
        model.model.connect()
        if seed is not None:
            fused._require_arguments(model.model.language_model)
            fused._draw(model.model.cross_attention, 0.02, seed)

    def describe(self, config: PretrainedConfig, image_processor: Any) -> dict[str, Any]:
        """Never: no folder in transformers' layout holds such a model."""
        raise NotImplementedError

    def decoder_inputs(
        self, model: PreTrainedModel, text: Text, embeddings_BTD: torch.Tensor, states: torch.Tensor, shown: bool
    ) -> dict[str, Any]:
        """The embeddings as they are, and the pictures beside them."""
        states = states.to(embeddings_BTD.dtype)
        seen = pictures_seen(text.input_ids, self.image_token_id(model), text.lengths, text.parents)
        return {"inputs_embeds": embeddings_BTD, **decoder_inputs(model, states, seen, connected=not shown)}
