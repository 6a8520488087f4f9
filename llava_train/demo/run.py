"""The demo: both stages on easy-vqa with the tiny backbones of this package, then export, proof and evaluation."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from llava_train.demo import easy_vqa
from llava_train.demo.report import write_report
from llava_train.errors import DataError
from llava_train.evaluation.run import Evaluation, evaluate
from llava_train.exporters.run import export
from llava_train.files import ensure_space, read_json, write_json
from llava_train.model.checkpoint import load_model
from llava_train.model.stock import REPORT
from llava_train.recipe import load_recipe
from llava_train.training.monitor import METRICS, read_rows, say
from llava_train.training.run import train

_HERE = Path(__file__).parent
BACKBONES = _HERE / "backbones"
_DISK = 100_000_000


def run_demo(out: str | Path = "runs/demo", quick: bool = False) -> dict[str, Any]:
    """Train, export, check and evaluate; write `report.json` and `report.html` into `out`. Returns the report.

    `quick` trains a tenth of the steps and asks 512 test questions: a check of the road, not of its figures.
    """
    disable_progress_bar()  # transformers', one for every tiny file; ours stay
    folder = Path(out)
    ensure_space(folder, _DISK, "the demo")
    folder.mkdir(parents=True, exist_ok=True)
    _forget_finished(folder)
    seconds: dict[str, float] = {}
    share = 0.1 if quick else 1.0
    started = time.perf_counter()
    with _phase("data", "1/5  easy-vqa: 5,000 drawings, 48,248 questions (MIT)", seconds):
        data = write_data(folder / "data")
    with _phase("stage1", "2/5  stage 1: align the connector on captions", seconds):
        train_stage("stage1", folder, data["captions"], data["train_images"], share)
    with _phase("stage2", "3/5  stage 2: tune the LLM with LoRA on questions", seconds):
        train_stage("stage2", folder, data["questions"], data["train_images"], share)
    with _phase("export", "4/5  export for stock transformers, and prove it", seconds):
        exported = export(folder / "stage2", folder / "hf", dtype="float32", overwrite=True)
    with _phase("evaluation", "5/5  all questions of the test split, then with shuffled pictures", seconds):
        seen, shuffled = ask(exported, data, 512 if quick else None)
    seconds["total"] = time.perf_counter() - started
    report = _figures(folder, exported, seen, shuffled, seconds)
    write_json(folder / "report.json", report)
    write_report(folder, report, seen.rows)
    say(_summary(folder, report))
    return report


@contextmanager
def _phase(name: str, title: str, seconds: dict[str, float]) -> Iterator[None]:
    say(title)
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _forget_finished(folder: Path) -> None:
    """A demo that came to its end is made anew; an interrupted one goes on."""
    if (folder / "report.json").exists():
        for name in ("stage1", "stage2"):
            if (folder / name / "recipe.yaml").exists():
                shutil.rmtree(folder / name)
        (folder / "report.json").unlink()


def write_data(folder: Path) -> dict[str, Path]:
    """The demo's records as LLaVA JSON, and the image folders of the installed easy-vqa package."""
    try:
        records = {
            "captions": easy_vqa.caption_records(),
            "questions": easy_vqa.train_records(),
            "test": easy_vqa.test_records(),
        }
    except ImportError as error:
        raise DataError(str(error)) from error
    files = {name: folder / f"{name}.json" for name in records}
    for name, rows in records.items():
        write_json(files[name], rows)
    return {**files, "train_images": easy_vqa.image_folder("train"), "test_images": easy_vqa.image_folder("test")}


def train_stage(
    stage: str, folder: Path, data: Path, images: Path, share: float = 1.0, changes: Sequence[str] = ()
) -> None:
    """One stage, with `changes` of its recipe; `share` of its steps.

    What an interrupted call with the same recipe left is continued, or kept if it was finished.
    """
    target = folder / stage
    overrides = [
        f"output={target}",
        f"data.train=[{{path: '{data}', image_root: '{images}'}}]",
        f"data.cache_dir={folder / 'prepared'}",
    ]
    if stage == "stage1":
        overrides += [f"model.vision={BACKBONES / 'vision'}", f"model.llm={BACKBONES / 'llm'}"]
    else:
        overrides += [f"init_from={folder / 'stage1'}"]
    overrides += changes
    recipe = load_recipe(_HERE / f"{stage}.yaml", overrides)
    if share != 1:
        overrides.append(f"optimization.epochs={recipe.optimization.epochs * share}")
        recipe = load_recipe(_HERE / f"{stage}.yaml", overrides)
    recorded = target / "recipe.yaml"
    if recorded.exists() and recorded.read_text(encoding="utf-8") != recipe.to_yaml():
        shutil.rmtree(target)
    if (target / "final").exists():
        say(f"{target}: finished by an earlier call, kept")
    else:
        train(recipe)


def ask(model: Path, data: dict[str, Path], limit: int | None) -> tuple[Evaluation, Evaluation]:
    """Answers to the first `limit` test questions (None: all), with their pictures and with shuffled ones."""
    assembly = load_model(model)
    options: dict[str, Any] = {"batch_size": 256, "max_new_tokens": 8, "limit": limit}
    seen = evaluate(assembly, data["test"], data["test_images"], **options)
    return seen, evaluate(assembly, data["test"], data["test_images"], shuffle_images=True, **options)


def _figures(
    folder: Path, exported: Path, seen: Evaluation, shuffled: Evaluation, seconds: dict[str, float]
) -> dict[str, Any]:
    losses = {stage: read_rows(folder / stage / METRICS) for stage in ("stage1", "stage2")}
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return {
        "test_accuracy": seen.figures["exact_match"],
        "shuffled_accuracy": shuffled.figures["exact_match"],
        "constant_accuracy": seen.figures["constant_accuracy"],
        "test_questions": seen.figures["records"],
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1),
        "export": str(exported),
        "export_check": read_json(exported / REPORT)["max_logit_difference"],
        "validation_loss": {
            stage: [row["eval/loss"] for row in rows if "eval/loss" in row][-1] for stage, rows in losses.items()
        },
        "steps": {stage: rows[-1]["step"] for stage, rows in losses.items()},
    }


def _summary(folder: Path, report: dict[str, Any]) -> str:
    return (
        f"\n{report['test_accuracy']:.2%} of {report['test_questions']:,} unseen test questions answered exactly "
        f"({report['shuffled_accuracy']:.2%} with shuffled pictures; "
        f"words alone give {report['constant_accuracy']:.2%})\n"
        f"{report['seconds']['total']:.0f} s, {report['peak_memory_mb']:.0f} MB; "
        f"the export loads in stock transformers: {report['export']}\n"
        f"report: {folder / 'report.html'}"
    )
