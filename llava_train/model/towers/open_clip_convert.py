"""python -m llava_train.model.towers.open_clip_convert ARCH SOURCE TARGET: an open_clip model as transformers' folder.

A plain vision transformer becomes CLIPVisionModel (CLS and a norm before the layers), SiglipVisionModel (neither) or
ViTModel (CLS alone); its activation is read from the built module, which open_clip makes from the model's own
configuration. Anything else is kept as an `OpenClipTrunk`. What was converted must give open_clip's own features.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from llava_train.errors import CheckpointError, LlavaTrainError
from llava_train.files import atomic_folder, ensure_space, write_json
from llava_train.model.screening import count_tensors, read_config
from llava_train.model.towers.open_clip import SIDECAR, build_visual, import_open_clip, is_file
from llava_train.model.towers.open_clip_layers import Plain, plain_of, to_stock

_TOLERANCE = 1e-4
"""Of the largest feature: float32 sums in another order"""
_RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}


@dataclass(frozen=True)
class Found:
    """What an architecture and a tag or file stand for.

    Attributes:
        model: open_clip's configuration of it, `quick_gelu` as the weights were trained.
        preprocess: how pictures become pixels (mean, std, interpolation, resize_mode).
        weights: the file.
    """

    model: dict[str, Any]
    preprocess: dict[str, Any]
    weights: Path


def convert(arch: str, source: str, target: Path) -> None:
    """Write the folder `target`. Raises CheckpointError."""
    found = _find(arch, source)
    visual = _load(found)
    plain = plain_of(visual)
    model = to_stock(plain, _size(visual)) if plain else None
    ensure_space(target, sum(tensor.nbytes for tensor in visual.state_dict().values()) + 1_000_000, "the encoder")
    with atomic_folder(target) as folder:
        if plain and model:
            _compare(visual, model, plain)
            model.save_pretrained(folder)
        else:
            _save_trunk(visual, found, folder)
        write_json(folder / "preprocessor_config.json", _preprocessor(found.preprocess, _size(visual)))


def _find(arch: str, source: str) -> Found:
    open_clip = import_open_clip()
    defaults = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    defaults |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    model = open_clip.get_model_config(arch)
    tags = {tag: open_clip.get_pretrained_cfg(arch, tag) for tag in open_clip.list_pretrained_tags_by_model(arch)}
    if not is_file(source):
        if model is None:
            raise CheckpointError(f"open_clip knows no architecture {arch!r}; python -m open_clip.list shows all")
        if source not in tags:
            raise CheckpointError(f"{arch} has no weights {source!r}; open_clip has: {', '.join(tags) or 'none'}")
        # What the tag says of its weights comes before what the architecture's name says.
        model["quick_gelu"] = tags[source].get("quick_gelu", model.get("quick_gelu", False))
        return Found(model, _preprocess(defaults, tags[source]), Path(open_clip.download_pretrained(tags[source])))
    weights = Path(source).expanduser().absolute()
    if (weights.parent / SIDECAR).exists():
        own = read_config(weights.parent, SIDECAR)
        return Found(own.get("model_cfg", model), _preprocess(defaults, own.get("preprocess_cfg", {})), weights)
    if model is None:
        raise CheckpointError(f"open_clip knows no architecture {arch!r}; put the {SIDECAR} of the weights beside them")
    # All published weights of an architecture take pictures in one way (SigLIP), or open_clip's default is taken.
    ways = {json.dumps(_preprocess(defaults, tag)) for tag in tags.values()}
    return Found(model, json.loads(ways.pop()) if len(ways) == 1 else defaults, weights)


def _preprocess(defaults: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    return {key: said.get(key, value) for key, value in defaults.items()}


def _load(found: Found) -> nn.Module:
    """The vision tower with its weights, in float32."""
    from open_clip.convert import convert_state_dict
    from open_clip.factory import load_state_dict
    from open_clip.model import resize_pos_embed

    if found.weights.suffix == ".safetensors":
        count_tensors(found.weights.parent, found.weights.name)
    holder = nn.Module()
    holder.visual = build_visual(
        found.model["vision_cfg"], found.model["embed_dim"], bool(found.model.get("quick_gelu", False))
    )
    try:
        every = convert_state_dict(holder, load_state_dict(str(found.weights), weights_only=True))
        state = {name: tensor.float() for name, tensor in every.items() if name.startswith("visual.")}
        resize_pos_embed(state, holder)
        holder.load_state_dict(state)
    except Exception as error:  # what is wrong with weights comes as many types
        text = " ".join(str(error).split())[:400]
        raise CheckpointError(f"{found.weights}: its weights do not fit this architecture: {text}") from error
    return holder.visual.float().eval()


def _size(visual: Any) -> int:
    """Pixels a side. A trunk of timm knows its own, whatever the configuration around it says."""
    size = getattr(getattr(visual, "trunk", None), "patch_embed", visual)
    size = getattr(size, "img_size", None) or visual.image_size
    sides = {int(each) for each in (size if isinstance(size, (tuple, list)) else [size])}
    if len(sides) > 1:
        raise CheckpointError(f"takes pictures of {size}; only squares are supported")
    return sides.pop()


@torch.no_grad()
def _compare(visual: Any, model: Any, plain: Plain) -> None:
    """CheckpointError unless the converted model gives open_clip's features, at every layer."""
    pixels = torch.randn(1, 3, *[_size(visual)] * 2, generator=torch.Generator().manual_seed(0))
    theirs = visual.forward_intermediates(pixels, intermediates_only=True, output_fmt="NLC")["image_intermediates"]
    ours = model(pixels, output_hidden_states=True).hidden_states[1:]
    skip = 0 if plain.cls is None else 1
    for number, (own, wanted) in enumerate(zip(ours, theirs, strict=True), start=1):
        difference, largest = (own[:, skip:] - wanted).abs().max(), wanted.abs().max()
        if not difference <= _TOLERANCE * max(1.0, float(largest)):
            raise CheckpointError(f"layer {number} differs from open_clip's by {difference:.2g}: please report this")


