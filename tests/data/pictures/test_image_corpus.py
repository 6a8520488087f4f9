"""The picture reader against broken pictures: Pillow's own corpus, and seeded mutations of good ones.

Every look at a picture must end in "ok" or a RecordError with a known cause. The pictures are read in a child
process, so that a death, a hang or the memory shows. To see one again, run this file as a module with `python -m`.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import io
import json
import random
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageOps

from llava_train.data.pictures.images import Bytes, check_image, decode_image
from llava_train.errors import DataError, RecordError

REPOSITORY = Path(__file__).resolve().parents[3]
CAUSES = {"image_missing", "image_empty", "image_unreadable", "image_format", "image_too_large", "image_strip"}
SECONDS = 10


def fetcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_corpus", REPOSITORY / "scripts" / "fetch_image_corpus.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def corpus() -> Path:
    try:
        return fetcher().fetch()
    except DataError as error:
        pytest.skip(f"Pillow's test pictures are not here and cannot be fetched: {error}")


def look(source: Bytes, name: str, exif: bool) -> tuple[str, str]:
    """What becomes of a picture at the levels header and decode; the levels must not contradict one another."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # also ends a hang inside of C
    told: dict[str, str] = {}
    seen = {}
    reads: dict[str, Callable] = {
        "header": lambda: check_image(source, name, "header", exif),
        "decode": lambda: check_image(source, name, "decode", exif),
        "use": lambda: decode_image(source, name, exif),
    }
    for level, read in reads.items():
        try:
            seen[level] = read()
            told[level] = "ok"
        except RecordError as error:
            assert error.cause in CAUSES and not error.hostile and str(error).startswith(f"{name}: "), error
            told[level] = error.cause
    faulthandler.cancel_dump_traceback_later()
    assert told["decode"] == told["use"], (name, told)
    if told["use"] == "ok":
        assert seen["use"].mode == "RGB" and told["header"] == "ok", (name, told)
        size = (seen["decode"].width, seen["decode"].height)
        assert seen["use"].size == size == (seen["header"].width, seen["header"].height), (name, size, seen)
    return told["header"], told["decode"]


