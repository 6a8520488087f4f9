"""LLaVA-Pretrain (LCS-558K): 558,128 pictures of LAION, CC and SBU with BLIP captions, LLaVA JSON already.

    python -m data_prep.llava_pretrain --out data

* What: the alignment data of LLaVA-1.5's stage 1 (configs/llava-1.5/*-stage1.yaml).
* From: https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain
* Licence: the captions as CC-3M and BLIP; the pictures may only be used to reproduce the work.
* Size: 27.6 GB to download (181 MB of it JSON), as much again on disk while it is unpacked.
* Expected: 558,128 records, each with a picture. No checksum is published as far as is known here: the first
  download is trusted, its digest kept in `DIR/llava_pretrain/fetched.json`.
* Writes `DIR/LLaVA-Pretrain/`: `blip_laion_cc_sbu_558k.json`, `images/00000/000000010.jpg`, ..
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_prep.common.archives import Archive
from data_prep.common.command import Dataset
from data_prep.common.records import RecordFile
from data_prep.common.transfer import Remote

SOURCE, FOLDER = "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain/resolve/main/", "LLaVA-Pretrain"
JSON, RECORDS = "blip_laion_cc_sbu_558k.json", 558_128


def pictures(folder: str) -> Archive:
    """The archive of the pictures, unpacked in `folder`/images; its members are 00000/000000010.jpg, ..."""
    remote = Remote(f"{SOURCE}images.zip", f"{folder}/images.zip", about=27_400_000_000)
    return Archive(remote, f"{folder}/images", f"{folder}/images", RECORDS)


DATASET = Dataset(
    name="llava_pretrain",
    document=__doc__,
    parts={
        "annotations": [Remote(SOURCE + JSON, f"{FOLDER}/{JSON}", about=181_000_000)],
        "images": [pictures(FOLDER)],
    },
    records=[RecordFile(f"{FOLDER}/{JSON}", RECORDS, f"{FOLDER}/images", part="annotations")],
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `Dataset.main`."""
    return DATASET.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
