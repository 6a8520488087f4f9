"""Export a model: write the target's folder, prove it, and only then give it its name."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_train.errors import ExportError
from llava_train.exporters import huggingface  # noqa: F401  (registers its target)
from llava_train.exporters.registry import TARGETS
from llava_train.exporters.verify import verify
from llava_train.files import atomic_folder, ensure_space, sha256_file, write_json
from llava_train.model.checkpoint import load_model, merged

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPORT = "export_report.json"


def export(
    model: str | Path, out: str | Path, to: str = "hf", dtype: str = "bfloat16", overwrite: bool = False
) -> Path:
    """Write a model folder in the layout `to`, verified.

    Args:
        model: a run, a model folder of ours, or a stock Llava folder.
        out: folder to make; an existing one is refused unless `overwrite`.
        to: name of the target.
        dtype: precision of the weights written.

    Raises:
        ExportError: the target cannot carry the model, or the check failed (nothing is left behind).
    """
    write = TARGETS[to]
    if dtype not in DTYPES:
        raise ExportError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    folder = Path(out)
    if folder.exists() and not overwrite:
        raise ExportError(f"{folder}: exists; choose another folder, or --overwrite to replace it")
    assembly = merged(load_model(model))
    assembly.model.to(DTYPES[dtype])
    size = sum(p.numel() * p.element_size() for p in assembly.model.parameters())
    ensure_space(folder, size + 20_000_000, "the export")
    with atomic_folder(folder) as temporary:
        write(assembly, temporary)
        report = verify(assembly, temporary)
        files = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / REPORT, {"target": to, **report, "model": assembly.spec.to_dict(), "files": files})
    return folder