def peak_megabytes() -> float:
    """The most memory this process held; VmHWM, as ru_maxrss still counts the parent before the exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmHWM")


def child(what: str, argument: str) -> None:
    """Look at the files of a folder ("corpus") or at so many mutations ("mutations"); print the figures as JSON."""
    items = corpus_items(Path(argument)) if what == "corpus" else mutations(int(argument))
    for data in small_pictures():  # what is imported and built only once is not growth
        decode_image(data, "warm-up", True)
    start, figures = peak_megabytes(), Counter()
    slowest = (0.0, "")
    for source, name, exif in items:
        print(name, flush=True)  # the last name before a death
        began = time.perf_counter()
        header, decode = look(source, name, exif)
        slowest = max(slowest, (time.perf_counter() - began, name))
        figures.update([f"header: {header}", f"decode: {decode}"])
    print(json.dumps({"outcomes": figures, "slowest": slowest, "growth": peak_megabytes() - start}))


def run_child(what: str, argument: str) -> dict:
    began = time.perf_counter()
    command = [sys.executable, "-m", "tests.data.pictures.test_image_corpus", what, argument]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    assert done.returncode == 0, f"exit status {done.returncode} at {last}: {done.stderr[-2000:]}"
    figures = json.loads(last)
    print(json.dumps(figures, indent=1), f"{time.perf_counter() - began:.1f} s")
    return figures


def corpus_items(folder: Path) -> list[tuple[Bytes, str, bool]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "LICENSE.txt")
    return [(path, str(path), exif) for path in paths for exif in (False, True)]


@pytest.mark.corpus
def test_every_picture_of_the_corpus_is_read_or_named(corpus: Path) -> None:
    figures = run_child("corpus", str(corpus))
    assert sum(figures["outcomes"].values()) == 2 * 2 * 1_060
    assert figures["slowest"][0] <= SECONDS and figures["growth"] <= 300


@pytest.mark.corpus
def test_every_turned_picture_of_the_corpus_is_turned(corpus: Path) -> None:
    upright = decode_image(corpus / "hopper.jpg", "hopper")
    for number in range(2, 9):
        path = corpus / f"hopper_orientation_{number}.jpg"
        with Image.open(path) as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
            assert decode_image(path, "as it is").tobytes() == image.convert("RGB").tobytes()
        turned = decode_image(path, "turned", exif_orientation=True)
        assert turned.tobytes() == expected.tobytes() and turned.size == upright.size
        distance = np.abs(np.asarray(turned, dtype=float) - np.asarray(upright.resize(turned.size))).mean()
        assert distance < 20, number


def test_broken_pictures_are_named() -> None:
    run_child("mutations", "500")


@pytest.mark.corpus
def test_many_broken_pictures_are_named() -> None:
    run_child("mutations", "10000")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def small_pictures() -> list[bytes]:
    """Valid pictures of all allowed formats and most of their modes and compressions."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    grey, alpha, palette = noise.convert("L"), noise.convert("RGBA"), noise.convert("P")
    deep = Image.fromarray(np.random.default_rng(1).integers(0, 65536, (12, 16), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    later = {"save_all": True, "append_images": [noise.rotate(90)]}
    made = [
        (noise, "JPEG", {"exif": exif}), (noise, "JPEG", {"progressive": True}), (grey, "JPEG", {}),
        (noise.convert("CMYK"), "JPEG", {}), (noise, "PNG", {"exif": exif}), (alpha, "PNG", {}), (deep, "PNG", {}),
        (palette, "PNG", {"transparency": b"\0\x80"}), (grey.convert("1"), "PNG", {}), (noise, "PNG", later),
        (noise, "WEBP", {"exif": exif}), (alpha, "WEBP", {"lossless": True}), (noise, "WEBP", later),
        (palette, "GIF", {}), (palette, "GIF", later), (noise, "BMP", {}), (palette, "BMP", {}), (noise, "TIFF", {}),
        (noise, "TIFF", {"compression": "tiff_lzw"}), (noise, "TIFF", {"compression": "jpeg"}), (deep, "TIFF", later),
        (grey.convert("1"), "TIFF", {"compression": "group4"}), (alpha, "TIFF", {"compression": "tiff_deflate"}),
        (grey.convert("F"), "TIFF", {}), (noise.convert("CMYK"), "TIFF", {"exif": exif}),
    ]  # fmt: skip
    return [encoded(image, kind, **options) for image, kind, options in made]


def mutations(count: int) -> list[tuple[Bytes, str, bool]]:
    pictures = small_pictures()
    return [(mutation(pictures, seed), f"mutation {seed}", bool(seed % 2)) for seed in range(count)]


def mutation(pictures: list[bytes], seed: int) -> bytes:
    """One of the pictures, broken in one way out of five, or in two; the same for the same seed."""
    chance = random.Random(seed)
    data = bytearray(chance.choice(pictures))
    for _ in range(chance.choice((1, 1, 2))):
        at, width = chance.randrange(len(data)), chance.choice((1, 2, 4, 16, 64))
        kind = chance.choice(("flip", "flip", "cut", "splice", "zero", "field", "field"))
        if kind == "flip":
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif kind == "cut":
            data = data[: max(at, 1)]
        elif kind == "splice":
            other = chance.choice(pictures)
            data[at : at + width] = other[chance.randrange(len(other)) :][:width]
        elif kind == "zero":
            data[at : at + width] = bytes(min(width, len(data) - at))
        else:  # a number in the header becomes an odd one
            number = chance.choice((0, 1, 255, 256, 7_000, 65_535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1))
            field = struct.pack(chance.choice("<>") + "I", number)[:: chance.choice((1, -1))][: chance.choice((2, 4))]
            at = chance.randrange(min(96, len(data)))
            data[at : at + len(field)] = field
        data = data or bytearray(b"\0")
    return mended(bytes(data)) if chance.random() < 0.5 else bytes(data)


def mended(data: bytes) -> bytes:
    """A PNG with its checksums made right, so that what is broken gets past them; other formats have none."""
    if not data.startswith(b"\x89PNG"):
        return data
    out, at = data[:8], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + size]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + size
    return out + data[at:]


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "link.png"])
def test_an_unsafe_archive_is_not_unpacked(tmp_path: Path, name: str) -> None:
    script = fetcher()
    member = tarfile.TarInfo(f"{script.PICTURES}{name}")
    if name == "link.png":
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(member)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError):
        script.extract(tmp_path / "a.tar.gz", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == [] and len(list(tmp_path.iterdir())) == 2


def test_the_pictures_of_an_archive_are_unpacked(tmp_path: Path) -> None:
    script = fetcher()
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for name in (f"{script.PICTURES}a/b.png", script.LICENCE, f"pillow-{script.VERSION}/setup.py"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    assert script.extract(tmp_path / "a.tar.gz", tmp_path / "out") == 1
    found = [path.relative_to(tmp_path).as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(found) == ["out/LICENSE.txt", "out/a/b.png"]


if __name__ == "__main__":
    child(*sys.argv[1:])
