"""Tiles and their tokens, against transformers' own processors."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor

from llava_train.data.pictures.processors import tile_processor
from llava_train.data.pictures.shapes import Shown, shown_in
from llava_train.data.pictures.shaping import build_shape
from llava_train.data.sample import ImageRef
from llava_train.errors import RecipeError
from tests import tiny

TILE, SIDE = 28, 4
SIZES = [(28, 28), (28, 30), (56, 28), (57, 31), (100, 20), (20, 100), (300, 301), (7, 90), (84, 84), (500, 90)]


class Colours:
    image_mean, image_std, resample, do_normalize, rescale_factor = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25], 3, True, 1 / 255


def stock(way: str, tokenizer, most: int = 9):
    processor = tile_processor(Colours, way, TILE, None)
    if way == "anyres":
        kind = LlavaNextProcessor(
            processor, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
        return build_shape("llava_next", processor, SIDE**2), kind
    kind = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)  # the whole one wants torchvision, for videos
    kind.image_processor, kind.num_image_tokens = processor, SIDE**2
    kind.vision_aspect_ratio, kind.vision_feature_select_strategy = way, "full"
    return build_shape("llava_onevision", processor, SIDE**2, {"most": most}), kind


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    made = tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    made.add_tokens(["<image>"], special_tokens=True)
    return made


@pytest.mark.parametrize("way", ["anyres", "anyres_max_9", "anyres_max_2"])
def test_tokens_and_tiles_are_those_of_transformers(tokenizer, way: str) -> None:
    shape, theirs = stock(way, tokenizer, int(way[-1]) if way != "anyres" else 0)
    for width, height in SIZES:
        picture = shape.picture(Image.new("RGB", (width, height), "red"), Shown(width, height))
        expected = theirs._get_number_of_features(height, width, TILE, TILE) - (way == "anyres")
        assert picture.tokens == shape.tokens(Shown(width, height)) == expected, (width, height)
        made = theirs.image_processor(images=[Image.new("RGB", (width, height), "red")], return_tensors="pt")
        assert torch.equal(picture.pixels, made["pixel_values"][0])
        assert picture.facts["image_sizes"].tolist() == made["image_sizes"][0].tolist() == [height, width]


def test_pictures_in_company_and_frames_stay_one_tile(tokenizer) -> None:
    shape, theirs = stock("anyres_max_9", tokenizer)
    image = Image.effect_noise((90, 50), 60).convert("RGB")
    several = shape.picture(image, Shown(90, 50, alone=False))
    expected = theirs.image_processor(images=[[image, image]], return_tensors="pt")["pixel_values"][:, 0]
    assert torch.equal(several.pixels, expected[:1]) and several.tokens == SIDE**2 + 1
    frames = [shape.picture(image, Shown(90, 50, frame)) for frame in ("one", "last")]
    assert [frame.tokens for frame in frames] == [4, 5]  # a quarter; a newline ends the video
    assert [frame.facts["pooled"].item() for frame in frames] == [1, 2]
    assert frames[0].pixels.shape == (1, 3, TILE, TILE)
    assert not torch.equal(frames[0].pixels, several.pixels)  # stretched, not padded


def test_small_pictures_stay_one_tile_if_asked() -> None:
    processor = tile_processor(Colours, "anyres_max_9", TILE, None)
    usual, asked = (build_shape("llava_onevision", processor, SIDE**2, {"one_tile": one}) for one in (False, True))
    small, large = Shown(TILE, 20), Shown(TILE + 1, 20)
    assert (usual.tokens(small), asked.tokens(small)) == (SIDE**2 + 2 * 5, SIDE**2 + 1)
    assert usual.tokens(large) == asked.tokens(large)
    assert len(asked.picture(Image.new("RGB", (TILE, 20)), small).pixels) == 1


def test_grids_must_be_of_whole_tiles() -> None:
    with pytest.raises(RecipeError, match="multiples of a tile, 28 pixels"):
        tile_processor(Colours, "anyres", TILE, [[28, 57]])
    assert tile_processor(Colours, "anyres", TILE, [[28, 56]]).image_grid_pinpoints == [[28, 56]]


def test_how_pictures_of_a_conversation_are_shown() -> None:
    frames = [ImageRef("v.mp4", "frame", at, 2) for at in range(2)]
    shown = shown_in([ImageRef("a.png"), *frames], [1, 2, 3, 4, 3, 4])
    assert [(each.width, each.height, each.frame, each.alone) for each in shown] == [
        (1, 2, "no", False),
        (3, 4, "one", False),
        (3, 4, "last", False),
    ]
    assert shown_in([ImageRef("a.png")], [5, 6]) == [Shown(5, 6)]
