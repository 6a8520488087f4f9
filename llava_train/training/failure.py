"""A step that cannot be made: what is kept of it, and how to look at it again."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from llava_train.files import write_json
from llava_train.training.engines.ranks import Ranks
from llava_train.training.loop import Failure

FOLDER = "failed"


def report_failure(folder: Path, ranks: Ranks, failure: Failure) -> str:
    """Write `failed/step-<n>-rank-<r>.json`; the message for the user names the first samples.

    Its samples are those of micro-batches whose loss is not finite, or all of the step where only the norm is not.
    """
    path = folder / FOLDER / f"step-{failure.step}-rank-{ranks.rank}.json"
    with suppress(OSError):  # a full disk must not hide the failure
        write_json(path, {**asdict(failure), "value": str(failure.value), "rank": ranks.rank})
    shown = ", ".join(failure.samples[:16]) + (f" and {len(failure.samples) - 16} more" * (len(failure.samples) > 16))
    blamed = f"Samples of rank {ranks.rank}: {shown}" if shown else f"Those of rank {ranks.rank} are fine"
    return (
        f"step {failure.step}: the {failure.what} is {failure.value}; stopped before the update. {blamed} ({path}).\n"
        f"Look at the step again, sample by sample: llava-train replay {folder} --step {failure.step}\n"
        "Often it is the learning rate, or fp16 where bf16 is to be had"
    )
