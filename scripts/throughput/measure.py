"""Measuring: equal losses first, then every side in a process of its own, one after the other, again and again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from throughput import peers, records, sides
from throughput.models import SHAPES, make_model, proportions, words_of
from throughput.sides import Task, Trace

EQUAL_STEPS = 3
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Options:
    """What is measured, of every model alike. `count`, `step` and `micro` None: what the model's shape says."""

    folder: Path
    repeat: int
    count: int | None
    warmup: int
    per_image: int
    equal: int
    dtype: str
    threads: int
    workers: int
    step: int | None
    micro: int | None


@dataclass(frozen=True)
class Timing:
    """One timed training."""

    model: str
    data: str
    side: str
    turn: int
    samples_per_second: float
    peak_mb: float
    optimizer: str


def say(message: str) -> None:
    """Progress, for the person who waits."""
    print(message, file=sys.stderr, flush=True)


class UnequalError(Exception):
    """Sides that should compute the same do not."""


class Bench:
    """One model with its sets of records."""

    def __init__(self, name: str, options: Options) -> None:
        """Makes the model in `options.folder`."""
        shape = SHAPES[name]
        self.shape = replace(shape, step=options.step or shape.step, micro=options.micro or shape.micro)
        self.name, self.options = name, options
        self.folder = options.folder / name
        say(f"{name}: making the model")
        self.folder.mkdir(parents=True, exist_ok=True)
        with _quiet(self.folder / "model.log"):
            self.words = words_of(make_model(self.shape, self.folder / "model"))
        self.facts = proportions(self.shape, self.folder / "model")
        self.data: dict[str, dict[str, Any]] = {}

    def prepare(self, kind: str, chosen: Sequence[str]) -> list[float]:
        """Make a set, and let the chosen sides train three steps on one global batch of it.

        Returns the relative differences of their losses to those of `ours`. Raises UnequalError above the tolerance.
        """
        options = self.options
        count = options.count or self.shape.records
        count = max(1, round(count / self.shape.step)) * self.shape.step
        made = records.make_set(self.folder / kind, kind, count, self.shape, self.words, options.per_image)
        with _quiet(self.folder / "rows.log"):
            lengths = peers.write_rows(self.task(kind, "ours"), made)
        self.data[kind] = {
            "records": count,
            "pictures": len({record["image"] for record in made if "image" in record}),
            "tokens_mean": round(sum(lengths) / count, 1),
            "tokens_longest": max(lengths),
        }
        say(f"{self.name}, {kind}: {self.data[kind]}")
        return self._differences(kind, made, chosen)

    def _differences(self, kind: str, made: list[records.Record], chosen: Sequence[str]) -> list[float]:
        data = self.folder / f"{kind}-equal"
        data.mkdir(exist_ok=True)
        few = records.one_step(made, self.options.equal)
        (data / "records.json").write_text(json.dumps(few))
        for record in few:
            if "image" in record:
                shutil.copy(self.folder / kind / record["image"], data)
        whole: dict[str, Any] = {
            "step": len(few),
            "micro": max(1, len(few) // 2),
            "steps": EQUAL_STEPS,
            "dtype": "fp32",
        }
        task = replace(self.task(kind, "ours"), data=str(data), work=f"{data}/work", workers=0, log=True, **whole)
        with _quiet(self.folder / "equal.log"):
            peers.write_rows(task, few)
            own = sides.run(task).losses
            others = [side for side in chosen if side != "ours"]
            losses = {side: sides.run(replace(task, side=side)).losses for side in others}
        found = [abs(a - b) / abs(b) for each in losses.values() for a, b in zip(each, own, strict=True)]
        worst = max(found, default=0.0)
        if not all(difference <= TOLERANCE for difference in found):  # neither is one that is not a number
            raise UnequalError(
                f"{self.name}, {kind}: losses differ by more than {TOLERANCE:g}, so nothing is timed: the sides do not "
                f"compute the same; ours {own}, the others {losses}"
            )
        say(f"{self.name}, {kind}: losses of {', '.join(losses)} differ from ours by {worst:.1e} at most")
        return found

    def task(self, kind: str, side: str) -> Task:
        """What a side has to train when it is timed: an epoch, and `warmup` steps of the next."""
        shape, options = self.shape, self.options
        count = self.data[kind]["records"] if kind in self.data else shape.step
        return Task(
            side=side,
            model=str(self.folder / "model"),
            data=str(self.folder / kind),
            template="plain" if kind == "captions" else shape.template,
            frozen=kind == "captions",
            work=str(self.folder / kind / side),
            steps=count // shape.step + options.warmup,
            micro=shape.micro,
            step=shape.step,
            dtype=options.dtype,
            threads=options.threads,
            workers=options.workers,
        )

    def timed(self, kind: str, chosen: Sequence[str]) -> Iterator[Timing]:
        """Times of every side, `repeat` turns of all of them."""
        for turn in range(self.options.repeat):
            for side in chosen:
                timing = self._time(kind, side, turn)
                rate, peak = f"{timing.samples_per_second:.2f} samples/s", f"{timing.peak_mb:.0f} MB"
                say(f"{self.name}, {kind}, turn {turn + 1}/{self.options.repeat}: {side:20} {rate}, {peak}")
                yield timing

    def _time(self, kind: str, side: str, turn: int) -> Timing:
        task = self.task(kind, side)
        trace = in_own_process(task)
        warmup = self.options.warmup
        seconds = trace.ends[-1] - trace.ends[warmup - 1]
        rate = (task.steps - warmup) * task.step / seconds
        return Timing(self.name, kind, side, turn, rate, trace.peak_mb, trace.optimizer)


@contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """What the body prints goes to a file: bars and tables of trainings in this process."""
    with log.open("w") as stream, redirect_stdout(stream), redirect_stderr(stream):
        yield


def available() -> list[str]:
    """Sides that can run here: TRL may not be installed."""
    return [side for side in (*sides.OURS, *sides.PEERS) if side != "trl" or find_spec("trl")]


def environment() -> dict[str, Any]:
    """Versions, processors, and how busy they are before anything is measured."""
    installed = [name for name in ("torch", "transformers", "accelerate", "trl") if find_spec(name)]
    busy = round(os.getloadavg()[0], 2)
    if busy > 0.5:
        say(f"the machine is busy (load average {busy}): two threads that wait for one another will be slow")
    return {**{name: version(name) for name in installed}, "processors": os.cpu_count(), "load_average": busy}


def in_own_process(task: Task) -> Trace:
    """Run a task alone; SystemExit with the end of its log where it fails."""
    work = Path(task.work)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "task.json").write_text(json.dumps({**asdict(task), "out": str(work / "trace.json")}))
    threads = {name: str(task.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, sides.__file__, str(work / "task.json")]
    with (work / "log").open("w") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if status:
        raise SystemExit(f"error: {task.side} ended with status {status}:\n" + (work / "log").read_text()[-2000:])
    return Trace(**json.loads((work / "trace.json").read_text()))
