"""Pictures in tiles: LLaVA-NeXT and LLaVA-OneVision, whose own classes put the tiles' tokens together.

Shapes as in `base`; how a picture becomes tiles is `llava_train.data.pictures.tiles`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)

from llava_train.errors import CheckpointError
from llava_train.model.families.base import Pictures
from llava_train.model.families.llava import Llava


class LlavaNext(Llava):
    """`LlavaNextForConditionalGeneration` (LLaVA-1.6): facts are `tiles` and `image_sizes` of each picture."""

    model_class = LlavaNextForConditionalGeneration

    def describe(self, config: PretrainedConfig, image_processor: Any) -> dict[str, Any]:
        """Tokens and size of a tile. CheckpointError where configuration and processor cut into other tiles."""
        ours, theirs = ([list(point) for point in each.image_grid_pinpoints] for each in (config, image_processor))
        if ours != theirs:
            raise CheckpointError("image_grid_pinpoints: config.json and preprocessor_config.json differ")
        return {**super().describe(config, image_processor), "image_aspect_ratio": "anyres"}

    def complete(self, model: PreTrainedModel, seed: int | None) -> None:
        """The learned end of a row, as the stock class draws it."""
        if seed is None:
            return
        width = model.config.text_config.hidden_size
        noise = torch.randn(width, generator=torch.Generator().manual_seed(seed))
        model.model.image_newline = nn.Parameter(noise / math.sqrt(width))

    def states(self, model: PreTrainedModel, pictures: Pictures) -> torch.Tensor:
        """Tokens of all pictures one after another, newlines among them, (tokens, D)."""
        tiles = self.projected(model, pictures).split(pictures.facts["tiles"].tolist())
        return torch.cat(self.packed(model, tiles, pictures.facts))

    def packed(
        self, model: PreTrainedModel, tiles: Sequence[torch.Tensor], facts: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Tokens of each picture, (tokens, D), from those of its tiles."""
        strategy = model.config.vision_feature_select_strategy
        packed, _ = model.model.pack_image_features(
            list(tiles), facts["image_sizes"], strategy, image_newline=model.model.image_newline
        )
        return list(packed)

    def blank_facts(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """One tile."""
        size = model.config.vision_config.image_size
        return {
            "image_sizes": torch.tensor([[size, size]]),
            "tiles": torch.tensor([1]),
            "pooled": torch.tensor([0]),
        }

    def prompt_inputs(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, pictures: Pictures | None
    ) -> dict[str, torch.Tensor]:
        """Embeddings made as in training: the stock class knows no frames and no pictures that stay one tile."""
        return self.embedded(model, input_ids, attention_mask, pictures)


class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`: `pooled` of a picture is 1 for a frame, 2 for a video's last one."""

    model_class = LlavaOnevisionForConditionalGeneration

    def describe(self, config: PretrainedConfig, image_processor: Any) -> dict[str, Any]:
        """The same, and how many tiles' tokens a picture has at most."""
        ratio = str(config.vision_aspect_ratio)
        if not re.fullmatch(r"anyres_max_[1-9]\d*", ratio):
            raise CheckpointError(f"config.json: vision_aspect_ratio: {ratio[:40]!r}: must be anyres_max_N")
        options = {"most": int(ratio.rpartition("_")[2])}
        return {**super().describe(config, image_processor), "image_aspect_ratio": ratio, "picture_options": options}

    def packed(
        self, model: PreTrainedModel, tiles: Sequence[torch.Tensor], facts: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Frames pooled to a quarter, a newline behind a video; pictures as the stock class packs them."""
        inner, newline = model.model, model.model.image_newline
        kinds = facts["pooled"].tolist()
        whole = [place for place, kind in enumerate(kinds) if kind == 0]
        made: dict[int, torch.Tensor] = {}
        if whole:
            packed, _ = inner.pack_image_features(
                [tiles[place] for place in whole],
                facts["image_sizes"][whole],
                image_newline=newline,
                vision_aspect_ratio=model.config.vision_aspect_ratio,
            )
            made = dict(zip(whole, packed))
        for place, kind in enumerate(kinds):
            if kind:
                frame = inner.apply_pooling(tiles[place])[0]
                made[place] = torch.cat([frame, newline[None].to(frame)]) if kind == 2 else frame
        return [made[place] for place in range(len(kinds))]


def tile_config(
    architecture: str, values: dict[str, Any], aspect_ratio: str, points: list[list[int]]
) -> PretrainedConfig:
    """The configuration of a model assembled from parts; `points` are the processor's `image_grid_pinpoints`."""
    if architecture == "llava_next":
        return LlavaNextConfig(**values, image_grid_pinpoints=points)
    # No text ever holds a video's token: frames stand in the places of pictures.
    tokens = {"video_token_index": values["image_token_index"]}
    return LlavaOnevisionConfig(**values, **tokens, image_grid_pinpoints=points, vision_aspect_ratio=aspect_ratio)
