#!/usr/bin/env python3
"""Images a second: decoding, decoding and preprocessing, and the loader that training uses. Then: cores for a GPU.

    python scripts/bench_loader.py                                # 256 pictures; about a minute
    python scripts/bench_loader.py --quick
    python scripts/bench_loader.py --images-per-second 600 --gpus 8 --workers 4 8 16

The pictures are made here: 640 x 480 JPEGs of quality 90, soft colours under noise, about 130 KB each (COCO's are of
that size and have about 155 KB). The more bytes, the longer decoding takes.

One process, one thread, the fastest of three passes:

  decode      bytes in memory to RGB: `pillow` alone, `ours` (Pillow with our limits), and others where installed: pip
              install simplejpeg torchvision PyTurboJPEG (which needs your system's libturbojpeg). Training takes
              Pillow
  preprocess  file to (3, 336, 336) float32: what training does with a picture, `pad` as in LLaVA-1.5

`loader` is the real one: a set prepared from LLaVA records, steps of 16 pictures, packed, with as many worker processes
as --workers says. Nothing trains meanwhile. The time runs from the first worker's start to the last batch.

`cores` are those that feed the GPUs at --images-per-second, by the preprocess rate. The default is what eight A100 of
312 TFLOP/s need at 50 % of their peak in stage 1 of LLaVA-1.5 7B: 16.3 TFLOP an image. The last line is one JSON; null
is what is not installed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from llava_train.data.batch import BatchReader, ImageReader, StepDataset, load_steps
from llava_train.data.encode import Encoder
from llava_train.data.micro_batches import Cut
from llava_train.data.mixture import Mixture
from llava_train.data.pictures.images import decode_image
from llava_train.data.pictures.media import Media
from llava_train.data.pictures.processors import with_aspect_ratio
from llava_train.data.pictures.shapes import Square
from llava_train.data.plan import Plan
from llava_train.data.preparing.prepare import prepare_set
from llava_train.data.preparing.prepared import PreparedSet
from llava_train.data.preparing.source import Source
from llava_train.data.sample import ImageRef
from llava_train.data.templates.template import load_template
from llava_train.demo.run import BACKBONES
from llava_train.model.llm import add_image_token, load_tokenizer

WIDTH, HEIGHT, QUALITY, SIDE, TOKENS = 640, 480, 90, 336, 576
STEP, PASSES = 16, 3
Decoder = Callable[[bytes], Any]


def make_pictures(folder: Path, count: int) -> list[bytes]:
    """Write `<n>.jpg` below `folder`; returns their bytes."""
    rng = np.random.default_rng(0)
    made = []
    for number in tqdm(range(count), desc="pictures", delay=2, disable=None):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        soft = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
        noisy = np.clip(soft + rng.normal(0, 12, (HEIGHT, WIDTH, 1)), 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noisy).save(stream, "JPEG", quality=QUALITY)
        (folder / f"{number}.jpg").write_bytes(stream.getvalue())
        made.append(stream.getvalue())
    return made


def _simplejpeg() -> Decoder:
    import simplejpeg

    return simplejpeg.decode_jpeg


def _turbojpeg() -> Decoder:
    from turbojpeg import TJPF_RGB, TurboJPEG

    library = TurboJPEG()
    return lambda data: library.decode(data, pixel_format=TJPF_RGB)


def _torchvision() -> Decoder:
    from torchvision.io import ImageReadMode, decode_jpeg

    return lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


DECODERS: dict[str, Callable[[], Decoder]] = {
    "pillow": lambda: lambda data: Image.open(io.BytesIO(data)).convert("RGB"),
    "ours": lambda: lambda data: decode_image(data, "picture"),
    "simplejpeg": _simplejpeg,
    "turbojpeg": _turbojpeg,
    "torchvision": _torchvision,
}


def decoder(name: str) -> Decoder | None:
    """A way to decode, or None (and a line that says why) where it is not installed or does not load."""
    try:
        return DECODERS[name]()
    except (ImportError, OSError, RuntimeError) as error:  # no module; no library; built for another torch
        reason = f"does not load: {error}".partition("\n")[0]
        reason = "not installed" if isinstance(error, ModuleNotFoundError) else reason
        print(f"{name}: {reason}", file=sys.stderr)
        return None


def rate(call: Callable[[Any], Any], items: Sequence[Any]) -> float:
    """Calls a second, of the fastest pass; the first calls are not timed."""
    for item in items[:4]:
        call(item)
    best = float("inf")
    for _ in range(PASSES):
        started = time.perf_counter()
        for item in items:
            call(item)
        best = min(best, time.perf_counter() - started)
    return len(items) / best


def image_reader() -> ImageReader:
    """What reads pictures in training, for CLIP-L/14-336, without its memory."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    reader = ImageReader(Square(with_aspect_ratio(CLIPImageProcessorPil(), "pad", SIDE), TOKENS))
    reader.budget = 0
    return reader


