"""ShareGPT4V: long captions by GPT4-Vision (102K), by a captioner trained on them (1.2M), and their SFT mix.

    python -m data_prep.sharegpt4v --out data --only captions,coco

* What: `captions` 102,025 records; `pretrain` 1,246K for alignment; `sft` LLaVA's mix665k with 23K of its
  captions replaced. LLaVA JSON already.
* From: https://huggingface.co/datasets/Lin-Chen/ShareGPT4V; pictures: COCO train2017 (`coco`) and
  LLaVA-Pretrain's (`lcs`). For `sft` fetch GQA, OCR-VQA, TextVQA and Visual Genome with llava_mix665k.
* By hand: SAM's pictures (`DIR/sam/images`) are given on request; those of `web-celebrity`, `web-landmark`,
  `wikiart` and `share_textvqa` are in a Google Drive folder that the data set's page links to.
* Licence: CC-BY-NC-4.0 and OpenAI's terms of use; web pictures for academic use only.
* Size: 2.8 GB of JSON, 19.3 GB (`coco`), 27.4 GB (`lcs`).
* Expected: 102,025 records in `captions`; the exact counts of the other two are not verified.
* Writes `DIR/sharegpt4v/NAME.json` as published and `NAME_available.json` with the records whose pictures are
  there; `DIR/coco/train2017`, `DIR/llava/llava_pretrain/images`. If you have LLaVA-Pretrain below DIR, link
  it (`ln -s ../LLaVA-Pretrain DIR/llava/llava_pretrain`) and it is not fetched again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep import llava_pretrain
from data_prep.common.command import Dataset, Job
from data_prep.common.image_sets import COCO
from data_prep.common.records import RecordFile, available, write_available
from data_prep.common.transfer import Remote
from llava_train.files import inside

SOURCE = "https://huggingface.co/datasets/Lin-Chen/ShareGPT4V/resolve/main"
# part -> (file name without suffix, records or None, rounded bytes)
FILES: dict[str, tuple[str, int | None, int]] = {
    "captions": ("sharegpt4v_instruct_gpt4-vision_cap100k", 102_025, 134_000_000),
    "pretrain": ("share-captioner_coco_lcs_sam_1246k_1107", None, 1_500_000_000),
    "sft": ("sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k", None, 1_200_000_000),
}
REMOTES = {
    part: Remote(f"{SOURCE}/{stem}.json", f"sharegpt4v/{stem}.json", about=about)
    for part, (stem, _, about) in FILES.items()
}


def convert(job: Job) -> None:
    """Write down, for each record file that is there, which of its records can be used."""
    for remote in REMOTES.values():
        if (path := inside(job.out, remote.path)).is_file():
            write_available(path, job.out)


def _checked() -> list[RecordFile]:
    published = [RecordFile(remote.path, FILES[part][1], complete=False, part=part) for part, remote in REMOTES.items()]
    usable = [RecordFile(available(Path(remote.path)).as_posix(), part=part) for part, remote in REMOTES.items()]
    return published + usable


DATASET = Dataset(
    name="sharegpt4v",
    document=__doc__,
    parts={
        **{part: [remote] for part, remote in REMOTES.items()},
        "coco": [COCO],
        "lcs": [llava_pretrain.pictures("llava/llava_pretrain")],
    },
    records=_checked(),
    convert=convert,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `Dataset.main`."""
    return DATASET.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
