"""The proof of a folder in the original layout: our importer loads it in a fresh process.

The original code itself cannot be installed beside a current transformers (it pins version 4.37), so its reader here is
`llava_train.model.originals`, which reproduces the original's losses and gradients. The fresh process also exports
what it loaded once more and compares tensor by tensor: import and export are inverse to each other, bit for bit.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_train.exporters.verify import Asked, Reference, answers_of, compare


def prove(reference: Reference, folder: Path, tolerance: float) -> dict[str, Any]:
    """What the report says of a folder that our importer loads. Raises ExportError naming what differs.

    Columns of logits that belong to rows that an import draws (`<image>` and what pads the vocabulary) are left out
    where they are another draw than the model's.
    """

    def command(picture: Path, out: Path) -> list[str]:
        return [sys.executable, "-m", "llava_train.exporters.original.probe", str(folder.absolute()), str(out)]

    said, found = answers_of(command, reference.image, "the export cannot be imported again")
    columns = said["columns"]
    kept = {name: _first(asked, columns) for name, asked in reference.asked.items()}
    faults = [f"not the same after import and export: {', '.join(said['differing'][:10])}"] if said["differing"] else []
    if said["class"] != reference.model_class:
        faults.append(f"it is loaded as a {said['class']}, not a {reference.model_class}")
    report = compare(replace(reference, asked=kept), found, tolerance, faults)
    loaded = f"llava_train's importer of the original layout, in a fresh process: {said['class']}"
    return {**report, "same_after_import": said["compared"], "logit_columns": columns, "loaded_with": loaded}


def _first(asked: Asked, columns: int) -> Asked:
    return replace(asked, logits=asked.logits[:, :columns], steps=asked.steps[:, :columns])
