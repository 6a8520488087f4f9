"""Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (arXiv 2502.13923): pictures of any size, and places in three dimensions.

They begin as a folder in transformers' layout, and the class and its processor stay transformers' own. Frames of a
video are single pictures; see `llava_train.data.pictures.patches`, which makes the pixels.

Shapes as in `base`; N stretches.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)

from llava_train.model.families.base import Family, Pictures, Text


class Tokens(NamedTuple):
    """Tokens of all pictures one after another, (tokens, D), and patches of each in time, height and width, (I, 3)."""

    states: torch.Tensor
    grids: torch.Tensor


class Qwen2VL(Family):
    """`Qwen2VLForConditionalGeneration`: the fact of a picture is `image_grid_thw`, its patches in time and space.

    The part "connector" is what merges patches to tokens, the last step of `model.visual`.
    """

    model_class: type[PreTrainedModel] = Qwen2VLForConditionalGeneration
    image_token = "<|image_pad|>"
    marker = "<|vision_start|><|image_pad|><|vision_end|>"
    line_end = ""
    separable = False
    measured = False

    def describe(self, config: PretrainedConfig, image_processor: Any) -> dict[str, Any]:
        """Size and tokens of the smallest picture: others take more."""
        side = math.isqrt(int(image_processor.size["shortest_edge"]))
        patches = image_processor.get_number_of_image_patches(side, side)
        return {
            "connector": "stock",
            "image_size": side,
            "image_tokens": int(patches) // image_processor.merge_size**2,
            "image_aspect_ratio": "native",
        }

    def states(self, model: PreTrainedModel, pictures: Pictures) -> Tokens:
        """By the stock tower and what merges its patches."""
        pixels, grids_I3 = pictures.pixel_values, pictures.facts["image_grid_thw"]
        assert pixels is not None, "pictures bring pixels"
        made = model.model.get_image_features(pixels, grids_I3.to(pixels.device))
        return Tokens(torch.cat(made.pooler_output), grids_I3)

    def blank(self, model: PreTrainedModel, features: bool, like: torch.Tensor) -> Pictures:
        """A picture of one token."""
        vision = model.config.vision_config
        side = vision.spatial_merge_size
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return Pictures(like.new_zeros(side**2, width), facts={"image_grid_thw": torch.tensor([[1, side, side]])})

    def decoder_inputs(
        self, model: PreTrainedModel, text: Text, embeddings_BTD: torch.Tensor, states: Tokens, shown: bool
    ) -> dict[str, Any]:
        """The embeddings with the pictures in their places, and positions in time, height and width, (3, B, T)."""
        if not shown:
            return {"inputs_embeds": embeddings_BTD + 0.0 * states.states.to(embeddings_BTD.dtype).sum()}
        return {
            "inputs_embeds": self.placed(model, text.input_ids, embeddings_BTD, states.states),
            "position_ids": self.positions(model, text, states.grids).to(embeddings_BTD.device),
        }

    def positions(self, model: PreTrainedModel, text: Text, grids_I3: torch.Tensor) -> torch.Tensor:
        """Positions in time, height and width, (3, B, T), on the CPU; a stretch goes on where its parent ends.

        Counted by the stock class, a stretch of a packed row at a time.
        """
        ids_BT = text.input_ids.cpu()
        kinds_BT, grids_I3 = (ids_BT == self.image_token_id(model)).long(), grids_I3.cpu()
        if not text.lengths:  # what fills a row stands behind its text
            whole, _ = model.model.get_rope_index(ids_BT, kinds_BT, grids_I3)
            return whole
        found: list[torch.Tensor] = []
        seen, stretches = 0, zip(*(each.split(text.lengths, dim=1) for each in (ids_BT, kinds_BT)))
        for (ids, kinds), parent in zip(stretches, text.parents):
            own, _ = model.model.get_rope_index(ids, kinds, grids_I3[seen:])
            found.append(own + (found[parent].max() + 1 if parent >= 0 else 0))
            seen += int((kinds.diff(prepend=kinds.new_zeros(1, 1)) == 1).sum())
        return torch.cat(found, dim=2)

    def prompt_inputs(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, pictures: Pictures | None
    ) -> dict[str, torch.Tensor]:
        """What the stock class takes."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if pictures is None or pictures.pixel_values is None:
            return inputs
        return {
            **inputs,
            "pixel_values": pictures.pixel_values,
            "image_grid_thw": pictures.facts["image_grid_thw"].to(input_ids.device),
            "mm_token_type_ids": (input_ids == self.image_token_id(model)).long(),
        }


class Qwen25VL(Qwen2VL):
    """`Qwen2_5_VLForConditionalGeneration`: the same with windows in the tower."""

    model_class = Qwen2_5_VLForConditionalGeneration
