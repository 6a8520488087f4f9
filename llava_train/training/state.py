"""Checkpoints of a run: written whole or not at all, verified before they are believed.

    checkpoints/step-40/
        weights.safetensors     trained weights by name
        optimizer.safetensors   AdamW's moments, `<name>.exp_avg`, ...
        zero/                   DeepSpeed's own files instead, under a ZeRO engine
        state.json              step, best validation loss, what the run was (recipe, data)
        manifest.json           sha256 of every file; written last

Random numbers need no saving: each step seeds its own (see `seed_step`).
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llava_train.errors import CheckpointError, DataError
from llava_train.files import ensure_space, flush, read_json, sha256_file, write_json
from llava_train.model.tuning import Group
from llava_train.training.engine import Engine, ZeroEngine
from llava_train.training.monitor import say

_MOMENTS = ("exp_avg", "exp_avg_sq")
_MANIFEST = "manifest.json"


@dataclass
class RunState:
    """Where a run stands: steps done, and the best validation loss with its step."""

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank, so that a resumed step draws the same dropout."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def save_state(folder: Path, engine: Engine, groups: list[Group], state: RunState, identity: dict[str, Any]) -> Path:
    """Write `checkpoints/step-<n>` of a run folder. Every rank calls it; rank 0 alone renames."""
    target = folder / "checkpoints" / f"step-{state.step}"
    temporary = target.with_name(f".{target.name}.tmp")
    if engine.is_main:
        ensure_space(folder, state_bytes(groups), "a checkpoint")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    engine.barrier()
    if isinstance(engine, ZeroEngine):
        engine.save(temporary)
    elif engine.is_main:
        _save_tensors(temporary, engine, groups)
    engine.barrier()
    if engine.is_main:
        scaler = engine.accelerator.scaler.state_dict() if engine.accelerator.scaler else None
        world = {"world_size": engine.world_size, "engine": type(engine).__name__}
        write_json(temporary / "state.json", {**vars(state), **world, "scaler": scaler, "identity": identity})
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        write_json(temporary / _MANIFEST, {str(p.relative_to(temporary)): sha256_file(p) for p in files})
        for path in files:
            flush(path)
        flush(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        flush(target.parent)
    engine.barrier()
    return target


def state_bytes(groups: list[Group]) -> int:
    """Bytes of one checkpoint: weights and two moments in float32, and a little for the rest."""
    return sum(3 * 4 * parameter.numel() for group in groups for parameter in group.parameters) + 1_000_000


def _named(groups: list[Group]) -> dict[str, torch.nn.Parameter]:
    return {name: p for group in groups for name, p in zip(group.names, group.parameters)}


def _save_tensors(folder: Path, engine: Engine, groups: list[Group]) -> None:
    named = _named(groups)
    save_file({name: p.detach().cpu().contiguous() for name, p in named.items()}, str(folder / "weights.safetensors"))
    moments: dict[str, torch.Tensor] = {}
    for name, parameter in named.items():
        values = engine.optimizer.state.get(parameter, {})
        moments |= {f"{name}.{key}": values[key].detach().cpu().contiguous() for key in _MOMENTS if key in values}
        if "step" in values:
            moments[f"{name}.step"] = torch.as_tensor(values["step"], dtype=torch.float32).reshape(1)
    save_file(moments, str(folder / "optimizer.safetensors"))


def load_state(folder: Path, engine: Engine, groups: list[Group], identity: dict[str, Any]) -> RunState:
    """Continue from the newest checkpoint that verifies; a fresh state where there is none.

    Raises CheckpointError when the recipe, the data or the engine differs from the checkpoint's.
    """
    checkpoint = newest(folder)
    if checkpoint is None:
        return RunState()
    stored = read_json(checkpoint / "state.json")
    _refuse_changes(checkpoint, stored["identity"], identity)
    if isinstance(engine, ZeroEngine) != (stored["engine"] == "ZeroEngine"):
        raise CheckpointError(f"{checkpoint}: was written by {stored['engine']}; resume with the same engine kind")
    if isinstance(engine, ZeroEngine):
        if stored["world_size"] != engine.world_size:
            raise CheckpointError(
                f"{checkpoint}: ZeRO state of {stored['world_size']} processes cannot resume on {engine.world_size}"
            )
        engine.load(checkpoint)
    else:
        _load_tensors(checkpoint, engine, groups)
        if engine.accelerator.scaler and stored["scaler"]:
            engine.accelerator.scaler.load_state_dict(stored["scaler"])
    return RunState(stored["step"], stored["best_loss"], stored["best_step"])


def _load_tensors(checkpoint: Path, engine: Engine, groups: list[Group]) -> None:
    named = _named(groups)
    weights = load_file(str(checkpoint / "weights.safetensors"))
    moments = load_file(str(checkpoint / "optimizer.safetensors"))
    if weights.keys() != named.keys():
        different = sorted(weights.keys() ^ named.keys())
        raise CheckpointError(f"{checkpoint}: other weights train now: {', '.join(different[:10])}")
    optimizer = engine.optimizer.optimizer if hasattr(engine.optimizer, "optimizer") else engine.optimizer
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
            if f"{name}.step" in moments:
                values = {key: moments[f"{name}.{key}"].to(parameter.device) for key in _MOMENTS}
                optimizer.state[parameter] = {"step": moments[f"{name}.step"].reshape(()), **values}


def _refuse_changes(checkpoint: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        lines = [f"  {key}: was {before.get(key)!r}, is {now.get(key)!r}" for key in changed]
        raise CheckpointError(
            f"{checkpoint}: cannot resume, the run was another one; choose a new output folder, --fresh to start "
            "over, or the former values\n" + "\n".join(lines)
        )


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose manifest verifies; damaged ones are named and passed over."""
    found = [(int(m.group(1)), path) for path, m in _checkpoints(folder)]
    for _, path in sorted(found, reverse=True):
        fault = _fault(path)
        if fault is None:
            return path
        say(f"{path}: passed over: {fault}")
    return None


def _checkpoints(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    candidates = (folder / "checkpoints").glob("step-*")
    return [(path, m) for path in candidates if (m := re.fullmatch(r"step-(\d+)", path.name))]


def _fault(checkpoint: Path) -> str | None:
    try:
        manifest = read_json(checkpoint / _MANIFEST)
    except DataError as error:
        return str(error)
    for name, digest in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_file(path) != digest:
            return f"{name} does not match its sha256"
    return None


def retain(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints."""
    found = sorted((int(m.group(1)), path) for path, m in _checkpoints(folder))
    for _, path in found[:-keep_last]:
        shutil.rmtree(path, ignore_errors=True)
