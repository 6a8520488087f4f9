"""Loaded parts as one model of a class of the table of families; and what tells weights apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from llava_train.errors import CheckpointError
from llava_train.files import sha256_json
from llava_train.model.families.table import FAMILIES
from llava_train.model.llm import head_of


def join(
    architecture: str,
    config: PretrainedConfig,
    tower: PreTrainedModel,
    llm: PreTrainedModel,
    connector: nn.Module,
    seed: int | None,
) -> PreTrainedModel:
    """Put loaded parts into the class of the architecture; nothing is initialised twice.

    What an architecture has besides its parts (newlines, gated layers) begins as `seed` says; without one it stays
    empty, to be loaded.
    """
    parts = Parts(tower, llm.get_decoder(), connector, head_of(llm), llm.generation_config)
    return put_together(architecture, config, parts, seed)


@dataclass(frozen=True)
class Parts:
    """The loaded parts of a model."""

    tower: nn.Module
    decoder: nn.Module
    connector: nn.Module
    head: nn.Module
    generation_config: Any

    @classmethod
    def of(cls, model: PreTrainedModel) -> Parts:
        """Those of a model of any LLaVA class, which is not to be used any more."""
        inner = model.model
        return cls(
            inner.vision_tower,
            inner.language_model,
            inner.multi_modal_projector,
            model.lm_head,
            model.generation_config,
        )


def put_together(architecture: str, config: PretrainedConfig, parts: Parts, seed: int | None) -> PreTrainedModel:
    """See `join`."""
    with torch.device("meta"):
        model = FAMILIES[architecture].model_class(config)
    model.model.vision_tower = parts.tower
    model.model.language_model = parts.decoder
    model.model.multi_modal_projector = parts.connector
    model.lm_head = parts.head
    FAMILIES[architecture].complete(model, seed)
    model.generation_config = parts.generation_config
    model.generation_config.pad_token_id = config.pad_token_id
    model.config.text_config.vocab_size = model.lm_head.weight.shape[0]
    return model.eval()


def require_weights(model: nn.Module) -> None:
    """Raise CheckpointError, naming them, where weights of a joined model are empty still."""
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise CheckpointError(f"no part brings these weights: {', '.join(left[:10])}")


def fingerprint(part: Any, rows: int | None = None) -> str:
    """A hash of a part's weights that is cheap at any size: names, shapes and an exact sum of each tensor's bits.

    `rows` limits embeddings and head to the rows that came with the checkpoint.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    # By what it is: not every decoder calls its embeddings the same.
    embedding = part.get_input_embeddings().weight if rows is not None else None
    described = []
    for name, tensor in sorted(part.state_dict(keep_vars=True).items()):
        grown = rows is not None and (tensor is embedding or name.startswith("lm_head."))
        whole = tensor.detach()[:rows] if grown else tensor.detach()
        bits = whole.contiguous().view(integers[tensor.element_size()])
        described.append([name, list(whole.shape), int(bits.sum(dtype=torch.int64))])
    return sha256_json(described)[:16]
