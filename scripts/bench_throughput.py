#!/usr/bin/env python3
"""Samples a second and memory of ours, of transformers' `Trainer` and of TRL's `SFTTrainer`, side by side on a CPU.

    python scripts/bench_throughput.py --quick            # the 30M model, under three minutes on two cores
    python scripts/bench_throughput.py --features         # all models, three turns; our switches one by one, too
    python scripts/bench_throughput.py --model demo --repeat 1 --records 64 --step 16 --micro 8

What is alike. All sides start from one stock Llava folder of random weights and train on the same records: token ids
and labels of the peers are those that `llava_train.inspection` gives of ours. Weights are float32 (with `--dtype bf16`
under autocast; ours then keeps frozen weights in bf16), the optimizer is AdamW with the same constant rate, gradients
are clipped at 1, gradient checkpointing is off. Everybody opens, resizes and normalises the pictures while it trains,
with the same image processor (its PIL backend) and as many data workers. What the task does not say is at its default.

Equal losses come first: three steps on one global batch, in float32. Above 1e-3 (relative) nothing is timed. Then each
side trains an epoch in a process of its own, in turn (A B C A B C ...). Timed is the wall clock between the end of the
last warm-up step and the end of the last one, waiting for data included. Memory is the peak of the process at that
time, and of its largest data worker.

  ours                 the default recipe: packed; of a picture's conversations only those share that chance brings into
                       one step, which is often in a small set and seldom in a large one: see instructions_single
  ours_grouped         with data.group_by_image=true: conversations about one picture share its tokens
  trainer              Trainer, padded micro-batches in random order
  trainer_grouped      Trainer with group_by_length, sorted over the set as in the middle of a long epoch
  trl                  SFTTrainer. Its chunked LM head is made for Triton; what it runs on a CPU instead scores every
                       position and is slow with a large vocabulary: see `proportioned`, not `30m`

  captions             stage 1: a picture and a short text, only the connector trains
  instructions         stage 2: connector and LLM train; text lengths lognormal, 6 % without a picture, several
                       conversations about a picture (--per-image; LLaVA-Instruct-150K has 1.95)
  instructions_single  the same with one conversation about a picture

Texts are as long relative to pictures as in LLaVA-1.5: mean 225 tokens to 576 of a picture, sigma 0.8 (`demo`: mean 40
to 16). Both numbers are assumptions; the authors publish no distribution. `proportioned` has the proportions of the 7B
model in the rest, too.

The last line is one JSON. Ratios are samples a second of ours divided by the peer's, the median over turns: above 1
ours is faster. Names without a model are the first model's, null is what was not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from throughput.sides import OURS, PEERS

PLAN = {
    "captions": ("ours", "trainer", "trl"),
    "instructions": ("ours_grouped", "ours", "trainer", "trainer_grouped", "trl"),
    "instructions_single": ("ours", "trainer", "trainer_grouped"),
}
QUICK = {"instructions": ("ours_grouped", "trainer", "trainer_grouped", "trl"), "captions": ("ours", "trainer")}
MODELS = ("30m", "proportioned", "demo")
FEATURES = tuple(side for side in OURS if not side.startswith("ours"))
NULL = ("ratio_trainer_proportioned", "ratio_trainer_grouped_proportioned")
"""In the JSON in any case."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parse(arguments)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch is there
        os.environ[name] = str(options.threads)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    folder = options.folder or Path(tempfile.mkdtemp(prefix="bench-throughput-"))
    from llava_train.errors import LlavaTrainError

    try:
        return _bench(options, folder)
    except LlavaTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="the 30M model, one turn, the figures that matter most")
    add("--model", nargs="+", choices=MODELS, help="default: all")
    add("--data", nargs="+", choices=PLAN, help="default: all")
    sides = (*OURS, *PEERS)
    add("--sides", nargs="+", choices=sides, metavar="SIDE", help=f"only these, on every set: {', '.join(sides)}")
    add("--features", action="store_true", help="time ours with each of its switches turned, too (instructions)")
    add("--repeat", type=int, metavar="N", help="turns (default: 3; with --quick 1)")
    add("--records", type=int, metavar="N", help="samples of a set (default: 128 to 512; with --quick 32)")
    add("--per-image", type=int, default=2, metavar="N", help="conversations about a picture (default: %(default)s)")
    add("--step", type=int, metavar="N", help="samples a step (default: 16; demo 64)")
    add("--micro", type=int, metavar="N", help="samples a micro-batch (default: 8; demo 16)")
    add("--warmup", type=int, default=1, metavar="N", help="steps that are not timed (default: %(default)s)")
    add("--equal", type=int, metavar="N", help="samples the losses are compared on (default: 8; with --quick 4)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    add("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    add("--workers", type=int, default=0, help="data workers of every side (default: %(default)s)")
    add("--folder", type=Path, help="work here and keep what is made (default: a temporary folder)")
    add("--out", type=Path, metavar="FILE", help="write every figure there as JSON")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.model = options.model or (["30m"] if quick else list(MODELS))
    options.repeat = options.repeat or (1 if quick else 3)
    options.records = options.records or (32 if quick else None)
    options.equal = options.equal or (4 if quick else 8)
    if options.step and options.micro and options.step % options.micro:
        parser.error("--step must be a multiple of --micro")
    if min(options.warmup, options.repeat, options.per_image) < 1 or options.equal < 2:
        parser.error("--warmup, --repeat and --per-image must be at least 1, --equal at least 2")
    return options


def _bench(options: argparse.Namespace, folder: Path) -> int:
    from throughput import measure, report
    from throughput.sharing import instruct_150k, tokens_saved

    started = time.perf_counter()
    environment = measure.environment()
    measure.say(json.dumps(environment))
    if "trl" not in measure.available():
        measure.say("trl is not installed: its figures are null (pip install -c constraints.txt trl)")
    try:
        timings, differences, facts = _measured(options, folder)
    except measure.UnequalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = report.medians(timings)
    flat = {
        **dict.fromkeys(NULL),
        **report.summary(timings, options.model),
        "loss_difference": max(differences, default=None),
        "tokens_saved": round(tokens_saved(*instruct_150k()), 3),
        "seconds": round(time.perf_counter() - started),
    }
    print(report.table(rows))
    if options.out:
        every = {"settings": vars(options), "environment": environment, "models": facts, "medians": rows}
        every["timings"] = [vars(timing) for timing in timings]
        options.out.write_text(json.dumps({**flat, **every}, indent=2, default=str) + "\n")
    print(json.dumps(flat))
    return 0


def _measured(options: argparse.Namespace, folder: Path) -> tuple[list[Any], list[float], dict[str, Any]]:
    """Every timing, the difference of the losses on every set, and what is to be known of each model."""
    from throughput import measure
    from throughput.models import NOTES

    same = ("repeat", "warmup", "per_image", "equal", "dtype", "threads", "workers", "step", "micro")
    settings = measure.Options(folder, count=options.records, **{key: getattr(options, key) for key in same})
    plan = QUICK if options.quick else PLAN
    timings: list[measure.Timing] = []
    differences: list[float] = []
    facts: dict[str, Any] = {}
    for name in options.model:
        bench = measure.Bench(name, settings)
        print(f"{name}: {NOTES[name]}; {json.dumps(bench.facts)}", flush=True)
        facts[name] = {"note": NOTES[name], **bench.facts, "data": bench.data}
        for kind in options.data or plan:
            features = FEATURES if options.features and kind == "instructions" else ()
            wanted = options.sides or [*plan.get(kind, PLAN[kind]), *features]
            sides = [side for side in wanted if side in measure.available()]
            differences += bench.prepare(kind, sides)
            timings += bench.timed(kind, sides)
    return timings, differences, facts


if __name__ == "__main__":
    sys.exit(main())
