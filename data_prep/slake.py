"""SLAKE: questions about 642 radiographs, CTs and MRIs, in English and in Chinese.

    python -m data_prep.slake --out data

* What: medical question answering with the official split; LLaVA-Med uses the English half.
* From: https://huggingface.co/datasets/BoKelvin/SLAKE. Licence: CC-BY-4.0.
* Size: 216 MB to download (212 MB of it pictures), as much on disk.
* Expected: 1,061 English records to test (and 5,972 to train or validate, their split is not verified). The
  counts in Chinese are not verified: published sources disagree.
* Writes `DIR/slake/`: `imgs/xmlabN/source.jpg`, `{train,validation,test}.json` in English, the same with `_zh`;
  `image` is relative to DIR, `answer_type` is the data set's own ("open", "closed").
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.common.archives import Archive
from data_prep.common.command import Dataset, Job
from data_prep.common.records import Record, RecordFile, question, read_array, write_array
from data_prep.common.transfer import Remote
from llava_train.errors import DataError

SOURCE = "https://huggingface.co/datasets/BoKelvin/SLAKE/resolve/main"
SPLITS, LANGUAGES = ("train", "validation", "test"), {"en": "", "zh": "_zh"}
COUNTS = {("test", "en"): 1_061}


def convert(job: Job) -> None:
    """Write the record files of each split that is there."""
    for split in SPLITS:
        path = job.home / "published" / f"{split}.json"
        if path.is_file():
            for language, ending in LANGUAGES.items():
                write_array(job.home / f"{split}{ending}.json", _records(path, split, language))


def _records(path: Path, split: str, language: str) -> Iterator[Record]:
    for number, item in enumerate(read_array(path)):
        try:
            if item["q_lang"] == language:
                image, kind = f"slake/imgs/{item['img_name']}", item["answer_type"].strip().lower()
                identity = f"slake-{split}-{item['qid']}"
                yield question(identity, image, item["question"], item["answer"], answer_type=kind)
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}[{number}]: not a question of SLAKE: {error} is missing") from error


DATASET = Dataset(
    name="slake",
    document=__doc__,
    parts={
        "questions": [Remote(f"{SOURCE}/{split}.json", f"slake/published/{split}.json") for split in SPLITS],
        "images": [Archive(Remote(f"{SOURCE}/imgs.zip", "slake/imgs.zip", about=212_000_000), "slake", "slake/imgs")],
    },
    records=[
        RecordFile(f"slake/{split}{ending}.json", COUNTS.get((split, language)), part="questions")
        for split in SPLITS
        for language, ending in LANGUAGES.items()
    ],
    convert=convert,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `Dataset.main`."""
    return DATASET.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
