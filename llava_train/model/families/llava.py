"""LLaVA: a picture's tokens take the places of `<image>` among the embeddings of the text."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, PretrainedConfig, PreTrainedModel

from llava_train.model.families.base import Family, Pictures, Text
from llava_train.model.towers.features import feature_shape, image_features
from llava_train.model.towers.shapes import vision_shape


class Llava(Family):
    """`LlavaForConditionalGeneration`, arXiv 2304.08485 and 2310.03744: one square picture, one piece."""

    model_class: type[PreTrainedModel] = LlavaForConditionalGeneration

    def states(self, model: PreTrainedModel, pictures: Pictures) -> torch.Tensor:
        """Tokens of all pictures one after another, (tokens, D)."""
        return self.projected(model, pictures).flatten(0, 1)

    def projected(self, model: PreTrainedModel, pictures: Pictures) -> torch.Tensor:
        """The connector's tokens of each piece, (pieces, tokens, D)."""
        features = pictures.features
        if features is None:
            assert pictures.pixel_values is not None, "pictures bring pixels or features"
            features = image_features(model, pictures.pixel_values)
        tokens: torch.Tensor = model.model.multi_modal_projector(features, *(pictures.text or ()))
        return tokens

    def describe(self, config: PretrainedConfig, image_processor: Any) -> dict[str, Any]:
        """Tokens and size of its pictures; how they are brought to shape is the processor's own."""
        box = image_processor.crop_size or image_processor.size
        size = int(box["height"] if box.get("height") else box["shortest_edge"])
        padded = getattr(image_processor, "do_pad", False)
        return {
            "connector": "mlp2x_gelu",
            "image_size": size,
            "image_tokens": vision_shape(config.vision_config, size).tokens(config.vision_feature_select_strategy),
            "image_aspect_ratio": "pad" if padded else "crop" if image_processor.do_center_crop else "square",
        }

    def blank(self, model: PreTrainedModel, features: bool, like: torch.Tensor) -> Pictures:
        """See `Family`."""
        if features:
            return Pictures(features=like.new_zeros(1, *feature_shape(model)), facts=self.blank_facts(model))
        size = model.config.vision_config.image_size
        return Pictures(like.new_zeros(1, 3, size, size), facts=self.blank_facts(model))

    def blank_facts(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """What a model must know of a blank picture of one piece."""
        return {}

    def decoder_inputs(
        self, model: PreTrainedModel, text: Text, embeddings_BTD: torch.Tensor, states: torch.Tensor, shown: bool
    ) -> dict[str, Any]:
        """The embeddings with the pictures in their places."""
        if not shown:
            return {"inputs_embeds": embeddings_BTD + 0.0 * states.to(embeddings_BTD.dtype).sum()}
        return {"inputs_embeds": self.placed(model, text.input_ids, embeddings_BTD, states)}

    def prompt_inputs(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, pictures: Pictures | None
    ) -> dict[str, torch.Tensor]:
        """What the stock class takes; embeddings where the connector reads what that class does not tell it."""
        if pictures is not None and pictures.text is not None:
            return self.embedded(model, input_ids, attention_mask, pictures)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if pictures is not None and pictures.pixel_values is not None:
            inputs["pixel_values"] = pictures.pixel_values
        return inputs

    def embedded(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, pictures: Pictures | None
    ) -> dict[str, torch.Tensor]:
        """Arguments of `forward` and `generate` with the pictures among the embeddings, as in training."""
        embeddings = model.get_input_embeddings()(input_ids)
        if pictures is not None:
            embeddings = self.placed(model, input_ids, embeddings, self.states(model, pictures))
        return {"inputs_embeds": embeddings, "attention_mask": attention_mask}
