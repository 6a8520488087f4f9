"""What a rank holds of the trained weights and the optimizer's moments, as one safetensors file a rank.

A key is `<weight>.<kind>@<first element>`: a run of elements of the flattened weight, or of a moment of its shape. Any
engine on any number of ranks finds its own runs in the files of any other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llava_train.errors import CheckpointError
from llava_train.tensorfile import Entry
from llava_train.training.engines.base import Fragment

WEIGHT, STEP = "weight", "step"
MOMENTS = ("exp_avg", "exp_avg_sq")
FILES = "state-*.safetensors"


def shard_name(rank: int, world_size: int) -> str:
    """File name of a rank's shard."""
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def shard_entries(fragments: Iterable[Fragment], optimizer: torch.optim.Optimizer, copied: bool) -> list[Entry]:
    """Entries of a rank's file. `copied` takes the values now, so that training may go on while they are written."""
    entries = []
    for fragment in fragments:
        values = optimizer.state.get(fragment.owner, {})
        tensors = {WEIGHT: fragment.of(fragment.owner)}
        tensors |= {kind: fragment.of(values[kind]) for kind in MOMENTS if kind in values}
        if STEP in values:
            tensors[STEP] = torch.as_tensor(values[STEP], dtype=torch.float32).reshape(1)
        for kind, tensor in tensors.items():
            held = tensor.detach().to("cpu", copy=True) if copied or kind == STEP else tensor
            name = f"{fragment.name}.{kind}@{fragment.start}"
            entries.append(Entry(name, torch.float32, tuple(tensor.shape), partial(_same, held)))
    return entries


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def shard_bytes(weights: int) -> int:
    """Bytes of a checkpoint over `weights` trained weights: themselves and two moments, in float32."""
    return 3 * 4 * weights


def load_shards(
    folder: Path, fragments: list[Fragment], optimizer: torch.optim.Optimizer, names: Iterable[str]
) -> None:
    """Fill fragments and the optimizer's state from the files in `folder`, whatever ranks wrote them.

    Raises CheckpointError where other weights train now (`names`, over all ranks), or elements are missing.
    """
    with ExitStack() as stack:
        pieces = _index(folder, stack)
        here, there = set(names), {name for name, kind in pieces if kind == WEIGHT}
        if here != there:
            raise CheckpointError(f"{folder}: other weights train now: {', '.join(sorted(here ^ there)[:10])}")
        for fragment in fragments:
            _read(pieces[fragment.name, WEIGHT], fragment.start, fragment.of(fragment.owner), folder, fragment.name)
            if (fragment.name, STEP) in pieces:
                _load_moments(pieces, fragment, optimizer, folder)


def _load_moments(pieces: Any, fragment: Fragment, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    values = optimizer.state[fragment.owner]
    for kind in MOMENTS:
        if kind not in values:
            values[kind] = torch.zeros_like(fragment.owner, requires_grad=False)
        _read(pieces[fragment.name, kind], fragment.start, fragment.of(values[kind]), folder, fragment.name)
    *_, file, key = pieces[fragment.name, STEP][0]
    values[STEP] = file.get_tensor(key).reshape(())


def _index(folder: Path, stack: ExitStack) -> dict[tuple[str, str], list[tuple[int, int, Any, str]]]:
    """(weight, kind) -> its pieces: first element, number of elements, open file, key."""
    pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
    for path in sorted(folder.glob(FILES)):
        try:
            file = stack.enter_context(safe_open(str(path), framework="pt"))
            for key in file.keys():  # noqa: SIM118  (no mapping)
                named, _, start = key.rpartition("@")
                name, _, kind = named.rpartition(".")
                pieces[name, kind].append((int(start), file.get_slice(key).get_shape()[0], file, key))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read as a shard of a checkpoint: {error}") from error
    return dict(pieces)


def _read(pieces: list[tuple[int, int, Any, str]], start: int, target: torch.Tensor, folder: Path, name: str) -> None:
    """Copy elements `start`, `start + 1`, ... of a weight into `target` (count,), from whichever files hold them."""
    end, found = start + len(target), 0
    for first, count, file, key in pieces:
        low, high = max(start, first), min(end, first + count)
        if low < high:
            target[low - start : high - start].copy_(file.get_slice(key)[low - first : high - first])
            found += high - low
    if found != len(target):
        raise CheckpointError(f"{folder}: holds {found:,} of the {len(target):,} elements of {name} that are wanted")
