"""Figures of all cases -> utilisation, lines for the reader, and the summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpu.shapes import STAGES

Results = Mapping[str, Mapping[str, Any]]
"""What the JSON has under `cases`, by name"""


def utilisation(figures: Mapping[str, Any], device: Mapping[str, Any]) -> dict[str, float | None]:
    """Model FLOPs utilisation: FLOPs needed a second over the peak, the measured one and that of the data sheet."""
    needed = figures.get("needed_tflops")

    def share(peak: float | None) -> float | None:
        return needed / peak if needed is not None and peak else None

    return {"mfu": share(device.get("peak_tflops")), "mfu_of_sheet": share(device.get("sheet_tflops"))}


def line(name: str, result: Mapping[str, Any]) -> str:
    """One line about a case."""
    if "verdict" in result:
        return f"{name:28} {result['status']}: {result['verdict'][:600]}"
    if "torch" in result:
        product = f"{result['peak_tflops']:.3g} TFLOP/s on a product" if "peak_tflops" in result else last_line(result)
        return f"{name:28} {result['device']}: {product}; torch {result['torch']}"
    if "needed_tflops" not in result:
        return f"{name:28} {result['status']}: {last_line(result)}"
    mfu, memory, stall = result["mfu"], result.get("peak_memory_gb"), result["stall"]
    settings = result["settings"]
    shown = {
        key: settings[key]
        for key in ("micro_batch_tokens", "micro_batch", "attention", "recompute", "layers")
        if key in settings
    }
    return (
        f"{name:28} {result['samples_per_second']:8.2f} samples/s {result['tokens_per_second']:9.0f} tokens/s "
        f"MFU {'?' if mfu is None else f'{mfu:.1%}'} {'?' if memory is None else f'{memory:.1f}'} GB "
        f"stall {'?' if stall is None else f'{stall:.1%}'} padding {result['padding']:.1%} {shown}"
        + (f" ({result['status']})" if result["status"] != "done" else "")
    )


def last_line(result: Mapping[str, Any]) -> str:
    """Of a case's error, what Python says last."""
    return (str(result["error"]).strip().splitlines() or [""])[-1][:600]


def summary(results: Results, skipped: list[str], device: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The last line: each stage with its target, what was not equal, what failed and what was left out."""
    measured = {name: result for name, result in results.items() if "needed_tflops" in result}
    checks = {
        name: result.get("verdict", last_line(result))
        + ("" if result["status"] == "done" else f" ({result['status']})")
        for name, result in results.items()
        if "equality" in name
    }
    failed = {
        name: last_line(result) for name, result in results.items() if result["status"] in ("error", "out of memory")
    }
    return {
        **{key: device.get(key) for key in ("device", "torch", "peak_tflops", "sheet_tflops")},
        **{name: stage_summary(name, measured) for name in STAGES},
        "equality": checks,
        "failed": failed,
        "skipped": skipped,
        "seconds": round(seconds),
    }


def stage_summary(stage: str, measured: Results) -> dict[str, Any]:
    """Ours against the target and against the Trainer; ratios are of needed FLOPs a second, on the same model.

    The Trainer as published recomputes every activation; `ratio_best` is of the fastest of each side. A ratio is null
    where either is missing, or the sides had different numbers of layers.
    """
    target = STAGES[stage].target
    sides = {
        side: {
            name: result
            for name, result in measured.items()
            if name.startswith(f"{stage}/{side}") and not result["settings"].get("shared")
        }
        for side in ("ours", "trainer")
    }
    ours = sides["ours"].get(f"{stage}/ours") or sides["ours"].get(f"{stage}/ours+flex_instead")
    if ours:  # the others of the same size
        layers = ours["settings"]["layers"]
        sides["ours"] = {name: of for name, of in sides["ours"].items() if of["settings"]["layers"] == layers}
    best = {side: max(of, key=lambda name: of[name]["needed_tflops"], default=None) for side, of in sides.items()}
    fastest = [sides[side].get(best[side]) for side in ("ours", "trainer")]
    mfus = [result["mfu"] for result in (ours, fastest[0]) if result and result["mfu"] is not None]
    return {
        "target": target,
        "mfu": ours["mfu"] if ours else None,
        "met": max(mfus) >= target if mfus else None,
        "samples_per_second": ours["samples_per_second"] if ours else None,
        "tokens_per_second": ours["tokens_per_second"] if ours else None,
        "layers": ours["settings"]["layers"] if ours else None,
        "best": best["ours"],
        "best_mfu": fastest[0]["mfu"] if fastest[0] else None,
        "trainer_samples_per_second": _of(measured.get(f"{stage}/trainer"), "samples_per_second"),
        "trainer_mfu": _of(measured.get(f"{stage}/trainer"), "mfu"),
        "ratio": _ratio(ours, measured.get(f"{stage}/trainer")),
        "ratio_best": _ratio(*fastest),
    }


def _of(result: Mapping[str, Any] | None, key: str) -> Any:
    return result[key] if result else None


def _ratio(ours: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> float | None:
    if not ours or not other or ours["settings"]["layers"] != other["settings"]["layers"]:
        return None
    return float(ours["needed_tflops"] / other["needed_tflops"])
