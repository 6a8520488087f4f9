"""Visual question answering from parquet files: pictures written as they are, a record a question."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from tqdm import tqdm

from data_prep.common.command import Job, needed
from data_prep.common.pictures import BROKEN
from data_prep.common.records import Record, question
from data_prep.common.transfer import Remote
from llava_train.errors import DataError
from llava_train.files import inside, read_json

COLUMNS = ("image", "question", "answer")
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "GIF": ".gif", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}
ROWS = 64  # so many pictures are in memory at a time


def parquet_records(files: Sequence[Path], split: str, out: Path, home: Path) -> Iterator[Record]:
    """A record a row; the pictures go to `home`/images once each, named by their content.

    `answer_type` is "closed" for a yes-or-no answer and "open" for any other, as the two scores of these
    data sets part them.
    """
    number = 0
    for path in files:
        for row in rows(path):
            place, content = f"{path} row {number}", (row["image"] or {}).get("bytes")
            if not all(isinstance(row[name], str) for name in ("question", "answer")) or not content:
                raise DataError(f"{place}: needs a picture, a question and an answer")
            picture = write_picture(content, home / "images", place)
            kind = "closed" if row["answer"].strip().lower() in ("yes", "no") else "open"
            name = picture.relative_to(out).as_posix()
            identity = f"{home.name}-{split}-{number}"
            yield question(identity, name, row["question"], row["answer"], answer_type=kind)
            number += 1


def listed_parquet(job: Job, listing: Remote, split: str) -> list[Path]:
    """The parquet files of a split that the hub's listing names, fetched beside the listing; DataError."""
    path = needed(inside(job.out, listing.path))
    try:
        urls = [str(url) for url in read_json(path)["default"][split]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: does not list the parquet files of {split!r}; delete it and run again") from error
    folder = PurePosixPath(listing.path).parent
    files = [Remote(url, f"{folder}/{split}-{number}.parquet") for number, url in enumerate(urls)]
    job.fetcher.fetch(files)
    return [inside(job.out, file.path) for file in files]


def rows(path: Path, columns: Sequence[str] = COLUMNS) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, a few at a time; DataError if it is none or lacks a column."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            if missing := [name for name in columns if name not in table.schema_arrow.names]:
                raise DataError(f"{path}: has no column {missing[0]!r}")
            with tqdm(total=table.metadata.num_rows, desc=path.name, unit="row", disable=None) as bar:
                for batch in table.iter_batches(batch_size=ROWS, columns=list(columns)):
                    yield from batch.to_pylist()
                    bar.update(batch.num_rows)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file: {error}; delete it and run again") from error


def write_picture(content: bytes, folder: Path, place: str) -> Path:
    """The picture as a file named by its sha256, with the suffix of what it is; DataError if it is none."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            suffix = SUFFIXES[picture.format or ""]
    except (*BROKEN, KeyError) as error:
        raise DataError(f"{place}: not a picture") from error
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(content).hexdigest()[:20]}{suffix}"
    if not (path.is_file() and path.stat().st_size == len(content)):
        path.write_bytes(content)
    return path
