#!/usr/bin/env python3
"""Peak memory of LM head and loss with a large vocabulary, forward and backward: `python scripts/measure_head.py`.

`all`: logits of every position, as the stock class makes them. `supervised`: of what predicts a supervised token, at
once. `parts`: the same as the objective does it, at most 256 MB of logits at a time. Each in a process of its own; what
weights and inputs take is taken off. The last line is one JSON, in MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from llava_train.training import objective

WAYS = ("all", "supervised", "parts")


def measured(way: str, vocabulary: int, width: int, positions: int, share: float) -> tuple[float, float]:
    """(MB at the peak beyond weights and inputs, loss) of one way, in this process."""
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False)
    hidden = torch.randn(positions, width, requires_grad=True)
    targets = torch.randint(vocabulary, (positions,))
    supervised = torch.arange(positions) < share * positions
    head.weight.grad, hidden.grad = torch.zeros_like(head.weight), torch.zeros_like(hidden)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    if way == "all":
        loss = cross_entropy(head(hidden).float(), torch.where(supervised, targets, -100))
    else:
        size = objective.LOGITS_BYTES if way == "parts" else sys.maxsize
        objective.LOGITS_BYTES = size
        loss = objective._nll(head, hidden[supervised], targets[supervised]).mean()
    loss.backward()
    return _resident("VmHWM") - before, loss.item()


def _resident(key: str) -> float:
    """A figure of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--vocabulary", type=int, default=151_936, metavar="N", help="default: %(default)s, Qwen2's")
    add("--width", type=int, default=896, metavar="N", help="default: %(default)s, Qwen2-0.5B's")
    add("--positions", type=int, default=4096, metavar="N", help="of a micro-batch (default: %(default)s)")
    add("--share", type=float, default=0.2, metavar="X", help="of them supervised (default: %(default)s)")
    add("--way", choices=WAYS, help="measure one in this process")
    options = parser.parse_args(arguments)
    sizes = (options.vocabulary, options.width, options.positions, options.share)
    if options.way:
        print(json.dumps(measured(options.way, *sizes)))
        return 0
    found = {}
    for way in WAYS:
        print(f"measuring: {way}", file=sys.stderr)
        own = [f"--{name}={value}" for name, value in zip(("vocabulary", "width", "positions", "share"), sizes)]
        done = subprocess.run(
            [sys.executable, __file__, "--way", way, *own], capture_output=True, text=True, check=True
        )
        found[way] = json.loads(done.stdout)
    losses = [loss for _, loss in found.values()]
    print(
        json.dumps({**{way: round(peak) for way, (peak, _) in found.items()}, "difference": max(losses) - min(losses)})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
