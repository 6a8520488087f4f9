"""Model + batch -> loss: one weighted sum over supervised tokens, exact under any cut into micro-batches.

Shapes: B samples, T tokens, D LLM width, S supervised positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration

from llava_train.data.batch import Batch
from llava_train.data.encode import IGNORE


class Objective(nn.Module):
    """The model with its loss as one module, so that DDP and DeepSpeed wrap both together."""

    def __init__(self, model: LlavaForConditionalGeneration, always_look: bool = False) -> None:
        """`always_look` runs the tower for text alone even where nothing of it trains: see `_embeddings`."""
        super().__init__()
        self.model = model
        sides = (model.model.vision_tower, model.model.multi_modal_projector)
        self.looks = always_look or any(p.requires_grad for side in sides for p in side.parameters())

    def forward(self, batch: Batch) -> torch.Tensor:
        """The batch's share of the step's loss: sum over supervised tokens of weight * nll, a scalar."""
        nll_S, rows_S = token_losses(self.model, batch, self.looks)
        return (nll_S * batch.weights[rows_S]).sum()


def token_losses(
    model: LlavaForConditionalGeneration, batch: Batch, looks: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihoods of the supervised tokens (S,) and the row of the batch each is in (S,).

    Only supervised positions reach the LM head: at LLaVA's lengths that is one in five, and the logits of
    the rest would be thrown away.
    """
    hidden_BTD = model.model(
        inputs_embeds=_embeddings(model, batch, looks), attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    targets = batch.labels[:, 1:]
    rows_S, columns_S = (targets != IGNORE).nonzero(as_tuple=True)
    logits_SV = model.lm_head(hidden_BTD[rows_S, columns_S]).float()
    return cross_entropy(logits_SV, targets[rows_S, columns_S], reduction="none"), rows_S


def _embeddings(model: LlavaForConditionalGeneration, batch: Batch, looks: bool) -> torch.Tensor:
    """What the language model reads, (B, T, D): embedded ids with the features of pictures in their places.

    Where the model `looks`, text alone is given a blank picture times zero. Without it connector and tower get no
    gradient from such a micro-batch, and ranks that wait for one hang; where weights are spread over ranks (ZeRO-3,
    FSDP2), a rank that does not gather those of the tower keeps the others waiting. Both go the same way, module by
    module: ZeRO reduces gradients, and fetches weights ahead, in the order in which modules were used, and ranks whose
    order differs would add up gradients of different weights or wait for one another.
    """
    embeddings_BTD = model.get_input_embeddings()(batch.input_ids)
    pixels = batch.pixel_values
    if pixels is None and looks:
        size = model.config.vision_config.image_size
        pixels = torch.zeros(1, 3, size, size, device=embeddings_BTD.device, dtype=embeddings_BTD.dtype)
    if pixels is None:
        return embeddings_BTD
    features = torch.cat(model.model.get_image_features(pixels).pooler_output).to(embeddings_BTD.dtype)
    if batch.pixel_values is None:
        return embeddings_BTD + 0.0 * features.sum()
    places_BT1 = (batch.input_ids == model.config.image_token_id).unsqueeze(-1)
    return embeddings_BTD.masked_scatter(places_BT1, features)
