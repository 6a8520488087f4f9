"""Pictures by cross-attention: layers of the decoder look at the connector's output; see `llava_train.model.cross`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from llava_train.model.cross.blocks import pictures_seen
from llava_train.model.cross.fused import CrossAttentionForConditionalGeneration, complete_blocks, decoder_inputs
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
        complete_blocks(model, seed)

    def decoder_inputs(
        self, model: PreTrainedModel, text: Text, embeddings_BTD: torch.Tensor, states: torch.Tensor, shown: bool
    ) -> dict[str, Any]:
        """The embeddings as they are, and the pictures beside them."""
        states = states.to(embeddings_BTD.dtype)
        seen = pictures_seen(
            text.input_ids, self.image_token_id(model), text.lengths, text.parents, text.attention_mask
        )
        return {"inputs_embeds": embeddings_BTD, **decoder_inputs(model, states, seen, connected=not shown)}

    def prompt_inputs(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, pictures: Pictures | None
    ) -> dict[str, Any]:
        """Pictures looked at once, whatever the connector reads beside them."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if pictures is None:
            return inputs
        shown = model.model.read(self.states(model, pictures))
        return {**inputs, "pictures": shown, "seen": model.model.seen(input_ids, len(shown.states))}
