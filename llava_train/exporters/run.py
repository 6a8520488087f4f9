"""Export a model: write the target's folder, prove it, and only then give it its name."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_train.errors import ExportError
from llava_train.exporters.table import TARGETS, fitting
from llava_train.exporters.target import Request, Target
from llava_train.exporters.verify import reference_of
from llava_train.files import atomic_folder, ensure_space, sha256_file, write_json
from llava_train.model.assemble import Assembly
from llava_train.model.checkpoint import load_model, merged

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPORT = "export_report.json"


def export(
    model: str | Path,
    out: str | Path,
    to: str = "hf",
    dtype: str = "bfloat16",
    overwrite: bool = False,
    quantize: str | None = None,
) -> Path:
    """Write a model folder in the layout `to`, verified.

    Args:
        model: a run, a model folder of ours, or a published one that we know.
        out: folder to make; an existing one is refused unless `overwrite`.
        to: name of the target.
        dtype: precision of the weights written.
        quantize: `int8` or `int4` for the language model's linear layers, where the target can.

    Raises:
        ExportError: the target cannot carry the model, or the check failed (nothing is left behind).
    """
    target, folder = TARGETS[to], Path(out)
    if dtype not in DTYPES:
        raise ExportError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if quantize is not None and quantize not in target.quantizes:
        can = [name for name in TARGETS if quantize in TARGETS[name].quantizes]
        raise ExportError(
            f"target {to!r} cannot be written in {quantize}; targets that can: {', '.join(can) or 'none'}"
        )
    if folder.exists() and not overwrite:
        raise ExportError(f"{folder}: exists; choose another folder, or --overwrite to replace it")
    request = Request(DTYPES[dtype], quantize)
    assembly = load_model(model)
    if target.merges:
        assembly = merged(assembly)
    _require_fit(to, target, assembly)
    reference = reference_of(assembly)
    assembly.model.to(request.dtype)
    size = sum(p.numel() * p.element_size() for p in assembly.model.parameters())
    ensure_space(folder, size + 20_000_000, "the export")
    with atomic_folder(folder) as temporary:
        target.write(assembly, temporary, request)
        report = target.prove(reference, temporary, request)
        files = {
            str(path.relative_to(temporary)): sha256_file(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        own = {"target": to, "dtype": dtype, "quantize": quantize, **report}
        write_json(temporary / REPORT, {**own, "model": assembly.spec.to_dict(), "files": files})
    return folder


def _require_fit(to: str, target: Target, assembly: Assembly) -> None:
    why = target.refusal(assembly)
    if why is not None:
        can = ", ".join(fitting(assembly)) or "none"
        raise ExportError(f"target {to!r} cannot carry this model: {why}; targets that can: {can}")
