"""One training: of ours by its recipe, or of a peer; in a process of its own when it is timed.

python scripts/throughput/sides.py TASK.json    # what measure.py starts; writes what it did to `out`
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

OURS = {
    "ours": [],
    "ours_grouped": ["data.group_by_image=true"],
    "packing_off": ["data.group_by_image=true", "speed.packing=false"],
    "share_prefix_off": ["data.group_by_image=true", "speed.share_prefix=false"],
    "fused_optimizer_off": ["data.group_by_image=true", "speed.fused_optimizer=false"],
    "compile_on": ["data.group_by_image=true", "speed.compile=true"],
}
"""Sides that are ours, each with what differs from the default recipe."""
PEERS = ("trainer", "trainer_grouped", "trl")


@dataclass(frozen=True)
class Task:
    """What one side trains.

    Attributes:
        side: a name of OURS or PEERS.
        model: a stock Llava folder.
        data: a folder with `records.json`, its pictures and `peers/` (see `peers.write_rows`).
        frozen: whether the language model is (stage 1); the tower always is.
        work: a folder of its own.
        log: whether a peer notes its losses (ours always does).
    """

    side: str
    model: str
    data: str
    template: str
    frozen: bool
    work: str
    steps: int
    micro: int
    step: int
    dtype: str = "fp32"
    threads: int = 2
    workers: int = 0
    learning_rate: float = 1e-4
    log: bool = False


@dataclass
class Trace:
    """What a side did: the loss and the end of each step, and its peak memory when the last one was over."""

    losses: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    optimizer: str = ""

    def stamp(self) -> None:
        """A step is over."""
        self.ends.append(time.perf_counter())
        self.peak_mb = peak_mb()


def peak_mb() -> float:
    """Peak resident memory of this process and of the largest of its data workers.

    Not `ru_maxrss`: it starts at that of the process that started this one.
    """
    own = _high_water("self")
    return own + max((_high_water(str(child.pid)) for child in multiprocessing.active_children()), default=0.0)


def _high_water(process: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def recipe_of(task: Task) -> dict[str, Any]:
    """The default recipe of ours for a task."""
    return {
        "name": task.side,
        "output": f"{task.work}/run",
        "init_from": task.model,
        "data": {
            "template": task.template,
            "train": [{"path": f"{task.data}/records.json"}],
            "max_length": 4096,
            "cache_dir": f"{task.data}/prepared",
            "prepare_workers": 1,
            "num_workers": task.workers,
        },
        "tune": {"connector": {"mode": "full"}, "llm": {"mode": "frozen" if task.frozen else "full"}},
        "optimization": {
            "learning_rate": task.learning_rate,
            "global_batch_size": task.step,
            "micro_batch_size": task.micro,
            "max_steps": task.steps,
            "warmup_ratio": 0.0,
            "schedule": "constant",
            "precision": task.dtype,
        },
        "speed": {"recompute": "none"},
        "engine": {"device": "cpu"},
        "checkpoint": {"save_every": 0},
        "monitor": {"eval_every": 0},
    }


def write_recipe(task: Task) -> Path:
    """The recipe as a file (JSON is YAML)."""
    path = Path(task.work) / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recipe_of(task)))
    return path


def run(task: Task) -> Trace:
    """Train as the task says."""
    import torch

    torch.set_num_threads(task.threads)
    if task.side in OURS:
        return _run_ours(task)
    from throughput.peers import run_peer

    return run_peer(task, Trace())


def _run_ours(task: Task) -> Trace:
    from llava_train import load_recipe, train
    from llava_train.training.monitor import METRICS, read_rows

    trace = Trace()
    with _stamped(trace):
        folder = train(load_recipe(write_recipe(task), OURS[task.side]), fresh=True)
    trace.losses = [row["loss"] for row in read_rows(folder / METRICS)]
    trace.optimizer = "the recipe's"
    return trace


@contextmanager
def _stamped(trace: Trace) -> Iterator[None]:
    """Note the end of each step of ours by the clock of the peers, and the memory before a model is written."""
    from llava_train.training.monitor import Monitor

    reported = Monitor.step

    def step(self: Monitor, row: dict[str, Any]) -> None:
        reported(self, row)
        trace.stamp()

    Monitor.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Monitor.step = reported  # type: ignore[method-assign]


def main() -> None:
    """Run the task that a file describes."""
    values = json.loads(Path(sys.argv[1]).read_text())
    out = Path(values.pop("out"))
    out.write_text(json.dumps(asdict(run(Task(**values)))))


if __name__ == "__main__":
    main()
