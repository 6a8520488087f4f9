"""Export a model: write the target's folder, prove it, and only then give it its name."""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava_train.errors import ExportError
from llava_train.exporters.backends import readers, written
from llava_train.exporters.card import CARD, card
from llava_train.exporters.held_out import HeldOut, cost, find, measure
from llava_train.exporters.quantize import difference, to_precision
from llava_train.exporters.table import TARGETS, fitting
from llava_train.exporters.target import Request, Target
from llava_train.exporters.verify import reference_of
from llava_train.files import atomic_folder, ensure_space, read_json, sha256_file, sweep, write_json
from llava_train.model.assemble import Assembly
from llava_train.model.checkpoint import load_model, merged
from llava_train.model.stock import REPORT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(
    model: str | Path,
    out: str | Path,
    to: str = "hf",
    dtype: str = "bfloat16",
    overwrite: bool = False,
    quantize: str | None = None,
    held_out: str | Path | None = None,
    image_root: str | Path | None = None,
) -> Path:
    """Write a model folder in the layout `to`, verified, with a model card and `export_report.json`.

    Args:
        model: a run, a model folder of ours, or a published one that we know.
        out: folder to make; an existing one is refused unless `overwrite`.
        to: name of the target.
        dtype: precision of the weights written.
        quantize: `int8` or `int4` for the language model's linear layers, where the target can. What that costs is
            measured on held-out records.
        held_out: those records; by default what a run held out itself.
        image_root: folder that their image paths start from; that of `held_out` by default.

    Raises:
        ExportError: the target cannot carry the model, or the check failed (nothing is left behind).
        DataError: a held-out record that cannot be used.
    """
    target, folder = TARGETS[to], Path(out)
    request = _request(to, target, dtype, quantize)
    if folder.exists() and not overwrite:
        raise ExportError(f"{folder}: exists; choose another folder, or --overwrite to replace it")
    if held_out is not None and quantize is None:
        raise ExportError("--held-out: measures what --quantize costs; give both, or see `llava-train evaluate`")
    held = find(model, held_out, image_root) if quantize else ""
    with tqdm(total=4, desc="load", unit="step", leave=False) as bar:
        assembly = load_model(model)
        if target.merges:
            assembly = merged(assembly)
        _require_fit(to, target, assembly)
        _next(bar, "ask the model")
        reference = reference_of(assembly)
        facts = written(assembly, to, request)
        before = measure(assembly, held) if isinstance(held, HeldOut) else None
        to_precision(assembly.model, request.dtype)
        size = sum(p.numel() * p.element_size() for p in assembly.model.parameters())
        ensure_space(folder, size + 20_000_000, "the export")
        sweep(folder.parent, name=f"{glob.escape(folder.name)}.*")
        with atomic_folder(folder) as temporary:
            _next(bar, "write")
            target.write(assembly, temporary, request)
            _next(bar, "prove")
            report: dict[str, Any] = {"target": to, "dtype": dtype, "quantize": quantize}
            if quantize is None:
                report |= target.prove(reference, temporary, request)
            else:
                rounded = reference_of(assembly)
                report |= target.prove(rounded, temporary, request)
                report["rounding"] = difference(reference, rounded)
                report |= cost(assembly, held, before)
            facts = replace(facts, whole_modules=bool(report.get("modules_to_save")))
            report["back_ends"] = readers(facts, folder.name)
            text = card(folder.absolute().name, model, assembly.spec, report)
            (temporary / CARD).write_text(text, encoding="utf-8")
            write_json(temporary / REPORT, {**report, "model": assembly.spec.to_dict(), "files": _digests(temporary)})
            _next(bar, "done")
    return folder


def _request(to: str, target: Target, dtype: str, quantize: str | None) -> Request:
    if dtype not in DTYPES:
        raise ExportError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if quantize is not None and quantize not in target.quantizes:
        can = ", ".join(name for name in TARGETS if quantize in TARGETS[name].quantizes) or "none"
        raise ExportError(f"target {to!r} cannot be written in {quantize!r}; targets that can: {can}")
    return Request(DTYPES[dtype], quantize)


def _require_fit(to: str, target: Target, assembly: Assembly) -> None:
    why = target.refusal(assembly)
    if why is not None:
        can = ", ".join(fitting(assembly)) or "none"
        raise ExportError(f"target {to!r} cannot carry this model: {why}; targets that can: {can}")


def _next(bar: Any, what: str) -> None:
    bar.update()
    bar.set_description(what)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def said(folder: Path) -> str:
    """What an export's report comes down to: its proof, what rounding cost, and who reads it by which command."""
    report = read_json(folder / REPORT)
    worst = max(report["max_logit_difference"].values(), default=0.0)
    lines = [f"{report['loaded_with']}: logits differ by at most {worst:.1e}"]
    held_out = report.get("held_out")
    if held_out:
        figures = f"{held_out['before']:.4g} -> {held_out['after']:.4g}"
        lines.append(f"{report['quantize']}: {held_out['metric']} {figures} on {held_out['records']} held-out records")
    elif report["quantize"]:
        lines.append(f"{report['quantize']}: not measured: {report['held_out_reason']}")
    for row in report["back_ends"]:
        lines.append(f"  {row['name']}: {row['command']}" if "command" in row else f"  not {row['name']}: {row['why']}")
    return "\n".join([*lines, *(f"  note: {note}" for note in report.get("notes", []))])
