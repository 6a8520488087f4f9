"""Model + batch -> loss: one weighted sum over supervised tokens, exact under any cut into micro-batches.

Shapes: B rows, T columns, D LLM width, S supervised tokens, V vocabulary, I images, P positions of one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration

from llava_train.data.batch import Batch
from llava_train.model.attention import Layout
from llava_train.model.vision import feature_shape, image_features, layer_list, layers_above

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
        model: LlavaForConditionalGeneration,
        shards_weights: bool = False,
        attention: str = "auto",
        made_features: bool = False,
    ) -> None:
        """`attention` names one of `llava_train.model.attention.ATTENTIONS` for packed batches, or is "auto".

        `made_features`: batches bring features, never pixels.
        """
        super().__init__()
        self.model, self.attention, self.made_features = model, attention, made_features
        tower, connector = model.model.vision_tower, model.model.multi_modal_projector
        needed = {
            "features": shards_weights or any(p.requires_grad for p in connector.parameters()),
            "pixels": not made_features and (shards_weights or any(p.requires_grad for p in tower.parameters())),
        }
        self.blank: Blank = "pixels" if needed["pixels"] else "features" if needed["features"] else "nothing"

    @property
    def idle_layers(self) -> list[nn.Module]:
        """Layers of the model that no batch runs."""
        tower = self.model.model.vision_tower
        return list(getattr(*layer_list(tower))) if self.made_features else layers_above(self.model)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The batch's share of the step's loss: sum over supervised tokens of weight * nll, a scalar."""
        return (token_losses(self.model, batch, self.blank, self.attention) * batch.weights).sum()


def token_losses(
    model: LlavaForConditionalGeneration, batch: Batch, blank: Blank = "nothing", attention: str = "auto"
) -> torch.Tensor:
    """Negative log-likelihoods of the supervised tokens, (S,)."""
    layout = Layout(batch.lengths, batch.parents, batch.input_ids.device, attention) if batch.lengths else None
    hidden_BTD = model.model(
        inputs_embeds=_embeddings(model, batch, blank),
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        **({"layout": layout} if layout else {}),
    ).last_hidden_state
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


def _embeddings(model: LlavaForConditionalGeneration, batch: Batch, blank: Blank) -> torch.Tensor:
    """What the language model reads, (B, T, D): embedded ids with the features of pictures in their places."""
    embeddings_BTD = model.get_input_embeddings()(batch.input_ids)
    features_IPV = _features(model, batch, blank, embeddings_BTD)
    if features_IPV is None:
        return embeddings_BTD
    features = model.model.multi_modal_projector(features_IPV).to(embeddings_BTD.dtype)
    if batch.pixel_values is None and batch.features is None:
        return embeddings_BTD + 0.0 * features.sum()
    places_BT1 = (batch.input_ids == model.config.image_token_id).unsqueeze(-1)
    return embeddings_BTD.masked_scatter(places_BT1, features)


def _features(
    model: LlavaForConditionalGeneration, batch: Batch, blank: Blank, like: torch.Tensor
) -> torch.Tensor | None:
    """What the connector reads, (I, P, V), or None where it need not."""
    if batch.features is not None:
        return batch.features.to(like.dtype)
    if batch.pixel_values is not None:
        return image_features(model, batch.pixel_values)
    if blank == "nothing":
        return None
    if blank == "pixels":
        size = model.config.vision_config.image_size
        return image_features(model, like.new_zeros(1, 3, size, size))
    return like.new_zeros(1, *feature_shape(model))
