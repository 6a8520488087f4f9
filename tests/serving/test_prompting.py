from pathlib import Path

import pytest

from llava_train.data.pictures.images import open_image
from llava_train.inference import read_pictures
from llava_train.recipe import load_recipe
from llava_train.serving.prompting import Bounds, picture
from llava_train.serving.protocol import Sent
from llava_train.training.setup import build
from tests import tiny
from tests.serving.conftest import data_url


@pytest.mark.parametrize("count", [1, 2])
def test_tiles_depend_on_whether_a_picture_is_alone(workplace: Path, count: int) -> None:
    recipe = tiny.make_recipe(workplace, model__image_aspect_ratio="anyres_max_2", data__max_length=1024)
    assembly, folder = build(load_recipe(recipe)), workplace / "data"
    names = ["22.png", "23.png"][:count]
    want = read_pictures(assembly, [open_image(folder, name) for name in names])
    got = [picture(assembly, Sent(data_url(folder / name), ""), count == 1, Bounds()) for name in names]
    assert [each.tokens for each in got] == [each.tokens for each in want]
    assert picture(assembly, Sent(data_url(folder / names[0]), ""), count != 1, Bounds()).tokens != want[0].tokens
