"""LLaVA-Instruct-150K: 157,712 conversations, descriptions and inferences about COCO pictures, by GPT-4.

    python -m data_prep.llava_instruct_150k --out data

* What: the instruction data of LLaVA v1 (configs/llava-v1/7b-stage2.yaml), with COCO train2017.
* From: https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K, http://images.cocodataset.org
* Licence: CC-BY-4.0 and OpenAI's terms of use; the pictures: Flickr's terms.
* Size: 19.5 GB to download (229 MB of it JSON), as much again on disk while it is unpacked.
* Expected: 157,712 records (haotian-liu/LLaVA, issue 702), 118,287 pictures.
* Writes `DIR/llava_instruct_158k.json` (as the original's training scripts call what is published as
  llava_instruct_150k.json) and `DIR/coco/train2017/`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_prep.common.command import Dataset
from data_prep.common.image_sets import COCO
from data_prep.common.records import RecordFile
from data_prep.common.transfer import Remote

SOURCE = "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_instruct_150k.json"
JSON = "llava_instruct_158k.json"
DATASET = Dataset(
    name="llava_instruct_150k",
    document=__doc__,
    parts={"annotations": [Remote(SOURCE, JSON, about=229_000_000)], "coco": [COCO]},
    records=[RecordFile(JSON, 157_712, COCO.holds, part="annotations")],
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `Dataset.main`."""
    return DATASET.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