def prepared(folder: Path, count: int) -> tuple[PreparedSet, int]:
    """A set of one record a picture, and the padding id of its tokenizer."""
    tokenizer = load_tokenizer(str(BACKBONES / "llm"))
    add_image_token(tokenizer)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Soft colours and noise."}]
    records = [{"id": str(number), "image": f"{number}.jpg", "conversations": turns} for number in range(count)]
    (folder / "records.json").write_text(json.dumps(records))
    encoder = Encoder(tokenizer, load_template("plain"), image_tokens=TOKENS, max_length=2048)
    source = Source("bench", (str(folder / "records.json"),), encoder, Media(folder), "llava", duplicates="allow")
    return prepare_set([source], folder / "cache", "bench", workers=1), int(tokenizer.pad_token_id)


def loaded(rows: PreparedSet, pad_id: int, workers: int) -> float:
    """Images a second out of the loader, over one epoch."""
    count = len(rows.lengths)
    cut = Cut(STEP, budget=2 * STEP * int(rows.lengths.max()))
    reader = BatchReader(rows, image_reader(), pad_id, cut)
    dataset = StepDataset(reader, Plan.of(Mixture.whole(count), STEP, 1, None, 0), rank=0, world_size=1)
    started = time.perf_counter()
    images = sum(len(batch.pixel_values) for step in load_steps(dataset, 0, workers) for batch in step)
    assert images == count
    return images / (time.perf_counter() - started)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parse(arguments)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="bench-loader-"))
    try:
        figures = _measured(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _show(figures)
    print(json.dumps(figures))
    return 0


def _measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    pictures = make_pictures(folder, options.images)
    found = {name: decoder(name) for name in DECODERS}
    decode = {
        name: rate(call, pictures) if call else None
        for name, call in tqdm(found.items(), desc="decoders", delay=2, disable=None)
    }
    reader, media = image_reader(), Media(folder)
    refs = [ImageRef(f"{number}.jpg") for number in range(options.images)]
    preprocess = rate(lambda ref: reader.read([ref], media), refs)
    rows, pad_id = prepared(folder, options.images)
    loader = {
        str(workers): loaded(rows, pad_id, workers)
        for workers in tqdm(options.workers, desc="loader", delay=2, disable=None)
    }
    cores = options.images_per_second / preprocess
    return {
        "images": options.images,
        "kilobytes": round(float(np.mean([len(data) for data in pictures])) / 1000, 1),
        "machine_cores": len(os.sched_getaffinity(0)),
        "decode": {name: value and round(value, 1) for name, value in decode.items()},
        "preprocess": round(preprocess, 1),
        "loader": {name: round(value, 1) for name, value in loader.items()},
        "images_per_second_needed": options.images_per_second,
        "gpus": options.gpus,
        "cores": round(cores, 2),
        "cores_per_gpu": round(cores / options.gpus, 3),
    }


def _show(figures: dict[str, Any]) -> None:
    print(
        f"images a second, {WIDTH} x {HEIGHT} JPEG of {figures['kilobytes']} KB; {figures['machine_cores']} cores here"
    )
    for name, value in figures["decode"].items():
        print(f"  decode, {name:24}{'-' if value is None else f'{value:.0f}':>8}")
    print(f"  preprocess to {SIDE} pixels           {figures['preprocess']:8.0f}")
    for workers, value in figures["loader"].items():
        print(f"  loader, workers: {workers:15}{value:8.0f}")
    need = f"{figures['gpus']} GPUs at {figures['images_per_second_needed']:g} images/s in all"
    print(f"{need} keep {figures['cores']:.1f} cores busy, {figures['cores_per_gpu']:.2f} a GPU")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=int, default=256, metavar="N", help="pictures (default: %(default)s)")
    add("--workers", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="of the loader (default: 1 2 4)")
    add("--images-per-second", type=float, default=77, metavar="N", help="of all GPUs (default: %(default)s)")
    add("--gpus", type=int, default=8, metavar="N", help="that need them (default: %(default)s)")
    add("--quick", action="store_true", help="64 pictures, 1 and 2 workers")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.workers = 64, [1, 2]
    if min(options.images, options.images_per_second, options.gpus) <= 0 or min(options.workers) < 0:
        parser.error("--images, --images-per-second and --gpus must be above 0, --workers at least 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
