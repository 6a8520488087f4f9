#!/usr/bin/env python3
"""Training at the size of LLaVA-1.5 7B on one GPU: ours, and transformers' `Trainer` beside it, in one call.

    python scripts/bench_gpu.py                               # eight minutes on whatever GPU is there
    python scripts/bench_gpu.py --minutes 4 --only probe equality stage1/ours lora/ours
    python scripts/bench_gpu.py --shapes tiny --device cpu    # every path of this script, without a GPU

Needs torch, transformers, peft and accelerate, and this folder; no data, no checkpoint, no network. Weights are random
and made on the GPU. Samples are random tokens as long as the published ones: stage 1 a picture and 14 to 34 tokens of
text, stage 2 (94 % with a picture) lognormal text of mean 225 and sigma 0.8, 19 % of all tokens supervised, cut at
2048. Pictures are random pixels in memory: neither files nor decoding are measured. `stall` is the share of time that
ours waits for a thread which puts its batches together. `padding` is the share of positions that held no token; below
zero with +shared, where two samples about one picture share its tokens: their FLOPs are counted as if they did not.

  stage1   the connector trains          lora   the connector, and adapters (r 128) on all linear layers of the LLM
  full     connector and LLM train; where their states do not fit, with as many decoder layers as do (`layers`)

Ours is the default recipe: packed rows, as large a micro-batch as needs no recompute, auto attention. The Trainer is as
published: micro-batches of 32 and 16 padded to the longest, sdpa, gradient checkpointing. Weights that train are
float32 on both sides, the rest bf16, under autocast. What runs out of memory is tried again with a smaller micro-batch.
Then come variants of both (--list), the most telling first, until the time is over; what is left is named in `skipped`.

First of all, small models and the kernels by themselves are compared with padded rows and with the plain definition of
attention: `equality` says "equal", or which kernel, which gradient and which stretch is wrong.

MFU: FLOPs that the samples need (llava_train.model.costs.step_flops: no padding, no recompute) a second, divided by
what a product of two 8192 x 8192 matrices of random bf16 numbers reaches here; `mfu_of_sheet` by the data sheet. FLOPs
are in units of 10^12, memory in GB (10^9 bytes). `met`: the default or a variant of ours reaches the target.

Each case runs in a process of its own. The JSON is written again after each one, so that nothing is lost where the
script is killed. The last line of the output is its summary.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

SPARE = 12.0
"""Seconds below which no case is begun: building the model alone takes as long."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 where nothing could be measured."""
    started = time.monotonic()
    options = _parser().parse_args(arguments)
    # Asking CUDA itself whether it is there would forbid the cases' processes to use it.
    os.environ |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    print(f"bench_gpu: loading; the whole takes at most {options.minutes:g} minutes", flush=True)
    from gpu import cases, equality, ours, probe, trainer  # noqa: F401  (here, so that each case need not)

    if options.list:
        print("\n".join(case.name for case in cases.CASES))
        return 0
    unknown = sorted(set(options.only or []) - {case.name for case in cases.CASES})
    if unknown:
        print(f"error: --only: unknown {', '.join(unknown)}; --list names the cases", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the case in hand is ended
    chosen = [case for case in cases.CASES if not options.only or case.name in options.only or case.job == "probe"]
    run = ours.Conditioned(options.shapes, options.device, options.precision, options.seconds)
    return Bench(run, options.out, started + 60 * options.minutes, started).all(chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=8, metavar="N", help="begin and end within these (default: %(default)s)")
    add(
        "--seconds",
        type=float,
        default=10,
        metavar="N",
        help="timed steps of a case, two at least (default: %(default)s)",
    )
    add("--only", nargs="+", metavar="CASE", help="these cases (and the probe) alone")
    add("--list", action="store_true", help="print the names of the cases, in their order")
    add("--shapes", choices=("7b", "tiny"), default="7b", help="sizes of the model (default: %(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="default: %(default)s")
    add("--out", type=Path, default=Path("bench_gpu.json"), metavar="FILE", help="all figures (default: %(default)s)")
    return parser


class Bench:
    """The cases of one call, and what was found so far."""

    def __init__(self, run: Any, out: Path, deadline: float, started: float) -> None:
        self.run, self.out, self.deadline, self.started = run, out, deadline, started
        self.device: dict[str, Any] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.skipped: list[str] = []

    def all(self, cases: list[Any]) -> int:
        """Run them in order; what fails for the sake of its attention comes again with another one."""
        from gpu.cases import with_flex
        from gpu.report import last_line, summary

        left, broken = list(cases), set()
        while left:
            case = left.pop(0)
            if self.deadline - time.monotonic() < SPARE:
                self.skipped.append(case.name)
                continue
            try:
                result = self.measured(with_flex(case) or case if case.stage in broken else case)
            except Exception as error:  # of this script: the other cases still have their chance
                result = self.results[case.name] = {"status": "error", "error": repr(error)}
                traceback.print_exc()
            if case.job == "probe" and "torch" not in result:
                hint = "to try this script without a GPU: --shapes tiny --device cpu"
                print(f"error: {self.run.device} cannot be used: {last_line(result)}; {hint}", file=sys.stderr)
                return 1
            if result["status"] == "error" and with_flex(case) and case.stage not in broken:
                broken.add(case.stage)
                left.insert(0, case)
        self.write()
        print(json.dumps(summary(self.results, self.skipped, self.device, time.monotonic() - self.started)))
        return 0

    def measured(self, case: Any) -> dict[str, Any]:
        """Run a case, again with less where memory is short; its result is written."""
        from dataclasses import replace

        from gpu.cases import smaller
        from gpu.processes import Outcome, run_case
        from gpu.report import line, utilisation

        fitted = self.results.get("full/ours", {}).get("settings", {}).get("layers")
        attempt = replace(case, layers=fitted) if case.stage == "full" and not case.layers and fitted else case
        tried: list[dict[str, Any]] = []
        outcome = Outcome("cut short", error="its time was over")
        while attempt and self.deadline - time.monotonic() >= SPARE:
            outcome = run_case(attempt, self.run, min(attempt.seconds, self.deadline - time.monotonic()))
            if outcome.status != "out of memory":
                break
            settings = outcome.figures.get("settings", {})
            tried.append({"settings": settings, "error": outcome.error[-400:]})
            print(f"{case.name:28} out of memory with {settings}", flush=True)
            attempt = smaller(attempt, settings)
        result = {**outcome.figures, "status": outcome.status, "error": outcome.error, "took": outcome.seconds}
        result["out_of_memory_with"] = tried
        if case.job == "probe":
            self.device = result
        else:
            result |= utilisation(result, self.device)
        self.results[case.name] = result
        print(line(case.name, result), flush=True)
        self.write()
        return result

    def write(self) -> None:
        """All so far, in place of what was written before."""
        from gpu.report import summary

        found = {
            "summary": summary(self.results, self.skipped, self.device, time.monotonic() - self.started),
            "run": {key: value for key, value in vars(self.run).items() if key != "known"},
            "cases": self.results,
        }
        part = self.out.with_name(self.out.name + ".part")
        part.write_text(json.dumps(found, indent=2, default=str) + "\n")
        part.replace(self.out)


if __name__ == "__main__":
    sys.exit(main())
