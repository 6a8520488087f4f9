"""What a prepared set is made of: samples, tokens, pictures and share of each source, lengths, what was cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from llava_train.data.preparing.prepared import PreparedSet
from llava_train.data.records.formats import FORMATS

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_LONGEST = 10


def statistics(prepared: PreparedSet) -> dict[str, Any]:
    """Totals and lengths in tokens, the same of each source, and the longest records.

    `share` is a source's part of all tokens. Lengths are those of `max_length` after truncation.
    """
    lengths, supervised = prepared.lengths, prepared.supervised
    truncated = prepared.column("truncated")
    pictures, rejected = prepared.counts("images"), prepared.counts("rejected_input_ids")
    total = int(lengths.sum())
    per_source = []
    for number in range(len(prepared.info["sources"])):
        rows = prepared.rows_of_source(number)
        tokens = int(lengths[rows].sum())
        per_source.append(
            {
                "samples": len(rows),
                "tokens": tokens,
                "supervised_tokens": int(supervised[rows].sum()),
                "images": int(pictures[rows].sum()),
                "pairs": int((rejected[rows] > 0).sum()),
                "share": tokens / total,
                "truncated_samples": int((truncated[rows] > 0).sum()),
            }
        )
    longest = np.argsort(-lengths, kind="stable")[:_LONGEST].tolist()
    return {
        "tokens": total,
        "supervised_tokens": int(supervised.sum()),
        "images": int(pictures.sum()),
        "mean_length": float(lengths.mean()),
        "longest": int(lengths.max()),
        "length_quantiles": {str(q): int(np.quantile(lengths, q, method="nearest")) for q in _QUANTILES},
        "truncated_samples": int((truncated > 0).sum()),
        "truncated_tokens": int(truncated.sum()),
        "longest_records": [
            {"id": prepared.values(row)["id"], "place": prepared.place(row), "tokens": int(lengths[row])}
            for row in longest
        ],
        "by_source": per_source,
    }


def composition_table(info: dict[str, Any]) -> str:
    """The composition for a terminal, a line a source."""
    rows = [("source", "taken for", "samples", "tokens", "supervised", "images", "share", "skipped")]
    for source in info["sources"]:
        rows.append(
            (
                source["name"],
                FORMATS[source["format"]].title,
                f"{source['samples']:,}",
                f"{source['tokens']:,}",
                f"{source['supervised_tokens']:,}",
                f"{source['images']:,}",
                f"{source['share']:.1%}",
                _counted(source["skipped"]),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    notes = _counted(sum((Counter(source["notes"]) for source in info["sources"]), start=Counter()))
    quantiles = ", ".join(f"{float(q):.0%} {length:,}" for q, length in info["length_quantiles"].items())
    lines.append(f"lengths in tokens: {quantiles}; {info['truncated_samples']:,} samples truncated")
    return "\n".join([*lines, *([f"pictures noted: {notes}"] if notes != "none" else [])])


def epoch_line(epoch: list[dict[str, Any]]) -> str:
    """What an epoch is made of, after `cap`, `repeat` and `weight`."""
    parts = [f"{part['source']} {part['samples']:,} ({part['share']:.1%} of tokens)" for part in epoch]
    return "an epoch: " + ", ".join(parts)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {cause}" for cause, count in counts.items()) or "none"
