"""A safetensors file written as a stream: one tensor in memory at a time, hashed on its way to the disk.

`safetensors.torch.save_file` wants every tensor at once. A weight that is spread over ranks exists whole only while
it is gathered, and a checkpoint of 84 GB should neither be held twice nor be read again for its sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from llava_train.files import storage_faults

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 16 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: what the header says of it, and how to get it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    get: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


def in_file_order(entries: Iterable[Entry]) -> list[Entry]:
    """Entries as they lie in the file: the widest types first, so that each starts at a multiple of its width."""
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))


def write_tensors(path: Path, entries: Iterable[Entry]) -> str:
    """Write a safetensors file, flush it to the disk and return the hex sha256 of its bytes.

    `get` of each entry is called once, in the order of `in_file_order`. Raises StorageError that names bytes needed
    and free where the disk is full, and ValueError where a tensor is not what its entry says.
    """
    ordered = in_file_order(entries)
    header = _header(ordered)
    needed = len(header) + sum(entry.nbytes for entry in ordered)
    digest = hashlib.sha256(header)
    with storage_faults(path, needed), path.open("wb") as stream:
        stream.write(header)
        for entry in ordered:
            for part in _content(entry).split(_CHUNK):
                chunk = part.clone().numpy().data  # a copy: a storage that numpy has seen can't be resized (FSDP2 does)
                digest.update(chunk)
                stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _header(ordered: list[Entry]) -> bytes:
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in ordered:
        start, end = end, end + entry.nbytes
        described[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _content(entry: Entry) -> torch.Tensor:
    """The tensor's bytes."""
    tensor = entry.get().detach().cpu().contiguous()
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        raise ValueError(
            f"{entry.name}: is {tensor.dtype} {tuple(tensor.shape)}, was announced as {entry.dtype} {entry.shape}"
        )
    return tensor.reshape(-1).view(torch.uint8)
