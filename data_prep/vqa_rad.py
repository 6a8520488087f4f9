"""VQA-RAD: 2,244 questions about 314 radiographs, asked and answered by clinicians.

    python -m data_prep.vqa_rad --out data

* What: medical question answering, the official split (LLaVA-Med tunes and tests on it).
* From: https://huggingface.co/datasets/flaviagiammarino/vqa-rad (parquet; the revision is pinned), which took
  the questions from https://osf.io/89kps and dropped 4 duplicates.
* Licence: CC0-1.0. Size: 35 MB to download, as much on disk.
* Expected: 1,793 records to train on, 451 to test, 314 pictures (the data set's card). Both splits ask about
  the same pictures: a score on the test split is one of new questions, not of new pictures.
* Writes `DIR/vqa_rad/`: `images/`, `train.json`, `test.json`; `image` is relative to DIR, `answer_type` is
  "closed" (yes or no) or "open".
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_prep.common.command import Dataset, Job, needed
from data_prep.common.records import RecordFile, write_array
from data_prep.common.transfer import Remote
from data_prep.common.vqa import parquet_records

REVISION = "bcf91e7654fb9d51c8ab6a5b82cacf3fafd2fae9"
SOURCE = f"https://huggingface.co/datasets/flaviagiammarino/vqa-rad/resolve/{REVISION}/data"
# split -> (file, rounded bytes, records)
SPLITS = {
    "train": ("train-00000-of-00001-eb8844602202be60.parquet", 24_200_000, 1_793),
    "test": ("test-00000-of-00001-e5bc3d208bb4deeb.parquet", 10_300_000, 451),
}


def convert(job: Job) -> None:
    """Write pictures and records of each split."""
    for split in job.parts:
        table = needed(job.home / "parquet" / f"{split}.parquet")
        write_array(job.home / f"{split}.json", parquet_records([table], split, job.out, job.home))


DATASET = Dataset(
    name="vqa_rad",
    document=__doc__,
    parts={
        split: [Remote(f"{SOURCE}/{name}", f"vqa_rad/parquet/{split}.parquet", about=about)]
        for split, (name, about, _) in SPLITS.items()
    },
    records=[RecordFile(f"vqa_rad/{split}.json", count, part=split) for split, (*_, count) in SPLITS.items()],
    convert=convert,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `Dataset.main`."""
    return DATASET.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
