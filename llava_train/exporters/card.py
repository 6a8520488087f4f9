"""The model card of an export: what it is, how to chat with it, its data, recipe, figures, licences.

No path of the machine it was made on is in it: sources are named by their hub id or the last part of their path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llava_train import __version__
from llava_train.errors import LlavaTrainError
from llava_train.exporters.licences import UNKNOWN, data_licence, part_licence
from llava_train.model.spec import ModelSpec
from llava_train.training.monitor import METRICS, read_rows

CARD = "README.md"


@dataclass(frozen=True)
class Run:
    """A finished run: its name, its whole recipe as YAML says it, the last figures of its metrics."""

    name: str
    recipe: dict[str, Any]
    steps: int | None
    loss: float | None
    held_out_loss: float | None


def runs_of(model: str | Path) -> list[Run]:
    """The runs behind a model, the first one first; none for a model that is no run folder."""
    found: list[Run] = []
    folder, seen = Path(model), set()
    while folder.is_dir() and folder.resolve() not in seen and (folder / "recipe.yaml").is_file():
        seen.add(folder.resolve())
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        if not isinstance(recipe, dict):
            break
        found.insert(0, _run(folder, recipe))
        folder = Path(recipe.get("init_from") or "")
    return found


def _run(folder: Path, recipe: dict[str, Any]) -> Run:
    try:
        rows = read_rows(folder / METRICS)
    except (OSError, ValueError, LlavaTrainError):  # a card does without
        rows = []

    def last(key: str) -> Any:
        return next((row[key] for row in reversed(rows) if key in row), None)

    return Run(str(recipe.get("name", folder.name)), recipe, last("step"), last("loss"), last("eval/loss"))


def card(name: str, model: str | Path, spec: ModelSpec, report: dict[str, Any]) -> str:
    """The text of README.md.

    Args:
        name: what the folder will be called.
        model: the run, or the folder, that was exported.
        spec: what the model is made of.
        report: what export_report.json says, with `back_ends`.
    """
    runs = runs_of(model)
    parts = [_front(spec, runs), f"# {name}\n\n{_what(spec, report)}"]
    sections = {
        "How to chat": _chat(report),
        "Data": _data(runs),
        "Recipe": _recipe(runs),
        "Figures": _figures(runs, report),
        "Licences": _licences(spec, runs),
    }
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items()]
    return "\n\n".join(parts) + "\n"


def shown_source(path: str) -> str:
    """A hub id as it is, or the last part of a path.

    >>> shown_source("openai/clip-vit-large-patch14-336"), shown_source("/data/models/my-clip")
    ('openai/clip-vit-large-patch14-336', 'my-clip')
    """
    return path if _is_hub_id(path) else Path(path).name


def _is_hub_id(path: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path)) and not Path(path).exists()


def _paths(source: Any) -> list[str]:
    return source.path if isinstance(source.path, list) else [source.path]


def _sources(spec: ModelSpec) -> list[tuple[str, str]]:
    vision = [("vision encoder", path) for path in _paths(spec.vision)]
    llm = [("language model", path) for path in _paths(spec.llm)]
    return [("model it began as", vision[0][1])] if spec.llm.kind == "llava" else vision + llm


def _front(spec: ModelSpec, runs: list[Run]) -> str:
    """YAML that the hub reads."""
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "llava_train"],
        "license": "other",
    }
    bases = [path for _, path in _sources(spec) if _is_hub_id(path)]
    sets = [source["hub"] for run in runs for source in _train(run) if source.get("hub")]
    values |= {"base_model": bases} if bases else {}
    values |= {"datasets": sorted({*sets})} if sets else {}
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _what(spec: ModelSpec, report: dict[str, Any]) -> str:
    made_of = "; ".join(f"{what} `{shown_source(path)}`" for what, path in _sources(spec))
    adapters = f" LoRA of rank {spec.lora.r} (alpha {spec.lora.alpha})." if spec.lora else ""
    precision = report["dtype"] + (
        f", linear layers of the language model in {report['quantize']}" if report["quantize"] else ""
    )
    return (
        f"A vision-language model of kind `{spec.architecture}`: {made_of}; connector `{spec.connector}`.{adapters}\n"
        f"Pictures: `{spec.image_aspect_ratio}`, {spec.image_size} pixels, {spec.image_tokens} tokens. "
        f"Weights: {precision}.\nWritten by llava_train {__version__}, target `{report['target']}`."
    )


def _chat(report: dict[str, Any]) -> str:
    takers = [row for row in report["back_ends"] if "command" in row]
    others = [row for row in report["back_ends"] if "why" in row]
    lines = [f"* {row['name']}: `{row['command']}`" for row in takers]
    lines += [f"* not {row['name']}: {row['why']}." for row in others]
    lines += [f"* {note}" for note in report.get("notes", [])]
    return "\n".join(lines) or "By no back end as it is."


def _train(run: Run) -> Iterator[dict[str, Any]]:
    yield from (run.recipe.get("data") or {}).get("train") or []


def _source_name(source: dict[str, Any]) -> str:
    return source.get("name") or source.get("hub") or Path(str(source.get("path") or "")).name


def _data(runs: list[Run]) -> str:
    rows = [
        f"| {run.name} | `{_source_name(source)}` | {source.get('repeat') or 1:g} |"
        for run in runs
        for source in _train(run)
    ]
    if not rows:
        return "Not known: this was exported from a folder that is no run."
    return "\n".join(["| run | records | times |", "|---|---|---|", *rows])


_SETTINGS = (
    ("learning rate", "optimization.learning_rate"),
    ("connector's rate", "tune.connector.learning_rate"),
    ("encoder's rate", "tune.vision.learning_rate"),
    ("samples a step", "optimization.global_batch_size"),
    ("epochs", "optimization.epochs"),
    ("schedule", "optimization.schedule"),
    ("warm-up", "optimization.warmup_ratio"),
    ("weight decay", "optimization.weight_decay"),
    ("precision", "optimization.precision"),
    ("longest sample", "data.max_length"),
    ("encoder", "tune.vision.mode"),
    ("connector", "tune.connector.mode"),
    ("language model", "tune.llm.mode"),
    ("seed", "seed"),
)
_LORA = (("LoRA rank", "tune.lora.r"), ("LoRA alpha", "tune.lora.alpha"))


def _recipe(runs: list[Run]) -> str:
    if not runs:
        return "Not known."
    head = ["| | " + " | ".join(run.name for run in runs) + " |", "|---" * (len(runs) + 1) + "|"]
    settings = (*_SETTINGS, *(_LORA if any(_has_lora(run) for run in runs) else ()))
    rows = [(title, [_setting(run, key) for run in runs]) for title, key in settings]
    rows = [(title, values) for title, values in rows if any(value is not None for value in values)]
    return "\n".join(
        head + ["| " + " | ".join([title, *(_shown(value) for value in values)]) + " |" for title, values in rows]
    )


def _has_lora(run: Run) -> bool:
    return any(_at(run.recipe, f"tune.{part}.mode") == "lora" for part in ("vision", "connector", "llm"))


def _setting(run: Run, key: str) -> Any:
    return None if key.startswith("tune.lora") and not _has_lora(run) else _at(run.recipe, key)


def _at(recipe: dict[str, Any], key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _figures(runs: list[Run], report: dict[str, Any]) -> str:
    lines = [
        f"* {run.name}: {run.steps} steps, loss {run.loss:.4g}"
        + (f", held out {run.held_out_loss:.4g}" if run.held_out_loss is not None else "")
        for run in runs
        if run.steps is not None and run.loss is not None
    ]
    worst = max(report["max_logit_difference"].values(), default=None)
    if worst is not None:
        of = "the trained model, rounded alike" if report["quantize"] else "the trained model"
        lines.append(f"* Export against {of}: logits differ by at most {worst:.1e} of the largest one.")
    if report["quantize"]:
        moved = max(report["rounding"]["max_logit_difference"].values())
        lines.append(f"* Rounding to {report['quantize']} moved them by up to {moved:.1e} of the largest one.")
    held_out = report.get("held_out")
    if held_out:
        measured = {held_out["metric"]: held_out, "loss": held_out["loss"]}
        lines += [
            f"* {metric} on {held_out['records']} held-out records ({held_out['data']}): {values['before']:.4g} "
            f"before, {values['after']:.4g} after {report['quantize']}."
            for metric, values in measured.items()
        ]
    return "\n".join(lines) or "None were kept."


def _licences(spec: ModelSpec, runs: list[Run]) -> str:
    rows = [(f"{what} `{shown_source(path)}`", part_licence(path)) for what, path in _sources(spec)]
    names = dict.fromkeys(_source_name(source) for run in runs for source in _train(run))
    rows += [(f"records `{name}`", data_licence(name)) for name in names]
    table = "\n".join(["| part | licence |", "|---|---|", *(f"| {part} | {licence} |" for part, licence in rows)])
    unknown = (
        "\n\nFind out what is unknown before you pass this model on." if any(UNKNOWN in row for row in rows) else ""
    )
    return f"{table}\n\nWhoever publishes this model sets the `license` above according to them.{unknown}"
