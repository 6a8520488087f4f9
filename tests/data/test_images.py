from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_train.data import images
from llava_train.data.images import build_image_processor, check_image, open_image, pixel_values
from llava_train.errors import DataError
from tests import tiny


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    name = "a.tiff" if mode == "CMYK" else "a.png"
    Image.new(mode, (5, 4)).save(tmp_path / name)
    check_image(tmp_path, name)
    image = open_image(tmp_path, name)
    assert (image.mode, image.size) == ("RGB", (5, 4))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n broken", b"%!PS-Adobe"])
@pytest.mark.parametrize("read", [open_image, check_image])
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, read) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.jpg: not a readable image"):
        read(tmp_path, "x.jpg")
    with pytest.raises(DataError, match="no such image"):
        read(tmp_path, "none.jpg")


def test_huge_pictures_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 10)
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="5 x 4 pixels, more than the 10 allowed"):
        open_image(tmp_path, "a.png")


def test_exif_orientation_is_a_choice(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 3))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path, "a.jpg").size == (6, 3)
    assert open_image(tmp_path, "a.jpg", exif_orientation=True).size == (3, 6)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.make_tower(tmp_path_factory.mktemp("tower")))


def expected_pixels(image: Image.Image, prepared: Image.Image) -> torch.Tensor:
    values = np.asarray(prepared, dtype=np.float32) / 255
    return torch.tensor((values - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.25], dtype=torch.float32).permute(2, 0, 1)


def test_aspect_ratios_do_what_they_say(tower: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    padded = Image.new("RGB", (70, 70), (127, 102, 76))
    padded.paste(image, (0, 15))
    wide = image.resize((49, 28), Image.Resampling.BICUBIC)
    wanted = {
        "pad": padded.resize((28, 28), Image.Resampling.BICUBIC),
        "square": image.resize((28, 28), Image.Resampling.BICUBIC),
        "crop": wide.crop((10, 0, 38, 28)),
    }
    for ratio, prepared in wanted.items():
        pixels = pixel_values([image], build_image_processor(tower, ratio, 28))[0]
        torch.testing.assert_close(pixels, expected_pixels(image, prepared), atol=1e-5, rtol=0)


def test_a_folder_without_a_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable preprocessor_config"):
        build_image_processor(str(tmp_path), "pad", 28)
