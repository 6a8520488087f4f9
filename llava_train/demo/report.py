"""The demo's `report.html`: loss curves, ten test pictures with question, answer and truth. One file, no network."""

from __future__ import annotations

import base64
import html
import random
from pathlib import Path
from typing import Any

from llava_train.training.monitor import METRICS, plot_losses, read_rows

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>llava_train demo</title>
<style>
body {{ font-family: system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }} th {{ text-align: left; padding-right: 2rem; font-weight: 500 }}
td {{ font-variant-numeric: tabular-nums }} img.loss {{ max-width: 100% }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem }}
.card {{ border: 1px solid #ddd; border-radius: 6px; padding: .8rem }}
.card img {{ width: 128px; image-rendering: pixelated }}
.right {{ color: #15803d }} .wrong {{ color: #b91c1c }}
</style>
<h1>llava_train demo</h1>
<p>{accuracy:.2%} of {questions:,} questions about pictures never seen in training, answered exactly.
With the pictures shuffled among the questions: {shuffled:.2%}.
The best constant answer to each question text: {constant:.2%}.</p>
<h2>Loss</h2>{curves}
<h2>Ten test pictures</h2><div class="cards">{cards}</div>
<h2>All figures</h2><table>{rows}</table>
</html>
"""


def write_report(folder: Path, report: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    """Write `report.html` beside `report.json`; pictures are embedded, so the page can be sent as one file."""
    losses = {stage: read_rows(folder / stage / METRICS) for stage in ("stage1", "stage2")}
    drawn = plot_losses(losses, folder / "loss.png")
    curves = f'<img class="loss" src="{_embedded(folder / "loss.png")}" alt="loss curves">' if drawn else ""
    chosen = random.Random(1).sample(answers, min(10, len(answers)))
    page = _PAGE.format(
        accuracy=report["test_accuracy"],
        questions=report["test_questions"],
        shuffled=report["shuffled_accuracy"],
        constant=report["constant_accuracy"],
        curves=curves or "<p>Install matplotlib to see the curves here.</p>",
        cards="".join(_card(row) for row in chosen),
        rows="".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in report.items()),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def _card(row: dict[str, Any]) -> str:
    verdict = "right" if row["correct"] else "wrong"
    return (
        f'<div class="card"><img src="{_embedded(Path(row["image"]))}" alt="test picture">'
        f"<p>{html.escape(row['question'])}</p>"
        f'<p class="{verdict}">answer: <b>{html.escape(row["answer"])}</b></p>'
        f"<p>truth: {html.escape(row['truth'])}</p></div>"
    )


def _embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
