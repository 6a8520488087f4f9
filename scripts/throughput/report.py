"""Figures of a benchmark: medians, ratios within a turn, one flat JSON."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from throughput.measure import Timing

RATIOS = {
    "ratio_trainer": ("instructions", "ours_grouped", "trainer"),
    "ratio_trainer_grouped": ("instructions", "ours_grouped", "trainer_grouped"),
    "ratio_trl": ("instructions", "ours_grouped", "trl"),
    "ratio_trainer_default": ("instructions", "ours", "trainer"),
    "ratio_trainer_without_sharing": ("instructions_single", "ours", "trainer"),
    "ratio_trainer_grouped_without_sharing": ("instructions_single", "ours", "trainer_grouped"),
    "ratio_trainer_captions": ("captions", "ours", "trainer"),
    "ratio_trl_captions": ("captions", "ours", "trl"),
}
"""Key -> data, side of ours, peer: samples a second of ours divided by the peer's."""
MEMORY = {
    "memory_ratio": ("instructions", "ours_grouped", "trainer"),
    "memory_ratio_captions": ("captions", "ours", "trainer"),
}
"""Key -> the same: peak memory of ours divided by the peer's."""


def ratios(timings: Sequence[Timing], model: str) -> dict[str, float | None]:
    """Every ratio of a model, the median over turns; None where a side was not measured."""
    found: dict[str, float | None] = {}
    for keys, value in ((RATIOS, "samples_per_second"), (MEMORY, "peak_mb")):
        for key, (data, own, peer) in keys.items():
            pairs = zip(_turns(timings, model, data, own, value), _turns(timings, model, data, peer, value))
            each = [a / b for a, b in pairs]
            found[key] = round(median(each), 3) if each else None
    return found


def _turns(timings: Sequence[Timing], model: str, data: str, side: str, value: str) -> list[float]:
    return [getattr(t, value) for t in timings if (t.model, t.data, t.side) == (model, data, side)]


def summary(timings: Sequence[Timing], models: Sequence[str]) -> dict[str, Any]:
    """Ratios of the first model by their names, those of the others with `_<model>` behind."""
    first, *others = models
    flat: dict[str, Any] = ratios(timings, first)
    for other in others:
        flat |= {f"{key}_{other}": value for key, value in ratios(timings, other).items()}
    return flat


def medians(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """A row for each model, data and side, in the order they were measured."""
    rows = []
    for model, data, side in dict.fromkeys((t.model, t.data, t.side) for t in timings):
        rates = _turns(timings, model, data, side, "samples_per_second")
        rows.append(
            {
                "model": model,
                "data": data,
                "side": side,
                "samples_per_second": round(median(rates), 3),
                "slowest": round(min(rates), 3),
                "fastest": round(max(rates), 3),
                "peak_mb": round(median(_turns(timings, model, data, side, "peak_mb"))),
                "turns": len(rates),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a terminal, each with its speed as a multiple of `trainer`'s."""
    base = {(row["model"], row["data"]): row["samples_per_second"] for row in rows if row["side"] == "trainer"}
    lines = [f"{'model':14}{'data':21}{'side':21}{'samples/s':>10}{'(range)':>18}{'x trainer':>11}{'peak MB':>9}"]
    for row in rows:
        reference = base.get((row["model"], row["data"]))
        times = f"{row['samples_per_second'] / reference:.2f}" if reference else "-"
        span = f"{row['slowest']:.2f}..{row['fastest']:.2f}"
        lines.append(
            f"{row['model']:14}{row['data']:21}{row['side']:21}{row['samples_per_second']:10.2f}{span:>18}"
            f"{times:>11}{row['peak_mb']:9}"
        )
    return "\n".join(lines)
