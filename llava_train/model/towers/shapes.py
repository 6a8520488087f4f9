"""What an encoder gives for an image: positions, width, and which of them are no patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from llava_train.errors import CheckpointError


@dataclass(frozen=True)
class Kind:
    """What every tower of a model_type has in common.

    Attributes:
        leading: positions before the registers and patches (CLS).
        interpolates: whether it takes pictures of any size whose sides are multiples of its patches.
    """

    leading: int
    interpolates: bool = False


KINDS = {
    "clip_vision_model": Kind(1),
    "siglip_vision_model": Kind(0),
    "vit": Kind(1),
    "dinov2": Kind(1, interpolates=True),
    "dinov2_with_registers": Kind(1, interpolates=True),
    "dinov3_vit": Kind(1, interpolates=True),
}
"""A tower's model_type -> its kind. SigLIP2 of fixed resolution is a `siglip_vision_model`."""


@dataclass(frozen=True)
class VisionShape:
    """What a tower gives for one image of `image_size` pixels a side."""

    image_size: int
    patch_size: int
    leading: int
    hidden_size: int
    registers: int = 0
    interpolates: bool = False

    @property
    def patches(self) -> int:
        """Patch positions."""
        return (self.image_size // self.patch_size) ** 2

    def tokens(self, strategy: str) -> int:
        """Positions that reach the connector under a `vision_feature_select_strategy`."""
        return self.patches + self.leading + self.registers - (strategy == "default")


def vision_shape(
    config: PretrainedConfig, image_size: int | None = None, layers: Sequence[int] | None = None
) -> VisionShape:
    """Shape of a tower's output.

    `image_size` overrides the tower's own, where it takes another. `layers` are numbers of hidden states, and matter
    only for towers whose layers differ in shape. Raises CheckpointError for a size that does not fit.
    """
    shape = config.shape_of(layers) if hasattr(config, "shape_of") else _stock_shape(config)
    if image_size and image_size != shape.image_size:
        if not shape.interpolates:
            raise CheckpointError(
                f"image size {image_size}: a {config.model_type} tower was made for {shape.image_size} pixels; "
                "only DINOv2 interpolates its positions, and DINOv3 computes them"
            )
        shape = replace(shape, image_size=image_size)
    if image_size and shape.image_size % shape.patch_size:  # its own may have a rim that no patch covers (SigLIP's 384)
        raise CheckpointError(f"image size {shape.image_size} is not a multiple of the patch size {shape.patch_size}")
    return shape


def _stock_shape(config: PretrainedConfig) -> VisionShape:
    kind = KINDS[config.model_type]
    registers = int(getattr(config, "num_register_tokens", 0) or 0)
    size, patch = _side(config.image_size), _side(config.patch_size)
    return VisionShape(size, patch, kind.leading, int(config.hidden_size), registers, kind.interpolates)


def _side(size: Any) -> int:
    sides = {int(side) for side in size} if isinstance(size, (list, tuple)) else {int(size)}
    if len(sides) > 1:
        raise CheckpointError(f"a vision encoder for pictures or patches of {size}: only squares are supported")
    return sides.pop()
