"""Export a model: write the target's folder, prove it, and only then give it its name."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from llava_train.errors import ExportError, StorageError
from llava_train.exporters.backends import facts_of, readers
from llava_train.exporters.card import CARD, card, shown_source
from llava_train.exporters.held_out import HeldOut, cost, find, measure
from llava_train.exporters.quantize import difference, to_precision
from llava_train.exporters.table import TARGETS
from llava_train.exporters.target import Request, Target
from llava_train.exporters.verify import Reference, reference_of
from llava_train.files import atomic_folder, ensure_space, read_json, sha256_file, storage_faults, sweep, write_json
from llava_train.model.assemble import Assembly
from llava_train.model.checkpoint import load_model, merged
from llava_train.model.spec import ModelSpec
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
        out: folder to make; an existing one is refused unless `overwrite`, which replaces an export (or an empty
            folder) and nothing else.
        to: name of the target.
        dtype: precision of the weights written.
        quantize: `int8` or `int4` for the language model's linear layers, where the target can. What that costs is
            measured on held-out records.
        held_out: those records; by default what a run held out itself.
        image_root: folder that their image paths start from; that of `held_out` by default.

    Raises:
        ExportError: the target cannot carry the model, or the check failed (nothing is left behind).
        DataError: a held-out record that cannot be used.
        StorageError: no room, or no right to write.
    """
    target, folder = TARGETS[to], Path(out)
    request = _request(to, target, dtype, quantize)
    _require_replaceable(folder, Path(model), overwrite)
    if (held_out or image_root) and quantize is None:
        raise ExportError("--held-out and --image-root are for --quantize; `llava-train evaluate` measures a model")
    if image_root and not held_out:
        raise ExportError("--image-root: is for --held-out, which is not given")
    held = find(model, held_out, image_root) if quantize else ""
    with tqdm(total=4, desc="load", unit="step", leave=False) as bar:
        assembly = _loaded(model, to, target)
        _next(bar, "ask the model")
        reference = reference_of(assembly)
        before = measure(assembly, held) if isinstance(held, HeldOut) else None
        facts = facts_of(assembly, to, request)
        to_precision(assembly.model, request.dtype)
        size = sum(p.numel() * p.element_size() for p in assembly.model.parameters())
        ensure_space(folder, size + 20_000_000, "the export")
        sweep(folder.parent, name=f"{glob.escape(folder.name)}.*")
        with storage_faults(folder, size), atomic_folder(folder) as temporary:
            _next(bar, "write")
            _write(target, assembly, temporary, request, folder)
            _next(bar, "prove")
            report: dict[str, Any] = {"target": to, "dtype": dtype, "quantize": quantize}
            report |= _proof(target, assembly, reference, temporary, request)
            report |= cost(assembly, held, before) if quantize else {}
            facts = replace(facts, whole_modules=bool(report.get("modules_to_save")))
            report["back_ends"] = readers(facts, folder.name)
            _finish(temporary, card(folder.absolute().name, model, assembly.spec, report), report, assembly.spec)
            _next(bar, "done")
    return folder


def _request(to: str, target: Target, dtype: str, quantize: str | None) -> Request:
    if dtype not in DTYPES:
        raise ExportError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if quantize is not None and quantize not in target.quantizes:
        can = ", ".join(name for name in TARGETS if quantize in TARGETS[name].quantizes) or "none"
        raise ExportError(f"target {to!r} cannot be written in {quantize!r}; targets that can: {can}")
    request = Request(DTYPES[dtype], quantize)
    missing = target.missing(request)
    if missing:
        raise ExportError(missing)
    return request


