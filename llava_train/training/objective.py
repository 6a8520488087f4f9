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
        loss = (nll_S * batch.weights[rows_S]).sum()
        return loss if batch.pixel_values is not None else loss + self._untouched()

    def _untouched(self) -> torch.Tensor:
        """Zero, with the image side in its graph.

        A micro-batch of text alone gives connector and tower no gradient at all, and ranks that wait for one
        would hang; zero times their weights gives a gradient of zeros.
        """
        trained = [
            parameter.sum()
            for part in (self.model.model.vision_tower, self.model.model.multi_modal_projector)
            for parameter in part.parameters()
            if parameter.requires_grad
        ]
        return 0.0 * torch.stack(trained).sum() if trained else torch.zeros((), device=self.model.device)


def token_losses(model: LlavaForConditionalGeneration, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihoods of the supervised tokens (S,) and the row of the batch each is in (S,).

    Only supervised positions reach the LM head: at LLaVA's lengths that is one in five, and the logits of
    the rest would be thrown away.
    """
    hidden_BTD = model.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=batch.pixel_values,
        use_cache=False,
    ).last_hidden_state
    targets = batch.labels[:, 1:]
    rows_S, columns_S = (targets != IGNORE).nonzero(as_tuple=True)
    logits_SV = model.lm_head(hidden_BTD[rows_S, columns_S]).float()
    return cross_entropy(logits_SV, targets[rows_S, columns_S], reduction="none"), rows_S
