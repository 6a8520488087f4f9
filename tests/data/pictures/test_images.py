"""Pictures: what each kind of file becomes, pixel for pixel, and what is refused before it is opened."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from llava_train.data.pictures import images
from llava_train.data.pictures.images import LEVELS, Header, check_image, decode_image, open_image
from llava_train.data.pictures.processors import build_image_processor, pixel_values, with_aspect_ratio
from llava_train.errors import DataError, RecordError
from tests import tiny


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, bits: int, colour: int, row: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of one row, for the kinds that Pillow cannot write; `more` chunks come behind the pixels."""
    header = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + row)), *more, (b"IEND", b"")]
    made = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def row(mode: str, *pixels: object) -> Image.Image:
    image = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    return image


def with_palette(mode: str, *pixels: object) -> Image.Image:
    image = row(mode, *pixels)
    image.putpalette([10, 20, 30, 200, 100, 50])
    return image


def deep(*values: int, kind: str = "<u2") -> Image.Image:
    return Image.fromarray(np.array([values], dtype=kind))


BLACK, WHITE, A, B = (0, 0, 0), (255, 255, 255), (10, 20, 30), (200, 100, 50)
DEEP = [BLACK, BLACK, (1, 1, 1), (128, 128, 128), WHITE]
CONVERSIONS: dict[str, tuple[bytes, list[tuple[int, int, int]]]] = {
    "1": (encoded(row("1", 0, 1), "PNG"), [BLACK, WHITE]),
    "L": (encoded(row("L", 0, 77), "PNG"), [BLACK, (77, 77, 77)]),
    "LA: alpha dropped": (encoded(row("LA", (77, 0), (9, 255)), "PNG"), [(77, 77, 77), (9, 9, 9)]),
    "P": (encoded(with_palette("P", 0, 1), "PNG"), [A, B]),
    "P, one colour transparent": (encoded(with_palette("P", 0, 1), "PNG", transparency=1), [A, B]),
    "P with alpha": (encoded(with_palette("P", 0, 1), "PNG", transparency=b"\0\x80"), [A, B]),
    "P in GIF, transparent": (encoded(with_palette("P", 0, 1), "GIF", transparency=1), [A, B]),
    "PA": (encoded(with_palette("PA", (0, 0), (1, 255)), "TIFF"), [A, B]),
    "RGB": (encoded(row("RGB", A, B), "BMP"), [A, B]),
    "RGBA: alpha dropped": (encoded(row("RGBA", (*A, 0), (*B, 128)), "PNG"), [A, B]),
    "RGBA in WEBP": (encoded(row("RGBA", (*A, 1), (*B, 128)), "WEBP", lossless=True, exact=True), [A, B]),
    "CMYK": (encoded(row("CMYK", (0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255)), "TIFF"), [WHITE, (0, 255, 255), BLACK]),
    "LAB": (encoded(row("LAB", (0, 128, 128), (255, 128, 128), (138, 209, 198)), "TIFF"), [BLACK, WHITE, (254, 0, 0)]),
    "I;16": (encoded(deep(0, 255, 256, 32768, 65535), "PNG"), DEEP),
    "I;16 in TIFF": (encoded(deep(0, 255, 256, 32768, 65535), "TIFF"), DEEP),
    "I;16B": (encoded(deep(0, 255, 256, 32768, 65535, kind=">u2"), "TIFF"), DEEP),
    "RGB of 16 bits": (png(1, 16, 2, struct.pack(">3H", 255, 32768, 65535)), [(0, 128, 255)]),
    "LA of 16 bits": (png(2, 16, 4, struct.pack(">4H", 0x4DFF, 0, 65535, 7)), [(77, 77, 77), WHITE]),
    "I: cut off": (encoded(row("I", -5, 77, 300, 70_000), "TIFF"), [BLACK, (77, 77, 77), WHITE, WHITE]),
    "F: cut off": (encoded(row("F", -0.5, 77.9, 1e9, float("nan")), "TIFF"), [BLACK, (77, 77, 77), WHITE, BLACK]),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_every_kind_has_its_conversion(kind: str) -> None:
    data, expected = CONVERSIONS[kind]
    image = decode_image(data, kind)
    assert image.mode == "RGB" and image.size == (len(expected), 1)
    assert np.abs(np.asarray(image, dtype=int)[0] - expected).max() <= 5 * (kind == "LAB"), image.tobytes()
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == kind.split()[0].strip(":,") or "of 16 bits" in kind
        if not opened.mode.startswith("I;16"):  # but for these, what the original LLaVA gets
            assert image.tobytes() == opened.convert("RGB").tobytes()


def test_jpeg_of_four_inks_is_read_as_adobe_wrote_it() -> None:
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert b"Adobe" in data  # Pillow writes the inks inverted, and says so
    red = np.asarray(decode_image(data, "x"), dtype=int)
    assert np.abs(red - (255, 0, 0)).max() <= 3
    assert decode_image(data.replace(b"Adobe", b"Adobf"), "x").tobytes() == decode_image(data, "x").tobytes()


def test_old_pillow_reads_deep_png_as_32_bits() -> None:
    image = row("I", 255, 256, 65535)
    image.format = "PNG"
    assert images._rgb(image).tobytes() == bytes([0] * 3 + [1] * 3 + [255] * 3)


def test_twelve_bits_fill_the_range() -> None:
    data = encoded(deep(0, 16, 4095, 2048), "TIFF")
    at = data.index(struct.pack("<HHIH", 258, 3, 1, 16)) + 8
    packed = data[:at] + struct.pack("<H", 12) + data[at + 2 :]
    with Image.open(io.BytesIO(packed)) as opened:
        assert opened.mode == "I;16"
        values = np.asarray(opened)[0]
    assert np.asarray(decode_image(packed, "x"))[0, :, 0].tolist() == (values >> 4).tolist()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    for level in ("header", "decode"):
        assert check_image(data, "x", level) == Header(8, 8, ("animated",))
    assert np.abs(np.asarray(decode_image(data, "x"), dtype=int) - (255, 0, 0)).max() <= 2


def turned_picture(orientation: int, kind: str, **options: object) -> bytes:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 6, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(noise, kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_a_choice(orientation: int, kind: str) -> None:
    data = turned_picture(orientation, kind)
    with Image.open(io.BytesIO(data)) as opened:
        as_it_is, upright = opened.convert("RGB"), ImageOps.exif_transpose(opened).convert("RGB")
    plain, turned = decode_image(data, "x"), decode_image(data, "x", exif_orientation=True)
    assert (plain.size, plain.tobytes()) == (as_it_is.size, as_it_is.tobytes())
    assert (turned.size, turned.tobytes()) == (upright.size, upright.tobytes())
    asks = 2 <= orientation <= 8 and kind != "TIFF"  # which Pillow turns always
    for level in ("header", "decode"):
        assert check_image(data, "x", level) == Header(*plain.size, ("exif_orientation",) if asks else ())
        assert check_image(data, "x", level, exif_orientation=True) == Header(*turned.size)


def test_orientation_behind_the_pixels_of_a_png_is_found() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(2, 8, 2, bytes([*A, *B]), (b"eXIf", exif.tobytes()[6:]))
    assert check_image(data, "x", "header", exif_orientation=True) == Header(1, 2)
    assert decode_image(data, "x", exif_orientation=True).size == (1, 2)
    assert check_image(data, "x", "header") == Header(2, 1)
    assert check_image(data, "x", "decode") == Header(2, 1, ("exif_orientation",))


def test_broken_exif_matters_only_where_it_is_used() -> None:
    data = turned_picture(6, "WEBP").replace(b"MM\0*", b"??\0*").replace(b"II*\0", b"??*\0")
    for level in ("header", "decode"):
        assert check_image(data, "x", level) == Header(6, 3, ("broken_exif",))
        with pytest.raises(RecordError, match="x: not a readable image"):
            check_image(data, "x", level, exif_orientation=True)
    assert decode_image(data, "x").size == (6, 3)


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", (5, 4)), "PNG")
    notes = {"a.jpg": ("wrong_extension",), "a.PNG": (), "a": (), "a.parquet[3]": ()}
    for name, expected in notes.items():
        (tmp_path / name).write_bytes(data)
        assert check_image(tmp_path / name, name, "header") == Header(5, 4, expected)
        assert decode_image(memoryview(data), name).size == open_image(tmp_path, name).size == (5, 4)


GOOD = encoded(Image.effect_noise((40, 30), 90), "JPEG")
UNUSABLE = {
    "empty": (b"", "image_empty", "0 bytes"),
    "html": (b"<html>not found</html>", "image_unreadable", "starts with b'<html>"),
    "broken": (b"\x89PNG\r\n\x1a\n broken", "image_unreadable", "not a readable image"),
    "cut": (GOOD[: len(GOOD) // 2], "image_unreadable", "truncated"),
    "eps": (b"%!PS-Adobe", "image_format", "EPS data; only JPEG"),
    "heif": (b"\0\0\0\x18ftypheic" + bytes(20), "image_format", "HEIF"),
    "ppm": (encoded(Image.new("RGB", (4, 4)), "PPM"), "image_format", "PPM data"),
    "strip": (encoded(Image.new("L", (201, 1)), "PNG"), "image_strip", "201 x 1 pixels, a strip beyond 200:1"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_cannot_be_used_is_named_with_its_cause(tmp_path: Path, kind: str) -> None:
    data, cause, told = UNUSABLE[kind]
    (tmp_path / "x.jpg").write_bytes(data)
    for source in (data, memoryview(data), tmp_path / "x.jpg"):
        for read in (lambda s: decode_image(s, "pic 7"), lambda s: check_image(s, "pic 7", "decode")):
            with pytest.raises(RecordError) as caught:
                read(source)
            assert (caught.value.cause, caught.value.hostile) == (cause, False)
            assert str(caught.value).startswith("pic 7: ") and told in str(caught.value)


def test_levels_look_as_far_as_they_say(tmp_path: Path) -> None:
    header = encoded(Image.new("RGB", (40, 30)), "PNG")[:-30]  # a good header, cut pixels
    sources = {"missing": tmp_path / "none", "empty": b"", "junk": b"junk", "cut": header}
    found = {}
    for kind, source in sources.items():
        for level in LEVELS:
            try:
                check_image(source, "x", level)
            except RecordError as error:
                found.setdefault(kind, (level, error.cause))
    assert found == {
        "missing": ("exists", "image_missing"),
        "empty": ("exists", "image_empty"),
        "junk": ("header", "image_unreadable"),
        "cut": ("decode", "image_unreadable"),
    }
    assert check_image(GOOD, "x", "none") is check_image(GOOD, "x", "exists") is None
    with pytest.raises(DataError, match="choose from none, exists, header, decode"):
        check_image(GOOD, "x", "deep")


def test_huge_pictures_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_decoding(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(images, "_rgb", no_decoding)
    shapes = {(7_100, 7_100): "more than the 50,000,000 allowed", (20_000, 20_000): "decompression bomb"}
    for size, told in shapes.items():
        bomb = png(1, 8, 0, b"\0\0")
        at = bomb.index(b"IHDR")
        ihdr = b"IHDR" + struct.pack(">II", *size) + bomb[at + 12 : at + 17]
        bomb = bomb[:at] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + bomb[at + 21 :]
        with pytest.raises(RecordError, match=told) as caught:
            decode_image(bomb, "x")
        assert caught.value.cause == "image_too_large"


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
        processor = build_image_processor(tower, ratio, 28)
        for other in wanted:  # a processor of one ratio made into another has the same colours
            changed = with_aspect_ratio(build_image_processor(tower, other, 28), ratio, 28)
            assert torch.equal(pixel_values([image], changed), pixel_values([image], processor))
        torch.testing.assert_close(
            pixel_values([image], processor)[0], expected_pixels(image, prepared), atol=1e-5, rtol=0
        )


def test_a_folder_without_a_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable preprocessor_config"):
        build_image_processor(str(tmp_path), "pad", 28)
