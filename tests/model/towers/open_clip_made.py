"""python -m tests.model.towers.open_clip_made FOLDER: random open_clip models, their features, and conversions.

A process of its own: it imports open_clip, and torchvision with it. For each case FOLDER/NAME holds the weights and
what open_clip computes with them ("features": what each layer gives, without CLS), FOLDER/converted/NAME the result.
FOLDER/found.json says what published weights are taken for.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from llava_train.errors import CheckpointError
from llava_train.model.towers.open_clip import build_visual, import_open_clip
from llava_train.model.towers.open_clip_convert import _find, _size, convert

SMALL = {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 32, "layers": 3}
CASES = {
    "clip": ({**SMALL}, {}),
    "clip-quickgelu": ({**SMALL}, {"quick_gelu": True}),
    "clip-tanh": ({**SMALL, "act_kwargs": {"approximate": "tanh"}}, {}),
    "layer-scale": ({**SMALL, "ls_init_value": 0.3, "norm_kwargs": {"eps": 1e-3}}, {}),
    "clipa": ({**SMALL, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}, {}),
    "coca": ({**SMALL, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}, {}),
    "siglip": ({"image_size": 32, "timm_model_name": "small_siglip", "timm_pool": "map", "timm_proj": "none"}, {}),
    "timm-clip": ({"image_size": 32, "timm_model_name": "small_clip", "timm_pool": "token", "timm_proj": "none"}, {}),
    "timm-vit": ({"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token"}, {}),
    "registers": ({"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"}, {}),
    "convnext": ({"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "avg"}, {}),
    "eva": ({"image_size": 224, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "avg"}, {}),
    "resnet": ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}, {}),
    "qk-norm": ({**SMALL, "qk_norm": True}, {}),
}
TAGS = {
    "openai": ("ViT-B-32", "openai"),
    "laion": ("ViT-B-32", "laion2b_s34b_b79k"),
    "siglip": ("ViT-B-16-SigLIP", "webli"),
}


def register() -> None:
    """SigLIP's and CLIP's transformers of timm, small."""
    import_open_clip()
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 3, "num_heads": 2}

    def made(others: dict[str, Any], **own: Any) -> Any:
        taken = {key: value for key, value in others.items() if key in ("num_classes", "global_pool")}
        return VisionTransformer(**sizes, **own, **taken)

    def small_siglip(pretrained: bool = False, **others: Any) -> Any:
        return made(others, class_token=False, act_layer="gelu_tanh")

    def small_clip(pretrained: bool = False, **others: Any) -> Any:
        return made(others, pre_norm=True, init_values=0.3)

    for each in (small_siglip, small_clip):
        register_model(each)


@torch.no_grad()
def make(folder: Path, name: str) -> None:
    vision_cfg, others = CASES[name]
    torch.manual_seed(0)
    visual = build_visual(vision_cfg, 48, **{"quick_gelu": False, **others}).eval()
    for parameter in visual.parameters():
        if parameter.ndim < 2 or parameter.std() == 0:  # what starts as ones or zeros would hide a mistake
            parameter.add_(torch.randn_like(parameter) * 0.1)
    pixels = torch.randn(2, 3, _size(visual), _size(visual))
    made = visual.forward_intermediates(pixels, intermediates_only=True, output_fmt="NCHW")["image_intermediates"]
    own = folder / name
    own.mkdir(parents=True)
    state = {f"visual.{key}": tensor.contiguous() for key, tensor in visual.state_dict().items()}
    state["logit_scale"] = torch.tensor(4.6)
    if name == "clip-quickgelu":
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}, own / "w.pt")
    else:
        save_file(state, own / "w.safetensors")
    model = {"embed_dim": 48, "vision_cfg": vision_cfg, **others}
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}
    text = json.dumps({"model_cfg": model, "preprocess_cfg": preprocess})
    (own / "open_clip_config.json").write_text(text)
    torch.save({"pixels": pixels, "features": [each.flatten(2).transpose(1, 2) for each in made]}, own / "made.pt")
    convert("any", str(next(own.glob("w.*"))), folder / "converted" / name)


class Evil:
    """A pickle that would touch a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def found(folder: Path) -> dict[str, object]:
    open_clip = import_open_clip()
    with mock.patch.object(open_clip, "download_pretrained", lambda cfg: "nowhere"):
        every = {name: _find(*each) for name, each in TAGS.items()}
    local = _find("ViT-B-16-SigLIP", "/nowhere/weights.safetensors")
    try:
        torch.save(Evil(folder / "canary"), folder / "clip" / "evil.pt")
        convert("any", str(folder / "clip" / "evil.pt"), folder / "converted" / "evil")
        evil = "converted"
    except CheckpointError as error:
        evil = str(error)
    return {
        "evil": evil,
        **{name: {**each.preprocess, "quick_gelu": each.model["quick_gelu"]} for name, each in every.items()},
        "local": local.preprocess,
    }


if __name__ == "__main__":
    root = Path(sys.argv[1])
    register()
    for case in CASES:
        make(root, case)
    (root / "found.json").write_text(json.dumps(found(root)))
