"""transformers' LLaVA classes with parts that they have no place for: connector, encoder, head.

They are what stands at the end of an exported modelling file, and work here as they do there.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn
from transformers import (
    AutoModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    PreTrainedModel,
)

from llava_train.model.assemble import widths
from llava_train.model.connectors import build_connector
from llava_train.model.cross.fused import CrossAttentionForConditionalGeneration, CrossAttentionModel
from llava_train.model.llm import Head
from llava_train.model.towers.features import image_features
from llava_train.model.towers.stack import Towers

MODEL_TYPE = "llava_train"
ENCODERS: dict[str, type[PreTrainedModel]] = {}
"""Encoders that transformers has no class for, by the model_type of their configurations"""


def own_encoder(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Make an encoder known to the classes below."""
    ENCODERS[model_class.config_class.model_type] = model_class
    return model_class


OwnTowers = own_encoder(Towers)
"""Several encoders, or one with registers"""


def read_encoder(config: Any) -> None:
    """Make an object of the encoder's configuration, in place, where transformers has no class for it."""
    values = config.vision_config
    if isinstance(values, dict) and values.get("model_type") in ENCODERS:
        config.vision_config = ENCODERS[values["model_type"]].config_class(**values)


class LlavaTrainConfig(LlavaConfig):
    """LlavaConfig and what the model has besides.

    Attributes:
        connector, connector_options: as in a recipe.
        head_bias: whether the LM head has a bias.
        head_after: what is done to its logits, by what number; see `Head`.
        cross_attention: which layers look at pictures, and how, where they do so by cross-attention.
    """

    model_type = MODEL_TYPE

    connector: str = "mlp2x_gelu"
    connector_options: dict[str, Any] | None = None
    head_bias: bool = False
    head_after: list[Any] | None = None
    cross_attention: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        read_encoder(self)
        super().__post_init__(**kwargs)


class LlavaTrainNextConfig(LlavaNextConfig):
    """The same of LLaVA-NeXT."""

    model_type = MODEL_TYPE

    connector: str = "mlp2x_gelu"
    connector_options: dict[str, Any] | None = None
    head_bias: bool = False
    head_after: list[Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        read_encoder(self)
        super().__post_init__(**kwargs)


class LlavaTrainOnevisionConfig(LlavaOnevisionConfig):
    """The same of LLaVA-OneVision."""

    model_type = MODEL_TYPE

    connector: str = "mlp2x_gelu"
    connector_options: dict[str, Any] | None = None
    head_bias: bool = False
    head_after: list[Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        read_encoder(self)
        super().__post_init__(**kwargs)


class _Inside:
    """Puts encoder and connector in their places."""

    def __init__(self, config: Any) -> None:
        if own := ENCODERS.get(config.vision_config.model_type):
            # By its very class: a server may have sent the configuration from another process, with a class of its own.
            AutoModel.register(type(config.vision_config), own, exist_ok=True)
        super().__init__(config)  # type: ignore[call-arg]
        options = config.connector_options or {}
        self.multi_modal_projector = build_connector(config.connector, widths(config), config, options)
        self.post_init()  # type: ignore[attr-defined]


class LlavaTrainModel(_Inside, LlavaModel):
    """Encoder, connector and decoder."""

    config_class = LlavaTrainConfig


class LlavaTrainInstructedModel(LlavaTrainModel):
    """The same for a connector that reads the question, too."""

    def get_image_features(self, *_: Any, **__: Any) -> NoReturn:
        """Nobody has them without the question: a server that asks for them would answer beside the point."""
        raise NotImplementedError("this model's connector reads the question: pictures alone have no features")


class LlavaTrainNextModel(_Inside, LlavaNextModel):
    """The same for pictures in tiles."""

    config_class = LlavaTrainNextConfig


class LlavaTrainOnevisionModel(_Inside, LlavaOnevisionModel):
    """The same for pictures in tiles."""

    config_class = LlavaTrainOnevisionConfig


class LlavaTrainCrossModel(_Inside, CrossAttentionModel):
    """The same with layers of the decoder that look at pictures."""

    config_class = LlavaTrainConfig


class _Outside:
    """Puts the head around the rest."""

    inner: type[PreTrainedModel]

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)  # type: ignore[arg-type]
        self.model = self.inner(config)
        head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=config.head_bias)
        after = tuple((name, number) for name, number in config.head_after or ())
        self.lm_head = Head(head, after) if after else head
        self.post_init()  # type: ignore[attr-defined]


class LlavaTrainForConditionalGeneration(_Outside, LlavaForConditionalGeneration):
    """A picture is so many tokens of the text."""

    config_class = LlavaTrainConfig
    inner = LlavaTrainModel


class LlavaTrainInstructedForConditionalGeneration(LlavaTrainForConditionalGeneration):
    """A picture is so many tokens of the text, made by a connector that reads the question, too.

    Shapes: B rows, T positions, I pictures in reading order, L the longest question.
    """

    inner = LlavaTrainInstructedModel

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        question_ids: torch.Tensor | None = None,
        question_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As LLaVA's; `question_ids` and `question_mask` (I, L) are those of the processor."""
        if pixel_values is not None:
            kwargs["inputs_embeds"] = self._embedded(input_ids, pixel_values, question_ids, question_mask)
            input_ids = None
        return super().forward(input_ids=input_ids, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        question_ids: torch.Tensor | None = None,
        question_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' `generate`; pictures are looked at once."""
        prompt = kwargs.pop("input_ids", inputs)
        if pixel_values is not None:
            kwargs["inputs_embeds"] = self._embedded(prompt, pixel_values, question_ids, question_mask)
        return super().generate(prompt, **kwargs)

    def _embedded(self, input_ids: Any, pixel_values: torch.Tensor, ids_IL: Any, mask_IL: Any) -> torch.Tensor:
        """Embeddings of the text with the pictures in their places, (B, T, D). ValueError where they do not fit."""
        embeddings_BTD = self.get_input_embeddings()(input_ids)
        tokens = self.model.multi_modal_projector(image_features(self, pixel_values), ids_IL, mask_IL).flatten(0, 1)
        places = input_ids == self.config.image_token_id
        if int(places.sum()) != len(tokens):
            raise ValueError(f"the text has {int(places.sum())} places for tokens of pictures, there are {len(tokens)}")
        return embeddings_BTD.masked_scatter(places.unsqueeze(-1), tokens.to(embeddings_BTD.dtype))


class LlavaTrainNextForConditionalGeneration(_Outside, LlavaNextForConditionalGeneration):
    """A picture is itself in small, then tiles of it (LLaVA-NeXT)."""

    config_class = LlavaTrainNextConfig
    inner = LlavaTrainNextModel


class LlavaTrainOnevisionForConditionalGeneration(_Outside, LlavaOnevisionForConditionalGeneration):
    """The same, pooled where there are many tiles (LLaVA-OneVision)."""

    config_class = LlavaTrainOnevisionConfig
    inner = LlavaTrainOnevisionModel


class LlavaTrainCrossForConditionalGeneration(_Outside, CrossAttentionForConditionalGeneration):
    """A picture is one token of the text, and layers of the decoder look at it."""

    config_class = LlavaTrainConfig
    inner = LlavaTrainCrossModel
