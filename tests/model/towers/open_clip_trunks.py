"""python -m tests.model.towers.open_clip_trunks FOLDER NAME...: converted trunks that open_clip itself runs, checked.

A process of its own, as they import open_clip. FOLDER is what `open_clip_made` wrote. Prints "ok" last.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModel

from llava_train.errors import RecipeError
from llava_train.model.towers.loading import load_vision_config, load_vision_tower, vision_shape
from tests import tiny


@torch.no_grad()
def check(folder: Path, name: str) -> None:
    path, made = str(folder / "converted" / name), torch.load(folder / name / "made.pt", weights_only=True)
    wanted = made["features"][-1]
    towers = load_vision_tower(path, feature_layer=-1)
    found = towers(made["pixels"]).last_hidden_state
    assert (found - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max()), name
    shape = vision_shape(load_vision_config(path, feature_layer=-1))
    assert (shape.tokens("full"), shape.hidden_size) == tuple(wanted.shape[1:]), name
    assert torch.equal(towers.train()(made["pixels"]).last_hidden_state, found), name  # nor did statistics move
    assert torch.equal(towers.eval()(made["pixels"]).last_hidden_state, found), name
    towers.save_pretrained(folder / "stack" / name)
    again, info = AutoModel.from_pretrained(folder / "stack" / name, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), name
    torch.testing.assert_close(again(made["pixels"]).last_hidden_state, found)


@torch.no_grad()
def beside_another(folder: Path) -> None:
    """A map of 2 x 2 beside CLIP's patches; the last two stages of a ConvNeXt do not fit together."""
    path, made = str(folder / "converted" / "convnext"), torch.load(folder / "convnext" / "made.pt", weights_only=True)
    clip = str(tiny.make_tower(folder / "tiny-clip"))
    towers = load_vision_tower([path, clip], feature_layer=[-1, -2])
    found = towers(made["pixels"]).last_hidden_state
    assert (found[..., :64] - made["features"][-1]).abs().max() < 1e-5
    assert found.shape == (2, 4, 64 + 32)
    try:
        load_vision_config(path, feature_layer=[-2, -1])
    except RecipeError as error:
        assert "maps of different sizes" in str(error)
    else:
        raise AssertionError("layers of different sizes were taken")


if __name__ == "__main__":
    for case in sys.argv[2:]:
        check(Path(sys.argv[1]), case)
    beside_another(Path(sys.argv[1]))
    print("ok")
