"""Going on with a run: the newest checkpoint that verifies, refused where the run was another one."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_train.errors import CheckpointError
from llava_train.files import read_json
from llava_train.model.tuning import Group
from llava_train.training.checkpoints.manifest import faults, place_of, steps_of
from llava_train.training.checkpoints.saving import STATE
from llava_train.training.checkpoints.shards import load_shards
from llava_train.training.engines.base import Engine
from llava_train.training.engines.ranks import Ranks
from llava_train.training.monitor import say
from llava_train.training.state import RunState


def newest(folder: Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint whose manifest verifies; damaged ones are named and passed over.

    Every rank calls it: they read the files together and agree.
    """
    for index in range(ranks.agree(len(steps_of(folder)))):
        listed = steps_of(folder)
        step = ranks.agree(listed[-1 - index] if index < len(listed) else 0)
        checkpoint = place_of(folder, step)
        found = list(faults(checkpoint, (ranks.rank, ranks.world_size)))
        for fault in found:
            print(f"{checkpoint}: passed over: {fault}", file=sys.stderr)
        if not ranks.total([float(len(found))])[0]:
            return checkpoint
    return None


def require_same_run(checkpoint: Path, identity: dict[str, Any], allowed: Sequence[str] = ()) -> None:
    """Raise CheckpointError, naming each, where recipe, data or tokenizer are not those of the checkpoint.

    `allowed` names the keys that may differ all the same.
    """
    before = read_json(checkpoint / STATE)["identity"]
    changed = [key for key in sorted({*before, *identity}) if before.get(key) != identity.get(key)]
    unknown = [key for key in allowed if key not in {*before, *identity}]
    if unknown:
        raise CheckpointError(f"--allow-change {unknown[0]}: no such key; these can change: {', '.join(changed)}")
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
    stored = read_json(checkpoint / STATE)
    names = [name for group in groups for name in group.names]
    load_shards(checkpoint, engine.fragments(), engine.stepped, names)
    engine.load_scale_state(stored["scale"])
    engine.refresh()
    return RunState(stored["step"], stored["best_loss"], stored["best_step"])


def forget(folder: Path) -> None:
    """Remove what a run folder holds of an earlier run."""
    for name in ("checkpoints", "final", "best", "metrics.jsonl"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
