"""LLaVA-1.5 mix665k: 665,298 conversations over COCO, GQA, OCR-VQA, TextVQA, Visual Genome and none.

    python -m data_prep.llava_mix665k --out data                    # all of it
    python -m data_prep.llava_mix665k --out data --only annotations,coco

* What: the instruction data of LLaVA-1.5's stage 2 (configs/llava-1.5/*-stage2*.yaml).
* From: https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K and the sets in data_prep/common/image_sets.py.
* Licence: CC-BY-4.0 and OpenAI's terms of use; the pictures as data_prep/common/image_sets.py says.
* Size: 67 GB to download (1.03 GB of it JSON), as much again on disk while it is unpacked.
* Expected: 665,298 records: COCO 364,100, Visual Genome 86,417, OCR-VQA 80,000, GQA 72,140, TextVQA 21,953,
  without a picture 40,688 (haotian-liu/LLaVA, issue 657); the pictures as data_prep/common/image_sets.py says.
* OCR-VQA: most links to its pictures are dead. `ocr_vqa_hub` takes them from a copy that was made in time
  (https://huggingface.co/datasets/howard-hou/OCR-VQA), `ocr_vqa_links` tries the links of those still lacking
  (`--limit N`: at most N). The dead are counted, and listed in `DIR/ocr_vqa/missing.jsonl`; whatever came (GIF,
  PNG) becomes a JPEG, as its name says.
* Writes `DIR/llava_v1_5_mix665k.json` as published, `DIR/llava_v1_5_mix665k_available.json` with the records
  whose pictures are there (train on this one), and the folders of the pictures.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_prep.common.command import Dataset, Job, needed
from data_prep.common.image_sets import (
    COCO,
    GQA,
    OCR_VQA,
    OCR_VQA_HUB,
    TEXTVQA,
    VISUAL_GENOME,
    fetch_ocr_vqa,
    take_ocr_vqa,
)
from data_prep.common.records import RecordFile, pictures_of, read_array, write_available
from data_prep.common.transfer import Remote

JSON, AVAILABLE = "llava_v1_5_mix665k.json", "llava_v1_5_mix665k_available.json"
SOURCE = f"https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/{JSON}"

BOOKS = {"ocr_vqa_hub": take_ocr_vqa, "ocr_vqa_links": fetch_ocr_vqa}


def convert(job: Job) -> None:
    """Fetch OCR-VQA's pictures, then write down which records can be used."""
    path = job.out / JSON
    books = [obtain for part, obtain in BOOKS.items() if part in job.parts]
    if books:
        names = {name for record in read_array(needed(path)) for name in pictures_of(record)}
        for obtain in books:
            obtain(job, {name for name in names if name.startswith("ocr_vqa/")})
    if path.is_file():
        write_available(path, job.out)


DATASET = Dataset(
    name="llava_mix665k",
    document=__doc__,
    parts={
        "annotations": [Remote(SOURCE, JSON, about=1_030_000_000)],
        "coco": [COCO],
        "gqa": [GQA],
        "textvqa": [TEXTVQA],
        "vg": VISUAL_GENOME,
        "ocr_vqa_hub": [OCR_VQA_HUB],
        "ocr_vqa_links": [OCR_VQA],
    },
    records=[
        RecordFile(JSON, 665_298, complete=False, part="annotations"),
        RecordFile(AVAILABLE, part="annotations"),
    ],
    convert=convert,
    limit="links of OCR-VQA",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `Dataset.main`."""
    return DATASET.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
