"""Several runs in one launch: starting processes costs more than training tiny models does.

    torchrun --nproc_per_node 2 -m tests.training.engines.jobs JOBS.json

A job is {"recipe", "overrides", "stop_after"?, "record"?}: the run is asked to stop after a step; the ids of the
samples of each step are written to a file a rank. Rank 0 prints the outcome of each job, "done" or "stopped".
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llava_train.training.run as run_module
from llava_train import load_recipe
from llava_train.cli import _set_environment
from llava_train.data.batch import Batch
from llava_train.errors import StoppedError
from llava_train.training.engines.ranks import leave_ranks
from llava_train.training.monitor import read_rows
from llava_train.training.signals import StopRequest


class Stop(StopRequest):
    """Asks the run to stop after a step."""

    def __init__(self, folder: Path, after: int) -> None:
        super().__init__()
        self.folder, self.after = folder, after

    def __call__(self) -> bool:
        return len(_rows(self.folder)) + 1 >= self.after


def outcome(job: dict[str, Any]) -> str:
    recipe = load_recipe(job["recipe"], job["overrides"])
    folder, rank = Path(recipe.output), os.environ.get("RANK", "0")

    @contextmanager
    def asked_to_stop() -> Iterator[Any]:
        """A signal that comes in the middle of step `stop_after`."""
        yield Stop(folder, job.get("stop_after", 10**9))

    def recorded(*arguments: Any) -> Any:
        course = course_of(*arguments)
        return type(course)(course.plan, _record(course.steps, folder / f"ids-{rank}.jsonl"), course.validation)

    course_of, deferred_stop = run_module.course_of, run_module.deferred_stop
    run_module.course_of = recorded if job.get("record") else course_of
    run_module.deferred_stop = asked_to_stop
    try:
        run_module.train(recipe)
        return "done"
    except StoppedError:
        return "stopped"
    finally:
        run_module.course_of, run_module.deferred_stop = course_of, deferred_stop


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [row for row in read_rows(path) if "loss" in row] if path.exists() else []


def _record(steps: Iterator[list[Batch]], path: Path) -> Iterator[list[Batch]]:
    for batches in steps:
        ids = [name for batch in batches if batch.weights.any() for name in batch.ids]
        with path.open("a") as stream:
            stream.write(json.dumps(ids) + "\n")
        yield batches


def main(path: str) -> None:
    _set_environment(debug=False)
    for job in json.loads(Path(path).read_text()):
        result = outcome(job)
        if os.environ.get("RANK", "0") == "0":
            print(result, flush=True)
    leave_ranks()


if __name__ == "__main__":
    main(sys.argv[1])
