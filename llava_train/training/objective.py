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

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        """The batch's share of the step's loss: sum over supervised tokens of weight * nll, a scalar."""
        nll_S, rows_S = token_losses(self.model, batch)
        return (nll_S * batch.weights[rows_S]).sum()


def token_losses(model: LlavaForConditionalGeneration, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihoods of the supervised tokens (S,) and the row of the batch each is in (S,).

    Only supervised positions reach the LM head: at LLaVA's lengths that is one in five, and the logits of
    the rest would be thrown away.
    """
    hidden_BTD = model.model(
        **_inputs(model, batch), attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    targets = batch.labels[:, 1:]
    rows_S, columns_S = (targets != IGNORE).nonzero(as_tuple=True)
    logits_SV = model.lm_head(hidden_BTD[rows_S, columns_S]).float()
    return cross_entropy(logits_SV, targets[rows_S, columns_S], reduction="none"), rows_S


def _inputs(model: LlavaForConditionalGeneration, batch: Batch) -> dict[str, torch.Tensor]:
    """Ids and pixels; for text alone, embeddings with a blank picture in their graph, times zero.

    Without it connector and tower get no gradient from a micro-batch of text, and ranks that wait for one hang.
    It goes the way of a real picture, because ZeRO reduces gradients in the order in which they come: ranks
    whose order differs would add up gradients of different weights.
    """
    if batch.pixel_values is not None:
        return {"input_ids": batch.input_ids, "pixel_values": batch.pixel_values}
    embeddings = model.get_input_embeddings()(batch.input_ids)
    sides = (model.model.vision_tower, model.model.multi_modal_projector)
    if any(parameter.requires_grad for side in sides for parameter in side.parameters()):
        size = model.config.vision_config.image_size
        blank = torch.zeros(1, 3, size, size, device=model.device, dtype=model.dtype)
        features = torch.cat(model.model.get_image_features(blank).pooler_output)
        embeddings = embeddings + 0.0 * features.sum().to(embeddings.dtype)
    return {"inputs_embeds": embeddings}
