"""Several towers as one, their features side by side; also one tower whose positions must be sorted out first.

transformers' LLaVA classes read one hidden state of one tower and drop the first position of it. `Towers` fits there:
it picks the layers of each tower, drops CLS and registers, brings all to one grid and gives what is left as its only
hidden state (so a configuration says `vision_feature_layer=-1`, `vision_feature_select_strategy="full"`). CLIP + DINOv2
is the way of Prismatic VLMs (arXiv 2402.07865) and Cambrian-1 (arXiv 2406.16860).

Shapes: I images, P positions of the first tower's grid, V width: the sum over towers of width times layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import interpolate
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from llava_train.model.towers.hidden import hidden_states, layer_list, layers_run, numbers
from llava_train.model.towers.shapes import VisionShape, vision_shape
from llava_train.model.towers.trunk import OpenClipTrunk


class TowersConfig(PretrainedConfig):
    """What `Towers` is made of.

    Attributes:
        towers: the towers' own configurations, without the layers that nobody reads.
        layers: numbers of the hidden states of each tower; 0 is what its first layer reads.
        strategy: "full" keeps the CLS of a single tower; otherwise patches alone are left. Registers never are.
        means, stds: by which each tower's pixels are normalised, a value a channel (of colours from 0 to 1).
        image_size, patch_size: of the first tower, whose pixels come in and whose grid goes out.
        hidden_size: V.
    """

    model_type = "llava_train_towers"

    towers: list[dict[str, Any]] | None = None
    layers: list[list[int]] | None = None
    strategy: Literal["default", "full"] = "default"
    means: list[list[float]] | None = None
    stds: list[list[float]] | None = None
    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 0

    @classmethod
    def of(
        cls,
        towers: Sequence[PretrainedConfig],
        chosen: Sequence[int | Sequence[int]],
        strategy: str,
        colours: Sequence[tuple[list[float], list[float]]],
    ) -> TowersConfig:
        """A configuration of towers, the layers of each as a recipe names them, and (mean, std) of each."""
        layers = [numbers(config, each) for config, each in zip(towers, chosen)]
        shapes = [vision_shape(config, layers=each) for config, each in zip(towers, layers)]
        return cls(
            towers=[_shortened(config, layers_run(each)) for config, each in zip(towers, layers)],
            layers=layers,
            strategy=strategy,
            means=[mean for mean, _ in colours],
            stds=[std for _, std in colours],
            image_size=shapes[0].image_size,
            patch_size=shapes[0].patch_size,
            hidden_size=sum(shape.hidden_size * len(each) for shape, each in zip(shapes, layers)),
        )

    def configs(self) -> list[PretrainedConfig]:
        """The towers' configurations as objects."""
        return [AutoConfig.for_model(**values) for values in self.towers or ()]

    def shapes(self) -> list[VisionShape]:
        """The towers' shapes."""
        return [vision_shape(config, layers=each) for config, each in zip(self.configs(), self.layers or ())]

    def shape_of(self, layers: Sequence[int] | None) -> VisionShape:
        """Shape of the features, all of whose positions count (strategy "full"). `layers` are chosen already."""
        first = self.shapes()[0]
        leading = first.leading if self.keeps_cls() else 0
        return VisionShape(self.image_size, self.patch_size, leading, self.hidden_size, 0, first.interpolates)

    def keeps_cls(self) -> bool:
        """Whether a CLS is among the positions."""
        return self.strategy == "full" and len(self.towers or ()) == 1


