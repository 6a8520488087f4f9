"""The text that a connector reads beside a picture (InstructBLIP, arXiv 2305.06500): what follows in the same turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel


def reads_text(model: PreTrainedModel) -> bool:
    """Whether the connector of a model wants to be told the question."""
    return bool(getattr(getattr(model.model, "multi_modal_projector", None), "reads_text", False))


def padded(questions: Sequence[Sequence[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of several questions, both (I, L); 0 in the mask where nothing stands."""
    longest = max([1, *map(len, questions)])
    ids = torch.tensor([[*question, *[0] * (longest - len(question))] for question in questions], dtype=torch.long)
    mask = torch.tensor([[1] * len(question) + [0] * (longest - len(question)) for question in questions]).long()
    return ids.to(device), mask.to(device)


def questions_in(ids: Sequence[int], image_token_id: int, image_tokens: int, ends: Sequence[int]) -> list[list[int]]:
    """The question about each picture of a text: from behind it to the next of `ends` (rising), pictures left out.

    >>> questions_in([9, 9, 1, 2, 5, 9, 9, 9, 9, 3, 6], 9, image_tokens=2, ends=[4, 10])
    [[1, 2], [3], [3]]
    """
    places = [place for place, token in enumerate(ids) if token == image_token_id][image_tokens - 1 :: image_tokens]
    until = [next((end for end in ends if end > place), len(ids)) for place in places]
    return [[token for token in ids[place:end] if token != image_token_id] for place, end in zip(places, until)]