def _require_replaceable(folder: Path, model: Path, overwrite: bool) -> None:
    """ExportError for a folder that is there, unless it may be replaced: exports alone, and never what is exported."""
    if not folder.exists():
        return
    if not overwrite:
        raise ExportError(f"{folder}: exists; choose another folder, or --overwrite to replace it")
    if not folder.is_dir() or not ((folder / REPORT).is_file() or not any(folder.iterdir())):
        raise ExportError(f"{folder}: is no export, and --overwrite replaces exports alone; choose another folder")
    if model.exists() and model.resolve().is_relative_to(folder.resolve()):
        raise ExportError(f"{folder}: holds what is exported; choose another folder")


def _loaded(model: str | Path, to: str, target: Target) -> Assembly:
    """The model as the target takes it. ExportError, with the targets that can carry the model, if it cannot."""
    assembly = load_model(model)
    keeping = _fitting(assembly, merges=False)  # asked before adapters are folded in
    if target.merges:
        assembly = merged(assembly)
    why = target.refusal(assembly)
    if why is None:
        return assembly
    can = {*keeping, *_fitting(merged(assembly), merges=True)}
    names = ", ".join(name for name in TARGETS if name in can) or "none"
    raise ExportError(f"target {to!r} cannot carry this model: {why}; targets that can: {names}")


def _fitting(assembly: Assembly, merges: bool) -> Sequence[str]:
    rows = {name: TARGETS[name] for name in TARGETS}
    return [name for name, row in rows.items() if row.merges is merges and row.refusal(assembly) is None]


def _write(target: Target, assembly: Assembly, temporary: Path, request: Request, folder: Path) -> None:
    try:
        target.write(assembly, temporary, request)
    except SafetensorError as error:  # what the disk refuses, in its words
        raise StorageError(f"{folder}: cannot be written: {error}") from error


def _proof(
    target: Target, assembly: Assembly, reference: Reference, temporary: Path, request: Request
) -> dict[str, Any]:
    """What the report says; of a quantised model against what it became, and how far that is from what it was."""
    if request.quantize is None:
        return target.prove(reference, temporary, request)
    rounded = reference_of(assembly)
    return {**target.prove(rounded, temporary, request), "rounding": difference(reference, rounded)}


def _finish(folder: Path, text: str, report: dict[str, Any], spec: ModelSpec) -> None:
    """Write card and report, without a path of this machine, and let everybody read all files who may read those."""
    (folder / CARD).write_text(text, encoding="utf-8")
    mode = (folder / CARD).stat().st_mode
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        path.chmod(mode)  # safetensors writes for the owner alone
    model = spec.to_dict()
    for part in ("vision", "llm"):
        paths = model[part]["path"]
        model[part]["path"] = shown_source(paths) if isinstance(paths, str) else [shown_source(each) for each in paths]
    model["history"] = [shown_source(each) for each in model["history"]]
    digests = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    write_json(folder / REPORT, {**report, "model": model, "files": digests})


def _next(bar: Any, what: str) -> None:
    bar.update()
    bar.set_description(what)


def said(folder: Path) -> str:
    """What an export's report comes down to: its proof, what rounding cost, and who reads it by which command."""
    report = read_json(folder / REPORT)
    of = "the same model rounded alike" if report["quantize"] else "the model"
    worst = max(report["max_logit_difference"].values(), default=0.0)
    lines = [f"{report['loaded_with']}: logits differ from those of {of} by at most {worst:.1e}"]
    held_out = report.get("held_out")
    if held_out:
        figures = f"{held_out['before']:.4g} -> {held_out['after']:.4g}"
        lines.append(f"{report['quantize']}: {held_out['metric']} {figures} on {held_out['records']} held-out records")
    elif report["quantize"]:
        lines.append(f"{report['quantize']}: not measured: {report['held_out_reason']}")
    lines.append(f"who reads it (commands from {folder.absolute().parent}):")
    for row in report["back_ends"]:
        lines.append(f"  {row['name']}: {row['command']}" if "command" in row else f"  not {row['name']}: {row['why']}")
    return "\n".join([*lines, *(f"  note: {note}" for note in report.get("notes", []))])
