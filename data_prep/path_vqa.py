"""PathVQA: 32,632 questions about 4,289 pictures of pathology.

    python -m data_prep.path_vqa --out data

* What: medical question answering, the official split.
* From: https://huggingface.co/datasets/flaviagiammarino/path-vqa (parquet, found over the hub's list of them),
  which dropped the duplicates. The original ships pickle files, which can run code and are not read.
* Licence: MIT; the pictures belong to the publishers of two textbooks and to the PEIR library.
* Size: 785 MB to download, as much on disk.
* Expected: 19,654 records to train on, 6,259 to validate, 6,719 to test; 4,289 pictures (the data set's card).
* Writes `DIR/path_vqa/`: `images/`, `train.json`, `validation.json`, `test.json`; `image` is relative to DIR,
  `answer_type` is "closed" (yes or no) or "open".
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_prep.common.command import Dataset, Job
from data_prep.common.records import RecordFile, write_array
from data_prep.common.transfer import Remote
from data_prep.common.vqa import listed_parquet, parquet_records

LIST = Remote("https://huggingface.co/api/datasets/flaviagiammarino/path-vqa/parquet", "path_vqa/parquet/list.json")
SPLITS = {"train": 19_654, "validation": 6_259, "test": 6_719}


def convert(job: Job) -> None:
    """Fetch the listed parquet files, then write pictures and records of each split."""
    for split in job.parts:
        tables = listed_parquet(job, LIST, split)
        write_array(job.home / f"{split}.json", parquet_records(tables, split, job.out, job.home))


DATASET = Dataset(
    name="path_vqa",
    document=__doc__,
    parts={split: [LIST] for split in SPLITS},
    records=[RecordFile(f"path_vqa/{split}.json", count, part=split) for split, count in SPLITS.items()],
    convert=convert,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `Dataset.main`."""
    return DATASET.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
