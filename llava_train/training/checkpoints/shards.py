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
from llava_train.model.screening import count_tensors
from llava_train.model.tuning import Group
from llava_train.tensorfile import Entry
from llava_train.training.checkpoints.manifest import read_manifest
from llava_train.training.engines.base import Fragment

WEIGHT, STEP = "weight", "step"
MOMENTS = ("exp_avg", "exp_avg_sq")

_Piece = tuple[int, int, Any, str]
"""First element, number of elements, open file, key."""
_Pieces = dict[tuple[str, str], list[_Piece]]
"""(weight, kind) -> its pieces in order."""


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


def load_shards(folder: Path, fragments: list[Fragment], optimizer: torch.optim.Optimizer, groups: list[Group]) -> None:
    """Fill fragments and the optimizer's state from the files in `folder`, whatever ranks wrote them.

    Raises CheckpointError where other weights train now (`groups`, over all ranks), or elements are missing.
    """
    with ExitStack() as stack:
        pieces = _index(folder, stack)
        weights = {name: found for (name, kind), found in pieces.items() if kind == WEIGHT}
        other = weights.keys() ^ {name for group in groups for name in group.names}
        if other:
            raise CheckpointError(f"{folder}: other weights train now: {', '.join(sorted(other)[:10])}")
        here, there = sum(group.size for group in groups), sum(n for found in weights.values() for _, n, *_ in found)
        if here != there:
            raise CheckpointError(f"{folder}: holds {there:,} trained elements, {here:,} train now: shapes changed")
        for fragment in fragments:
            _read(pieces[fragment.name, WEIGHT], fragment, fragment.owner, folder)
            if (fragment.name, STEP) in pieces:
                _load_moments(pieces, fragment, optimizer, folder)


def _load_moments(pieces: _Pieces, fragment: Fragment, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    values = optimizer.state[fragment.owner]
    for kind in MOMENTS:
        if kind not in values:
            values[kind] = torch.zeros_like(fragment.owner, requires_grad=False)
        _read(pieces.get((fragment.name, kind), []), fragment, values[kind], folder)
    *_, file, key = pieces[fragment.name, STEP][0]
    values[STEP] = file.get_tensor(key).reshape(())


def _index(folder: Path, stack: ExitStack) -> _Pieces:
    """The pieces in the files that the manifest names: no other file was verified."""
    pieces: _Pieces = defaultdict(list)
    try:
        paths = [folder / name for name in sorted(read_manifest(folder)) if name.endswith(".safetensors")]
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    for path in paths:
        try:
            count_tensors(folder, path.name)
            file = stack.enter_context(safe_open(str(path), framework="pt"))
            for key in file.keys():  # noqa: SIM118  (no mapping)
                named, _, start = key.rpartition("@")
                name, _, kind = named.rpartition(".")
                pieces[name, kind].append((int(start), file.get_slice(key).get_shape()[0], file, key))
        except (SafetensorError, OSError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path}: cannot be read as a shard of a checkpoint: {error}") from error
    return {key: sorted(found, key=lambda piece: piece[0]) for key, found in pieces.items()}


def _read(pieces: list[_Piece], fragment: Fragment, tensor: torch.Tensor, folder: Path) -> None:
    """Fill a fragment's elements of its owner, or of a moment of its shape, from whichever files hold them."""
    target, start = fragment.of(tensor), fragment.start
    done, end = start, start + fragment.count
    for first, count, file, key in pieces:
        high = min(end, first + count)
        if first <= done < high:
            target[done - start : high - start].copy_(file.get_slice(key)[done - first : high - first])
            done = high
    if done < end:
        raise CheckpointError(f"{folder}: element {done:,} of {fragment.name} is missing; use another checkpoint")
