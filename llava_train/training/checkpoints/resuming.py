"""Going on with a run: the newest checkpoint that verifies, refused where the run was another one."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_train.errors import CheckpointError
from llava_train.model.screening import read_config
from llava_train.model.tuning import Group
from llava_train.training.checkpoints.constants import changed_keys
from llava_train.training.checkpoints.manifest import faults, place_of, steps_of
from llava_train.training.checkpoints.saving import STATE
from llava_train.training.checkpoints.shards import load_shards
from llava_train.training.engines.base import Engine
from llava_train.training.engines.ranks import Ranks
from llava_train.training.monitor import say
from llava_train.training.state import RunState


def newest(folder: Path, ranks: Ranks, before: int | None = None) -> Path | None:
    """The newest checkpoint whose manifest verifies; damaged ones are named and passed over.

    With `before`, the newest of a step before that one. Every rank calls it: they read the files together and agree.
    """
    for index in range(ranks.agree(len(_earlier(folder, before)))):
        listed = _earlier(folder, before)
        step = ranks.agree(listed[-1 - index] if index < len(listed) else 0)
        checkpoint = place_of(folder, step)
        found = list(faults(checkpoint, (ranks.rank, ranks.world_size)))
        for fault in found:
            print(f"{checkpoint}: passed over: {fault}", file=sys.stderr)
        if not ranks.total([float(len(found))])[0]:
            return checkpoint
    if ranks.agree(len(_earlier(folder, before))):
        raise CheckpointError(f"{folder}: none of its checkpoints verifies; mend them, or start over with --fresh")
    return None


def _earlier(folder: Path, before: int | None) -> list[int]:
    return [step for step in steps_of(folder) if before is None or step < before]


def require_same_run(checkpoint: Path, identity: dict[str, Any], allowed: Sequence[str] = ()) -> None:
    """Raise CheckpointError, naming each, where recipe, data or tokenizer are not those of the checkpoint.

    `allowed` names the keys that may differ all the same.
    """
    before = _stored(checkpoint)["identity"]
    changed = changed_keys(before, identity)
    unknown = [key for key in allowed if key not in {*before, *identity}]
    if unknown:
        raise CheckpointError(
            f"--allow-change {', '.join(unknown)}: no such key; what changed: {', '.join(changed) or 'nothing'}"
        )
    for key in [key for key in changed if key in allowed]:
        say(f"resuming although {key} was {before.get(key)!r}, is {identity.get(key)!r}")
    left = [key for key in changed if key not in allowed]
    if left:
        lines = [f"  {key}: was {before.get(key)!r}, is {identity.get(key)!r}" for key in left]
        raise CheckpointError(
            f"{checkpoint}: cannot resume, the run was another one; choose a new output folder, --fresh to start "
            "over, the former values, or --allow-change KEY to go on all the same\n" + "\n".join(lines)
        )


def load_state(checkpoint: Path, engine: Engine, groups: list[Group]) -> RunState:
    """Weights, moments and place of a verified checkpoint, into an engine of any kind on any number of ranks."""
    stored = _stored(checkpoint)
    load_shards(checkpoint, engine.fragments(), engine.stepped, groups)
    engine.load_scale_state(stored["scale"])
    engine.refresh()
    return RunState(stored["step"], stored["best_loss"], stored["best_step"])


def _stored(checkpoint: Path) -> dict[str, Any]:
    """What STATE says of a checkpoint. CheckpointError where it is not the state of this one."""
    values = read_config(checkpoint, STATE)
    step, best = values.get("step"), (values.get("best_loss"), values.get("best_step"))
    if (
        checkpoint.name != f"step-{step}"
        or not isinstance(values.get("identity"), dict)
        or not all(value is None or isinstance(value, (int, float)) for value in best)
        or "scale" not in values
    ):
        raise CheckpointError(f"{checkpoint / STATE}: is damaged: this is not the state of {checkpoint.name}")
    return values


def forget(folder: Path) -> None:
    """Remove what a run folder holds of an earlier run; first what makes it look finished."""
    for name in ("final", "best", "checkpoints", "failed", "metrics.jsonl"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
