"""Model + batch -> loss: one weighted sum over supervised tokens, exact under any cut into micro-batches.

Shapes: B rows, T columns, D LLM width, S supervised tokens, V vocabulary, I images, P positions of one.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llava_train.data.batch import Batch
from llava_train.model.attention import Layout
from llava_train.model.families.base import Pictures
from llava_train.model.families.questions import padded, questions_in, reads_text
from llava_train.model.families.table import family_of
from llava_train.model.towers.features import layers_above, tower_layers
from llava_train.model.tuning import part_of

LOGITS_BYTES = 2**28
"""Logits that are in memory at a time, in float32."""

Blank = Literal["nothing", "features", "pixels"]
"""What a micro-batch of text alone sends through the connector, times zero; see `Objective`."""


class Objective(nn.Module):
    """The model with its loss as one module, so that DDP and DeepSpeed wrap both together.

    Without a picture, connector and tower get no gradient from a micro-batch, and ranks that wait for one hang; where
    weights are spread over ranks (ZeRO-3, FSDP2), a rank that does not gather those of the tower keeps the others
    waiting. So such a micro-batch is given a blank one times zero: blank features where only the connector trains or
    features were made before, blank pixels where the tower trains or is spread. Both go the way of pictures, module by
    module: ZeRO reduces gradients, and fetches weights ahead, in the order in which modules were used, and ranks whose
    order differs would add up gradients of different weights or wait for one another.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shards_weights: bool = False,
        attention: str = "auto",
        made_features: bool = False,
    ) -> None:
        """`attention` names one of `llava_train.model.attention.ATTENTIONS` for packed batches, or is "auto".

        `made_features`: batches bring features, never pixels.
        """
        super().__init__()
        self.model, self.attention, self.made_features = model, attention, made_features
        trains = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        family = family_of(model)
        behind = shards_weights or "connector" in trains or (family.looks and "llm" in trains)
        before = shards_weights or "vision" in trains or (behind and not family.separable)
        self.blank: Blank = "pixels" if before and not made_features else "features" if behind else "nothing"

    @property
    def idle_layers(self) -> list[nn.Module]:
        """Layers of the model that no batch runs."""
        tower = getattr(self.model.model, "vision_tower", None)
        if tower is None:  # a class that is not of LLaVA's kind uses all of what it has
            return []
        return tower_layers(tower) if self.made_features else layers_above(self.model)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The batch's share of the step's loss: sum over supervised tokens of weight * nll, a scalar."""
        return (token_losses(self.model, batch, self.blank, self.attention) * batch.weights).sum()


def token_losses(
    model: PreTrainedModel, batch: Batch, blank: Blank = "nothing", attention: str = "auto"
) -> torch.Tensor:
    """Negative log-likelihoods of the supervised tokens, (S,)."""
    layout = Layout(batch.lengths, batch.parents, batch.input_ids.device, attention) if batch.lengths else None
    arguments = {
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
        **({"layout": layout} if layout else {}),
        **_decoder_inputs(model, batch, blank),
    }
    hidden_BTD = model.model.language_model(**arguments, use_cache=False).last_hidden_state
    return _nll(model.lm_head, hidden_BTD.flatten(0, 1).index_select(0, batch.predictors), batch.targets)


def _nll(head: nn.Linear, hidden_SD: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods (S,). Only what predicts a supervised token reaches the head: at LLaVA's lengths that is
    one in five. More logits than `LOGITS_BYTES` are made part by part, and made again in the backward pass."""
    size = max(1, LOGITS_BYTES // (4 * head.out_features))
    if len(targets_S) <= size:
        return _part_nll(head, hidden_SD, targets_S)
    parts = zip(hidden_SD.split(size), targets_S.split(size))
    return torch.cat([checkpoint(_part_nll, head, *part, use_reentrant=False) for part in parts])


def _part_nll(head: nn.Linear, hidden_SD: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
    return cross_entropy(head(hidden_SD).float(), targets_S, reduction="none")


def _decoder_inputs(model: PreTrainedModel, batch: Batch, blank: Blank) -> dict[str, Any]:
    """What the language model reads: embedded ids, and the pictures in their places or beside them."""
    embeddings_BTD = model.get_input_embeddings()(batch.input_ids)
    family, shown = family_of(model), batch.pixel_values is not None or batch.features is not None
    if shown:
        features = None if batch.features is None else batch.features.to(embeddings_BTD.dtype)
        text = _questions(model, batch) if reads_text(model) else None
        pictures = Pictures(batch.pixel_values, features, batch.facts, text)
    elif blank == "nothing":
        return {"inputs_embeds": embeddings_BTD}
    else:
        pictures = family.blank(model, blank == "features", embeddings_BTD)
    return family.decoder_inputs(model, batch, embeddings_BTD, family.states(model, pictures), shown)


def _questions(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What is asked about each picture: the text behind it up to the answer. Samples may share no beginning."""
    targets, width = (batch.predictors + 1).tolist(), batch.input_ids.shape[1]
    # Where its answer was cut off, a question ends with its sample.
    lengths = [[sum(row)] for row in batch.attention_mask.tolist()] if batch.attention_mask is not None else None
    stretches = [list(accumulate(batch.lengths))]
    found = []
    for number, ids in enumerate(batch.input_ids.tolist()):
        own = lengths[number] if lengths else stretches[number]
        ends = sorted([target - number * width for target in targets if target >= number * width] + own)
        found += questions_in(ids, model.config.image_token_id, model.config.image_seq_length, ends)
    return padded(found, batch.input_ids.device)