class Towers(PreTrainedModel):
    """See the module's text. `hidden_states[-1]` and `last_hidden_state` are the features, (I, P, V).

    Pixels come normalised for the first tower, in its size or another that it takes. A further tower that interpolates
    its positions sees the picture so large that its grid is the first one's; any other sees it in its own size, and its
    features are resized (bilinear) to that grid. Pictures are resized with antialiased bicubic filters.
    """

    config_class = TowersConfig
    base_model_prefix = "towers"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: TowersConfig) -> None:
        super().__init__(config)
        attention = config._attn_implementation
        # No ModuleList: engines that spread weights take the members of such lists as layers.
        self.towers = nn.ModuleDict(
            {
                str(number): AutoModel.from_config(each, attn_implementation=attention)
                for number, each in enumerate(config.configs())
            }
        )
        self._shapes = config.shapes()
        self.post_init()

    def layers(self) -> list[nn.Module]:
        """The layers of all towers; every one of them is run."""
        plain = [tower for tower in self.towers.values() if not isinstance(tower, OpenClipTrunk)]
        return [layer for tower in plain for layer in getattr(*layer_list(tower))]

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutput:
        """(I, 3, H, W) -> features (I, P, V). What further arguments ask for (other hidden states) is not made."""
        grid = [side // self._shapes[0].patch_size for side in pixel_values.shape[-2:]]
        made = [self._features(number, pixel_values, grid) for number in range(len(self.towers))]
        features_IPV = torch.cat(made, dim=-1)
        return BaseModelOutput(last_hidden_state=features_IPV, hidden_states=(features_IPV,))

    def _features(self, number: int, pixels: torch.Tensor, grid: list[int]) -> torch.Tensor:
        tower, shape, layers = self.towers[str(number)], self._shapes[number], self.config.layers[number]
        if number:
            pixels = self._seen_by(number, pixels, [side * shape.patch_size for side in grid])
        states = (
            tower.states(pixels, layers) if isinstance(tower, OpenClipTrunk) else hidden_states(tower, pixels, layers)
        )
        found = torch.cat(states, dim=-1)
        patches = found[:, shape.leading + shape.registers :]
        if self.config.keeps_cls():
            return torch.cat([found[:, : shape.leading], patches], dim=1)
        own = [side // shape.patch_size for side in pixels.shape[-2:]]
        if own == grid:
            return patches
        map_IVhw = patches.transpose(1, 2).unflatten(2, own)
        resized = interpolate(map_IVhw.float(), size=grid, mode="bilinear", align_corners=False)
        return resized.to(patches.dtype).flatten(2).transpose(1, 2)

    def _seen_by(self, number: int, pixels: torch.Tensor, wanted: list[int]) -> torch.Tensor:
        """The picture as a further tower wants it: colours, size, colours normalised its own way."""
        shape, config = self._shapes[number], self.config
        size = wanted if shape.interpolates else [shape.image_size] * 2
        colours = _affine(pixels.float(), config.stds[0], config.means[0])
        if list(colours.shape[-2:]) != size:
            # Filters overshoot at edges; an image processor, which works on bytes, cuts that off, too.
            colours = interpolate(colours, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = config.means[number], config.stds[number]
        return _affine(colours, [1 / s for s in std], [-m / s for m, s in zip(mean, std)])


def _affine(pixels: torch.Tensor, scales: list[float], shifts: list[float]) -> torch.Tensor:
    """Each channel times its scale plus its shift; plain numbers, so that nothing is copied to a device."""
    channels = zip(pixels.unbind(1), scales, shifts)
    return torch.stack([channel * scale + shift for channel, scale, shift in channels], dim=1)


def _shortened(config: PretrainedConfig, layers: int) -> dict[str, Any]:
    """A tower's configuration with its first `layers` layers alone, and without a head that pools."""
    values = config.to_dict()
    if config.model_type != OpenClipTrunk.config_class.model_type:
        values["num_hidden_layers"] = layers
        for key in ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices"):
            values.pop(key, None)
    if config.model_type == "siglip_vision_model":
        values["vision_use_head"] = False
    for key in ("transformers_version", "architectures", "dtype", "_name_or_path"):
        values.pop(key, None)
    return values


AutoConfig.register(TowersConfig.model_type, TowersConfig)
AutoModel.register(TowersConfig, Towers)
