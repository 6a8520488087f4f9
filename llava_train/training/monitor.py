"""What a run says: a progress bar, `metrics.jsonl`, wandb or TensorBoard, and a picture of the loss."""

from __future__ import annotations

import html
import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_train.errors import RecipeError
from llava_train.files import write_whole
from llava_train.recipe import Recipe

METRICS = "metrics.jsonl"
CLOCK = ("seconds", "stall")
"""Keys of a row that differ between two runs that are the same."""


def say(message: str) -> None:
    """A line for the person watching, on stderr; ranks other than the first stay silent."""
    if int(os.environ.get("RANK", "0")) == 0:
        tqdm.write(message, file=sys.stderr)


class Monitor:
    """Writes one row a step. Only the main rank has one that is `active`."""

    def __init__(self, recipe: Recipe, folder: Path, total_steps: int, first_step: int, active: bool) -> None:
        self.folder, self.active = folder, active
        self._file = None
        self._trackers: list[Any] = []
        if not active:
            return
        keep_rows(folder / METRICS, first_step)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._bar = tqdm(
            total=total_steps, initial=first_step, desc=recipe.name, unit="step", dynamic_ncols=True, file=sys.stderr
        )
        self._trackers = _trackers(recipe, folder)

    def step(self, row: dict[str, Any]) -> None:
        """Report one training step."""
        self._write(row)
        if self.active:
            self._bar.update(1)
            self._bar.set_postfix(loss=f"{row['loss']:.4f}", lr=f"{row['learning_rate']:.2e}")

    def evaluation(self, row: dict[str, Any]) -> None:
        """Report a validation."""
        self._write(row)
        if self.active:
            say(f"step {row['step']}: validation loss {row['eval/loss']:.4f}")

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        values = {key: value for key, value in row.items() if key != "step" and isinstance(value, (int, float))}
        for tracker in self._trackers:
            tracker.log(values, step=row["step"])

    def sync(self) -> None:
        """Force the rows to the disk: a checkpoint that outlives a crash must find the rows before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the bar, the trackers and the file."""
        if self._file is not None:
            self._bar.close()
            self._file.close()
            for tracker in self._trackers:
                tracker.finish()


def _trackers(recipe: Recipe, folder: Path) -> list[Any]:
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    trackers: list[Any] = []
    try:
        if recipe.monitor.tensorboard:
            trackers.append(TensorBoardTracker(run_name="tensorboard", logging_dir=str(folder)))
            trackers[-1].start()
        if recipe.monitor.wandb:
            trackers.append(WandBTracker(run_name=recipe.monitor.wandb_project, dir=str(folder), name=recipe.name))
            trackers[-1].start()
            trackers[-1].store_init_configuration(recipe.to_dict())
    except ImportError as error:
        raise RecipeError(f"monitor: {error}; pip install 'llava-train[trackers]'") from error
    return trackers


def keep_rows(path: Path, first_step: int) -> None:
    """Drop the rows of steps that a resumed run will do again (those after `first_step`)."""
    if not path.exists():
        return
    rows = [row for row in read_rows(path) if row["step"] <= first_step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`; a last line cut by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def curves(rows: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Named (steps, values) of the training and the validation loss."""
    named: dict[str, tuple[list[int], list[float]]] = {}
    for key, label in (("loss", "training"), ("eval/loss", "validation")):
        chosen = [(row["step"], row[key]) for row in rows if key in row]
        if chosen:
            named[label] = ([step for step, _ in chosen], [value for _, value in chosen])
    return named


def plot_losses(runs: dict[str, list[dict[str, Any]]], path: Path) -> bool:
    """Draw the loss curves of named runs side by side as PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5.5 * len(runs), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (name, rows) in enumerate(runs.items(), 1):
        axes = figure.add_subplot(1, len(runs), index, title=name, xlabel="step", ylabel="loss")
        for label, (steps, values) in curves(rows).items():
            axes.plot(steps, values, label=label, marker="o" if label == "validation" else None, linewidth=1)
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return True


def write_run_report(folder: Path, recipe: Recipe) -> None:
    """`loss.png` and `report.html` of one run."""
    rows = read_rows(folder / METRICS)
    drawn = plot_losses({recipe.name: rows}, folder / "loss.png")
    picture = '<img src="loss.png" alt="loss curves">' if drawn else "<p>Install matplotlib for loss curves.</p>"
    last = {key: value for row in rows for key, value in row.items()}
    table = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in last.items())
    (folder / "report.html").write_text(
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(recipe.name)}</title>"
        "<style>body{font-family:system-ui;max-width:60rem;margin:2rem auto}th{text-align:left;padding-right:2rem}"
        "pre{background:#f4f4f4;padding:1rem;overflow:auto}img{max-width:100%}</style>"
        f"<h1>{html.escape(recipe.name)}</h1>{picture}<h2>Last values</h2><table>{table}</table>"
        f"<h2>Recipe</h2><pre>{html.escape(recipe.to_yaml())}</pre>\n",
        encoding="utf-8",
    )
