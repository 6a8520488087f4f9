"""CC3M: Conceptual Captions' 2.9 million web pictures with their cleaned alt texts, as webdataset shards.

    python -m data_prep.cc3m_wds --out data --limit 10              # the first ten shards

* What: alignment data. Training reads the shards as they are: `path: data/cc3m_wds/train`.
* From: https://huggingface.co/datasets/pixparse/cc3m-wds (the revision is pinned).
* Licence: "conceptual-captions": free to use, provided Google is acknowledged; the pictures belong to others.
* Size: 576 + 16 shards; about 260 GB, not verified.
* Expected: 2,905,954 samples to train on, 13,443 to validate, each with a picture.
* Writes `DIR/cc3m_wds/{train,validation}/cc3m-*.tar`, in them KEY.jpg, KEY.txt (the caption), KEY.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_prep.common.command import Dataset
from data_prep.common.records import RecordFile
from data_prep.common.transfer import Remote

REVISION = "46f3d69f840e59d77d52e8decfe5baec97e94c7f"
SOURCE = f"https://huggingface.co/datasets/pixparse/cc3m-wds/resolve/{REVISION}"
SHARDS, SAMPLES = {"train": 576, "validation": 16}, {"train": 2_905_954, "validation": 13_443}


def shard(split: str, number: int) -> Remote:
    """One shard."""
    name = f"cc3m-{split}-{number:04}.tar"
    return Remote(f"{SOURCE}/{name}", f"cc3m_wds/{split}/{name}")


DATASET = Dataset(
    name="cc3m_wds",
    document=__doc__,
    parts={split: [shard(split, number) for number in range(count)] for split, count in SHARDS.items()},
    records=[RecordFile(f"cc3m_wds/{split}", count, part=split) for split, count in SAMPLES.items()],
    limit="shards",
    limit_files=True,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `Dataset.main`."""
    return DATASET.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
