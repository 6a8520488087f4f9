#!/usr/bin/env python3
"""The demo with each of several connectors, and with cross-attention: what each answers of the test questions.

    python scripts/compare_connectors.py                                    # all rows: see below for the time
    python scripts/compare_connectors.py --rows linear qformer --steps-scale 0.1 --limit 512
    python scripts/compare_connectors.py optimization.learning_rate=1e-3 --rows linear --out runs/slower

Every row trains both stages of `llava-train demo` (easy-vqa, the package's tiny backbones, 16 patches a picture) with
the recipe keys that the list at --help names, then answers the official test questions, and once more with the pictures
shuffled: what is left of the accuracy then needs no picture. A full row takes about as long as the demo, 3 minutes on 2
idle cores. Rows differ in nothing else, so none is tuned: these figures tell that a connector works, and what it loses
on a task where a picture is one shape of one colour; they rank no connectors for real pictures.

A row that is finished is not trained again, one that was interrupted goes on, one whose settings changed starts anew.
The last line on stdout is one JSON, by row:

  tokens             of a picture in the LLM
  test_accuracy      share of the questions answered exactly
  shuffled_accuracy  the same with the pictures of other questions
  constant_accuracy  the same for the best constant answer to each question text
  seconds            of the steps of both stages and of the answers, without start-up and validation
  parameters         that stage 1 trains
  flops              of the connector, a picture (forward)
  stage1_loss        validation loss at the end of stage 1

A row that fails says `error` instead, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llava_train.demo import run as demo
from llava_train.errors import LlavaTrainError
from llava_train.files import ensure_space, read_json, write_json
from llava_train.model.checkpoint import WEIGHTS, load_model
from llava_train.model.costs import costs_of
from llava_train.training.monitor import METRICS, read_rows, say

ROWS = {
    "linear": ["model.connector=linear"],
    "mlp2x_gelu": ["model.connector=mlp2x_gelu"],
    "pixel_shuffle": ["model.connector=pixel_shuffle", "model.connector_options={r: 2}"],
    "avg_pool": ["model.connector=avg_pool", "model.connector_options={r: 2}"],
    "adaptive_pool": ["model.connector=adaptive_pool", "model.connector_options={side: 2}"],
    "resampler": ["model.connector=resampler", "model.connector_options={num_latents: 4, depth: 2, heads: 4}"],
    "qformer": [
        "model.connector=qformer",
        "model.connector_options={num_queries: 4, num_hidden_layers: 2, hidden_size: 128, num_attention_heads: 4}",
    ],
    "c_abstractor": ["model.connector=c_abstractor", "model.connector_options={side: 2, depth: 2}"],
    "cross_attention": ["model.fusion=cross_attention", "model.fusion_options={every: 1}"],
}
"""Name -> keys of the recipes of both stages. Where a connector has a choice, it makes 4 tokens of the 16 patches.

Cross-attention stands before each of the LLM's three layers.
"""
DEFAULT = [name for name in ROWS if name != "avg_pool"]  # adaptive_pool computes the same on this grid


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_args(arguments)
    disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    out, rows, failed = Path(options.out), {}, False
    ensure_space(out, 100_000_000, "the comparison")
    data = demo.write_data(out / "data")
    for number, name in enumerate(options.rows, 1):
        say(f"{number}/{len(options.rows)}  {name}")
        asked = {
            "recipe": [*ROWS[name], *options.overrides],
            "steps_scale": options.steps_scale,
            "limit": options.limit,
        }
        try:
            rows[name] = compared(out / name, asked, data)
        except LlavaTrainError as error:
            rows[name], failed = {"error": str(error)}, True
        say(f"{name}: {json.dumps(rows[name])}")
    print(json.dumps(rows), flush=True)
    return int(failed)


def compared(folder: Path, asked: dict[str, Any], data: dict[str, Path]) -> dict[str, Any]:
    """Figures of a row: those of an earlier call where the same was asked for, else by training and answering."""
    done = folder / "row.json"
    if done.exists() and (known := read_json(done))["asked"] == asked:
        return dict(known["figures"])
    for stage, records in (("stage1", "captions"), ("stage2", "questions")):
        changes = [*asked["recipe"], f"data.cache_dir={folder.parent / 'prepared'}"]
        demo.train_stage(stage, folder, data[records], data["train_images"], asked["steps_scale"], changes)
    seen, shuffled = demo.ask(folder / "stage2", data, asked["limit"])
    metrics = {stage: read_rows(folder / stage / METRICS) for stage in ("stage1", "stage2")}
    steps = sum(row.get("seconds", 0.0) for rows in metrics.values() for row in rows)
    assembly = load_model(folder / "stage2")
    figures = {
        "tokens": assembly.spec.image_tokens,
        "test_accuracy": round(seen.figures["exact_match"], 4),
        "shuffled_accuracy": round(shuffled.figures["exact_match"], 4),
        "constant_accuracy": round(seen.figures["constant_accuracy"], 4),
        "seconds": round(steps + seen.figures["seconds"] + shuffled.figures["seconds"], 1),
        "parameters": trained_parameters(folder / "stage1" / "final" / WEIGHTS),
        "flops": int(costs_of(assembly.model).connector.forward),
        "stage1_loss": round([row["eval/loss"] for row in metrics["stage1"] if "eval/loss" in row][-1], 4),
    }
    write_json(done, {"asked": asked, "figures": figures})
    return figures


def trained_parameters(weights: Path) -> int:
    """Weights in the file of a model whose encoder and LLM are frozen, but for new rows of the vocabulary."""
    with safe_open(str(weights), framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("new_rows."))


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<16}{' '.join(keys)}" for name, keys in ROWS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"rows:\n{listed}"
    )
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, default=DEFAULT, metavar="ROW", help=f"default: {' '.join(DEFAULT)}")
    add("--steps-scale", type=_positive, default=1.0, metavar="X", help="share of the demo's steps (default: all)")
    add("--limit", type=int, metavar="N", help="ask only the first N test questions (default: all 9,673)")
    add("--out", default="runs/connectors", help="folder of the runs (default: %(default)s)")
    add("--threads", type=int, default=0, metavar="N", help="threads of torch (default: torch's own choice)")
    add("overrides", nargs="*", metavar="key=value", help="more of the recipe, for every row and both stages")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
