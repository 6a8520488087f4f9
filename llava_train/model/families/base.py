"""What kinds of models differ in between a batch and the decoder; the loss, the loop and the checkpoints are one.

Shapes: B rows, T columns, D LLM width, I pictures, P positions of one, V what the connector reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Pictures:
    """The pictures of a batch in reading order, as `llava_train.data.batch.Batch` brings them.

    `text` are ids and mask of the question about each, where the connector reads it; see `questions`.
    """

    pixel_values: torch.Tensor | None = None
    features: torch.Tensor | None = None
    facts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    text: tuple[torch.Tensor, torch.Tensor] | None = None


class Text(Protocol):
    """The text of a batch; see `llava_train.data.batch.Batch`."""

    @property
    def input_ids(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def attention_mask(self) -> torch.Tensor | None: ...  # noqa: D102
    @property
    def position_ids(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def lengths(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def parents(self) -> tuple[int, ...]: ...  # noqa: D102


class Family:
    """A kind of model.

    Attributes:
        model_class: transformers' class, or ours.
        image_token: the token whose places pictures take in the text.
        marker: what stands for a picture in the text; holds one `image_token`.
        line_end: what stands behind it where our data and templates begin a new line.
        packs: whether its decoder reads packed rows.
        separable: whether features can be made before the connector and kept.
        measured: whether FLOPs and memory of tower and connector can be told a picture of the tower's own size.
        looks: whether layers of the decoder itself run for pictures alone, so that text would leave them no gradient.
        mixes: whether prompts of different numbers of pictures can be answered together.
    """

    model_class: type[PreTrainedModel]
    image_token = "<image>"
    marker = "<image>"
    line_end = "\n"
    packs = True
    separable = True
    measured = True
    looks = False
    mixes = True

    def states(self, model: PreTrainedModel, pictures: Pictures) -> Any:
        """What the decoder reads of pictures, behind the connector."""
        raise NotImplementedError

    def blank(self, model: PreTrainedModel, features: bool, like: torch.Tensor) -> Pictures:
        """A picture of zeros, or its `features`, with the device and precision of `like`."""
        raise NotImplementedError

    def decoder_inputs(
        self, model: PreTrainedModel, text: Text, embeddings_BTD: torch.Tensor, states: Any, shown: bool
    ) -> dict[str, Any]:
        """Arguments of the decoder besides mask and cache. Without `shown`, states of a blank picture stand nowhere
        in the text, and only keep the graph connected."""
        raise NotImplementedError

    def prompt_inputs(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, pictures: Pictures | None
    ) -> dict[str, torch.Tensor]:
        """Arguments of the model's `forward` and `generate` for left-padded prompts, both (B, T)."""
        raise NotImplementedError

    def complete(self, model: PreTrainedModel, seed: int | None) -> None:
        """Make what a model assembled from parts has besides them; without a seed its weights come from a file."""

    def describe(self, config: PretrainedConfig, image_processor: Any) -> dict[str, Any]:
        """Fields of a ModelSpec for a folder in transformers' layout: `connector` and all about its pictures."""
        raise NotImplementedError

    def placed(
        self, model: PreTrainedModel, input_ids: torch.Tensor, embeddings_BTD: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        """The embeddings of a text with tokens of pictures, (tokens, D), in their places."""
        places_BT1 = (input_ids == self.image_token_id(model)).unsqueeze(-1)
        return embeddings_BTD.masked_scatter(places_BT1, states.to(embeddings_BTD.dtype))

    def image_token_id(self, model: PreTrainedModel) -> int:
        """Id of `image_token`."""
        return int(model.config.image_token_id)
