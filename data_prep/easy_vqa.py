"""easy-VQA: 5,000 pictures of one coloured shape and 48,248 questions about them, as LLaVA JSON.

    python -m data_prep.easy_vqa --out assets

* What: 64 px drawings; "what shape is in the image?", "is there a red shape?"; 13 one-word answers. The
  official split is kept: 4,000 pictures and 38,575 questions to train on, 1,000 and 9,673 to test on.
* From: the installed Python package `easy-vqa` 1.0, its data checked by one sha256 over all files.
* Licence: MIT. Size: 3 MB to install, 35 MB on disk (small files). Expected: 4,000 + 1,000 pictures.
* Writes `DIR/easy_vqa/`: `{train,test}/images/N.png`, `captions.json` (one a training picture),
  `instructions.json` (up to 4 questions a record), `test.json` (one a record); `image` is relative to DIR.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from data_prep.common.command import Dataset, say_built
from data_prep.common.records import Record, RecordFile
from llava_train.demo import easy_vqa
from llava_train.errors import DataError
from llava_train.files import atomic_folder, ensure_space, write_json

PACKAGE, VERSION, LICENCE = "easy-vqa", "1.0", "MIT"
SHA256 = "5a3e6cbf6a007e072a89234e01dd28879d0f87374490262f56abdeb011ac0754"
SOURCE = (PACKAGE, VERSION, LICENCE, SHA256)
DISK_BYTES = 50_000_000
TURNS = 4
COUNTS = {"captions": 3971, "instructions": 11121, "test": 9673}
ONE_WORD = "Answer with one word."


def build(out: Path) -> bool:
    """Make `out/easy_vqa` whole or not at all; False if it is there already. DataError, StorageError."""
    if (out / "easy_vqa").is_dir():
        return False
    ensure_space(out, DISK_BYTES, "copying the easy-VQA pictures")
    data = package_data()
    with atomic_folder(out / "easy_vqa") as folder:
        for split in ("train", "test"):
            (folder / split / "images").mkdir(parents=True)
            pictures = sorted((data / split / "images").glob("*.png"))
            for picture in tqdm(pictures, desc=f"easy-vqa {split}", unit="picture", disable=None):
                shutil.copyfile(picture, folder / split / "images" / picture.name)
        for name, records in all_records().items():
            write_json(folder / f"{name}.json", records)
    return True


def package_data() -> Path:
    """The installed package's data folder, its content verified; DataError if it is missing or changed."""
    try:
        data = easy_vqa.image_folder("train").parents[1]
    except ImportError as error:
        raise DataError(f"easy-VQA comes with a Python package: pip install {PACKAGE}=={VERSION}") from error
    got = tree_sha256(data, [*data.glob("*/questions.json"), *data.glob("*/images/*.png")])
    if got != SHA256:
        raise DataError(f"{data}: wrong sha256 of its files: expected {SHA256}, got {got}; reinstall it")
    return data


def tree_sha256(root: Path, files: Iterable[Path]) -> str:
    """One sha256 over the names (relative to `root`) and the contents of files, whatever their order."""
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        digest.update(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n".encode())
    return digest.hexdigest()


def all_records(seed: int = 0) -> dict[str, list[Record]]:
    """`captions` and `instructions` of the training pictures, `test` with all test questions."""
    instructions = easy_vqa.train_records(turns=TURNS, seed=seed)
    return {
        "captions": [_placed(record, "train") for record in easy_vqa.caption_records(seed)],
        "instructions": [_asked(_placed(record, "train")) for record in instructions],
        "test": [_asked(_placed(record, "test")) for record in easy_vqa.test_records()],
    }


def _placed(record: Record, split: str) -> Record:
    """The record with its image relative to the assets folder instead of the package."""
    return record | {"image": f"easy_vqa/{split}/images/{record['image']}"}


def _asked(record: Record) -> Record:
    """The record with the answer's form said after each question."""
    turns = [
        turn | {"value": f"{turn['value']} {ONE_WORD}"} if turn["from"] == "human" else turn
        for turn in record["conversations"]
    ]
    return record | {"conversations": turns}


DATASET = Dataset(
    name="easy_vqa",
    document=__doc__,
    parts={},
    records=[RecordFile(f"easy_vqa/{name}.json", count) for name, count in COUNTS.items()],
    convert=lambda job: say_built(job.out / "easy_vqa", build(job.out)),
    out="assets",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `Dataset.main`."""
    return DATASET.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