@torch.no_grad()
def _save_trunk(visual: Any, found: Found, folder: Path) -> None:
    from llava_train.model.towers.trunk import OpenClipTrunk, OpenClipTrunkConfig

    size = _size(visual)
    try:
        maps = visual.forward_intermediates(torch.zeros(1, 3, size, size), intermediates_only=True, output_fmt="NCHW")
    except Exception as error:  # an architecture without them says so in many ways
        raise CheckpointError(f"gives no feature maps: {error}") from error
    shapes = [tuple(each.shape) for each in maps["image_intermediates"]]
    if any(height != width or size % height for _, _, height, width in shapes):
        raise CheckpointError(f"gives maps that are no grid of its pictures: {shapes}")
    config = OpenClipTrunkConfig(
        vision_cfg=found.model["vision_cfg"],
        embed_dim=found.model["embed_dim"],
        quick_gelu=bool(found.model.get("quick_gelu", False)),
        maps=[[height, channels] for _, channels, height, _ in shapes],
        image_size=size,
        num_hidden_layers=len(shapes),
        architectures=[OpenClipTrunk.__name__],
    )
    config.save_pretrained(folder)
    tensors = {f"visual.{name}": tensor.contiguous() for name, tensor in visual.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _preprocessor(preprocess: dict[str, Any], size: int) -> dict[str, Any]:
    """`preprocessor_config.json`."""
    box = {"height": size, "width": size}
    stretched = preprocess["resize_mode"] == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": box if stretched else {"shortest_edge": size},
        "do_center_crop": not stretched,
        "crop_size": box,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
        "resample": _RESAMPLE.get(preprocess["interpolation"], 3),
        "do_convert_rgb": True,
    }


if __name__ == "__main__":
    try:
        convert(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    except LlavaTrainError as fault:
        sys.exit(f"error: {fault}")
