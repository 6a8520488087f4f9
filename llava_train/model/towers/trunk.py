"""A vision trunk of open_clip that no class of transformers computes, run by open_clip's own code.

It is used inside `llava_train.model.towers.stack.Towers`, and needs open_clip in the process that runs it. Towers that
transformers has a class for are converted instead (`llava_train.model.towers.open_clip_convert`).

Shapes: I images, P positions (a map's pixels, row by row), V width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from llava_train.errors import RecipeError
from llava_train.model.towers.shapes import VisionShape


class OpenClipTrunkConfig(PretrainedConfig):
    """A trunk and the feature maps it gives.

    Attributes:
        vision_cfg, embed_dim, quick_gelu: of open_clip's model configuration.
        maps: [pixels a side, width] of what each stage or block gives.
        image_size: pixels a side.
        num_hidden_layers: stages or blocks; hidden state k is what the k-th gives, and there is none before the first.
    """

    model_type = "llava_train_open_clip"

    vision_cfg: dict[str, Any] | None = None
    embed_dim: int = 512
    quick_gelu: bool = False
    maps: list[list[int]] | None = None
    image_size: int = 224
    num_hidden_layers: int = 0

    def shape_of(self, layers: Sequence[int] | None) -> VisionShape:
        """Shape of the maps of these layers. RecipeError where they differ."""
        chosen = list(layers or [self.num_hidden_layers])
        maps = self.maps or []
        if 0 in chosen:
            raise RecipeError("model.vision_feature_layer: 0: this encoder's layers are counted from 1")
        if len({tuple(maps[layer - 1]) for layer in chosen}) > 1:
            sizes = ", ".join(f"{layer}: {maps[layer - 1][0]} x {maps[layer - 1][0]}" for layer in chosen)
            raise RecipeError(f"model.vision_feature_layer: these layers give maps of different sizes ({sizes})")
        side, width = maps[chosen[0] - 1]
        return VisionShape(self.image_size, self.image_size // side, 0, width)


class OpenClipTrunk(PreTrainedModel):
    """open_clip's `visual` module; its head, which nothing here reads, is part of it."""

    config_class = OpenClipTrunkConfig
    base_model_prefix = "visual"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True  # what open_clip computes is not ours to choose

    def __init__(self, config: OpenClipTrunkConfig) -> None:
        super().__init__(config)
        from llava_train.model.towers.open_clip import build_visual

        self.visual: Any = build_visual(config.vision_cfg or {}, config.embed_dim, config.quick_gelu)
        self.post_init()

    def states(self, pixels_I3HW: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
        """What these layers give, (I, P, V) each; no layer above them is run."""
        made = self.visual.forward_intermediates(
            pixels_I3HW.to(self.dtype),
            indices=sorted({layer - 1 for layer in layers}),
            stop_early=True,
            intermediates_only=True,
            output_fmt="NCHW",
        )["image_intermediates"]
        found = dict(zip(sorted({*layers}), made))
        return [found[layer].flatten(2).transpose(1, 2) for layer in layers]

    def train(self, mode: bool = True) -> OpenClipTrunk:
        """As in all modules, but batch norms keep the statistics of what the trunk was trained on."""
        super().train(mode)
        norms = [module for module in self.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.eval()
        return self

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutput:
        """(I, 3, H, W) -> what the last layer gives, (I, P, V)."""
        return BaseModelOutput(last_hidden_state=self.states(pixel_values, [self.config.num_hidden_layers])[0])

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Only what a checkpoint does not hold and timm calculates: open_clip initialised the weights itself."""
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # type: ignore[operator]


AutoConfig.register(OpenClipTrunkConfig.model_type, OpenClipTrunkConfig)
AutoModel.register(OpenClipTrunkConfig, OpenClipTrunk)
