"""Several towers as one: whose features, at which positions, and that they are stored and read again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, SiglipConfig, SiglipModel, ViTForImageClassification

from llava_train.errors import CheckpointError, RecipeError
from llava_train.model.towers.features import image_features
from llava_train.model.towers.loading import (
    check_features,
    load_vision_config,
    load_vision_tower,
    reload_vision_tower,
    stock_features,
    vision_shape,
)
from llava_train.model.towers.stack import Towers
from tests import tiny
from tests.model.towers.test_features import make

MEAN, STD = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.25])[:, None, None]


def towers_in(folder: Path, *families: str) -> list[str]:
    return [str(tiny.make_tower(folder / f"{number}-{family}", family)) for number, family in enumerate(families)]


def states(path: str, pixels: torch.Tensor) -> Any:
    return AutoModel.from_pretrained(path)(pixels, output_hidden_states=True).hidden_states


@torch.no_grad()
def test_features_of_two_towers_lie_side_by_side(tmp_path: Path) -> None:
    paths = towers_in(tmp_path, "clip", "dinov2-registers")
    towers = load_vision_tower(paths, feature_layer=[-2, -1])
    assert isinstance(towers, Towers)
    pixels = torch.randn(2, 3, 28, 28)
    wanted = torch.cat([states(paths[0], pixels)[-2][:, 1:], states(paths[1], pixels)[-1][:, 4:]], dim=-1)
    torch.testing.assert_close(towers(pixels, output_hidden_states=True).hidden_states[-1], wanted)
    shape = vision_shape(towers.config)
    assert (shape.tokens("full"), shape.hidden_size) == tuple(wanted.shape[1:]) == (4, 64)
    assert stock_features(towers.config, [-2, -1], "default") == (-1, "full")
    assert load_vision_config(paths, feature_layer=-2).layers == [[2], [2]]


@torch.no_grad()
def test_each_tower_sees_its_own_colours_and_size(tmp_path: Path) -> None:
    import json

    paths = towers_in(tmp_path, "clip", "siglip", "dinov2")
    for path, size in ((paths[1], 42), (paths[2], 70)):  # SigLIP stays at its size, DINOv2 follows CLIP's grid
        config = json.loads((Path(path) / "config.json").read_text())
        tiny.TOWERS[Path(path).name[2:]][0](
            tiny.TOWERS[Path(path).name[2:]][1](**{**config, "image_size": size})
        ).save_pretrained(path)
    processor = Path(paths[1]) / "preprocessor_config.json"
    values = json.loads(processor.read_text()) | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor.write_text(json.dumps(values))
    towers = load_vision_tower(paths, feature_layer=-1)
    colours = torch.rand(1, 3, 28, 28)
    found = towers((colours - MEAN) / STD).last_hidden_state
    larger = torch.nn.functional.interpolate(colours, size=(42, 42), mode="bicubic", antialias=True).clamp(0, 1)
    nine = states(paths[1], (larger - 0.5) / 0.5)[-1].transpose(1, 2).unflatten(2, (3, 3))
    four = torch.nn.functional.interpolate(nine, size=(2, 2), mode="bilinear").flatten(2).transpose(1, 2)
    same = [states(path, (colours - MEAN) / STD)[-1][:, 1:] for path in (paths[0], paths[2])]
    torch.testing.assert_close(found, torch.cat([same[0], four, same[1]], dim=-1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["dinov2-registers", "dinov3"])
def test_registers_never_reach_the_connector(tmp_path: Path, family: str) -> None:
    (path,) = towers_in(tmp_path, family)
    pixels, registers = torch.randn(1, 3, 42, 42), 3 if family == "dinov2-registers" else 2
    known = states(path, pixels)[-2]
    assert known.shape[1] == 1 + registers + 9
    patches = load_vision_tower(path)
    assert torch.equal(patches(pixels).last_hidden_state, known[:, 1 + registers :])
    whole = load_vision_tower(path, strategy="full")
    assert torch.equal(whole(pixels).last_hidden_state, torch.cat([known[:, :1], known[:, 1 + registers :]], dim=1))
    assert vision_shape(whole.config, 42).tokens("full") == 10


def test_a_stack_is_stored_and_read_strictly(tmp_path: Path) -> None:
    paths = towers_in(tmp_path, "siglip", "dinov3")
    towers = load_vision_tower(paths, feature_layer=-2)
    towers.save_pretrained(tmp_path / "stack")
    again, info = AutoModel.from_pretrained(tmp_path / "stack", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = torch.randn(1, 3, 28, 28)
    assert torch.equal(again(pixels).last_hidden_state, towers(pixels).last_hidden_state)
    reloaded = reload_vision_tower(again.config, paths)
    assert torch.equal(reloaded(pixels).last_hidden_state, towers(pixels).last_hidden_state)
    empty = AutoModel.from_config(again.config)
    assert {name: p.shape for name, p in empty.state_dict().items()} == {
        name: p.shape for name, p in towers.state_dict().items()
    }
    assert sum(".layers." in name or ".layer." in name for name in empty.state_dict()) > 0
    assert len(towers.layers()) == 4  # of six: nobody reads the last ones
    with pytest.raises(CheckpointError, match="1 vision encoders, but the model has 2"):
        reload_vision_tower(again.config, paths[0])


def test_a_model_over_a_stack_is_the_stock_class(tmp_path: Path) -> None:
    model = make(["clip", "dinov2-registers"], [-2, -1], "default")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    pixels = torch.randn(1, 3, 28, 28)
    assert torch.equal(image_features(again, pixels), image_features(model, pixels))


def test_several_towers_with_no_more_layers_than_there_are(tmp_path: Path) -> None:
    paths = towers_in(tmp_path, "clip", "vit")
    cases: list[tuple[Any, str]] = [
        ({"path": paths, "feature_layer": [-2, -2, -1]}, "3 layers for 2 encoders"),
        ({"path": paths, "feature_layer": [-2, 9]}, "hidden states 0 to 3"),
        ({"path": paths, "revision": "main"}, "for one encoder"),
        ({"path": []}, "name a vision encoder"),
    ]
    for arguments, expected in cases:
        with pytest.raises(RecipeError, match=expected):
            load_vision_config(**arguments)
    (Path(paths[1]) / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="no usable preprocessor_config"):
        load_vision_config(paths)


def test_a_plain_tower_stays_the_stock_class(tmp_path: Path) -> None:
    for family in ("clip", "siglip", "dinov2", "vit"):
        tower = load_vision_tower(*towers_in(tmp_path, family))
        assert type(tower) is tiny.TOWERS[family][0]
        assert stock_features(tower.config, [-2, 1], "full") == ([-2, 1], "full")
    with pytest.raises(RecipeError, match="drops the CLS"):
        check_features(load_vision_config(*towers_in(tmp_path, "siglip")), -2, "default")


def test_siglip2_comes_as_a_two_tower_folder_of_siglip(tmp_path: Path) -> None:
    sizes = {**tiny.TOWERS["siglip"][2], "hidden_act": "gelu_pytorch_tanh"}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    whole = SiglipModel(SiglipConfig(vision_config=sizes, text_config={**text, "vocab_size": 50}))
    whole.save_pretrained(tmp_path)
    tower, pixels = load_vision_tower(str(tmp_path)), torch.randn(1, 3, 28, 28)
    assert torch.equal(tower(pixels).last_hidden_state, whole.vision_model(pixels).last_hidden_state)


def test_siglip2_without_a_fixed_resolution_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "siglip2_vision_model"}')
    with pytest.raises(CheckpointError, match="take one with a fixed resolution"):
        load_vision_config(str(tmp_path))


def test_a_vit_without_its_pooler_is_the_same_every_time(tmp_path: Path) -> None:
    (path,) = towers_in(tmp_path, "vit")
    ViTForImageClassification(AutoModel.from_pretrained(path).config).save_pretrained(path)
    tower = load_vision_tower(path)
    assert not tower.pooler.dense.weight.any()
    file = Path(path) / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layernorm.weight" not in k}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: layernorm\.weight"):
        load_vision_tower(path)
