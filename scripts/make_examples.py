#!/usr/bin/env python3
"""Write the binary files under tests/data/examples: pictures, a video, a tar, Parquet files, a `datasets` folder.

The JSON files there are written by hand; `expected.json` says what each record must become.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "tests" / "data" / "examples"
COLOURS = {"red.png": (200, 30, 30), "blue.jpg": (30, 30, 200), "green.webp": (30, 160, 30)}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def main() -> int:
    """Write all of them."""
    pictures = EXAMPLES / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for number, (name, colour) in enumerate(COLOURS.items()):
        pixels = np.full((12 + 2 * number, 16, 3), colour, np.uint8)
        pixels[4:8, 4:8] = 255
        Image.fromarray(pixels).save(pictures / name)
    write_video(pictures / "clip.mp4")
    data = {name: (pictures / name).read_bytes() for name in COLOURS}
    write_shard(EXAMPLES / "caption" / "00000.tar", data)
    write_parquet(EXAMPLES / "cauldron" / "train.parquet", cauldron_rows(data))
    write_parquet(EXAMPLES / "preference" / "rlaif_v.parquet", rlaif_rows(data))
    write_dataset(EXAMPLES / "vqa" / "saved", data)
    return 0


def write_video(path: Path) -> None:
    """Ten frames of 32 x 32 pixels, from black to red."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for number in range(10):
            pixels = np.full((32, 32, 3), (25 * number, 0, 0), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def write_shard(path: Path, data: dict[str, bytes]) -> None:
    """Three samples as CC3M-wds lays them out: a picture, its caption, and what is known of it."""
    captions = {"red.png": "a red flag with a white square", "blue.jpg": "a blue flag", "green.webp": "a green flag"}
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, (name, caption) in enumerate(captions.items()):
            facts = {"caption": caption, "key": f"{number:09}", "status": "success", "width": 16}
            members = {name.partition(".")[2]: data[name], "txt": caption.encode(), "json": json.dumps(facts).encode()}
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{number:09}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def cauldron_rows(data: dict[str, bytes]) -> pa.Table:
    """Lists of pictures, and question and answer turns; a row group a row."""
    rows: list[dict[str, Any]] = [
        {
            "images": [{"bytes": data["red.png"], "path": None}, {"bytes": data["blue.jpg"], "path": None}],
            "texts": [
                {"user": "Which flag is warmer?", "assistant": "The first.", "source": "flags"},
                {"user": "And which is colder?", "assistant": "The second.", "source": "flags"},
            ],
        },
        {"images": [], "texts": [{"user": "How many sides has a flag?", "assistant": "Four.", "source": "flags"}]},
    ]
    turn = pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())])
    return pa.Table.from_pylist(rows, pa.schema([("images", pa.list_(IMAGE)), ("texts", pa.list_(turn))]))


def rlaif_rows(data: dict[str, bytes]) -> pa.Table:
    """The columns of RLAIF-V."""
    fields = ["ds_name", "question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path"]
    schema = pa.schema([("image", IMAGE), *((field, pa.string()) for field in fields)])
    row = {
        "ds_name": "flags",
        "image": {"bytes": data["green.webp"], "path": "green.webp"},
        "question": "What colour is the flag?",
        "chosen": "The flag is green, with a white square.",
        "rejected": "The flag is green, with a white star.",
        "idx": "0",
        "image_path": "flags/green.webp",
    }
    return pa.Table.from_pylist([row], schema)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Parquet with a row group a row."""
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=1, store_schema=False)


def write_dataset(folder: Path, data: dict[str, bytes]) -> None:
    """What `datasets` saves: an Arrow stream with an image column, and files about it."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = {
        "image": [{"bytes": data["blue.jpg"], "path": None}, {"bytes": data["red.png"], "path": None}],
        "question": ["What colour is the flag?", "Is there a square?"],
        "answer": ["blue", "yes"],
    }
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    shutil.rmtree(folder, ignore_errors=True)
    Dataset.from_dict(rows, features=features).save_to_disk(folder)


if __name__ == "__main__":
    sys.exit(main())
