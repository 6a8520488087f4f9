"""Tensors on their way into a GGUF file: which precision each is stored in, and one at a time in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_train.errors import ExportError
from llava_train.exporters.target import Request

_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_QUANTISED = {"int8": "Q8_0", "int4": "Q4_0"}
_BLOCK = 32
"""Weights that share a scale, in both; a row is a whole number of blocks."""


def gguf_package() -> Any:
    """The `gguf` package. Raises ExportError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ExportError(f"GGUF files need a package: {error}; pip install 'llava-train[gguf]'") from error
    return gguf


@dataclass(frozen=True)
class Entry:
    """A tensor of a GGUF file.

    Attributes:
        name: as llama.cpp has it.
        tensor: what it is made from.
        change: done to a float32 copy on the way (permutations, sums); it must not change the shape but for `shape`.
        linear: the weight of a linear layer of the language model, which may be quantised.
        exact: kept in float32 whatever is asked for (norms, biases, positions: llama.cpp wants them so).
        shape: what `change` gives, where that is another shape.
    """

    name: str
    tensor: torch.Tensor
    change: Callable[[torch.Tensor], torch.Tensor] | None = None
    linear: bool = False
    exact: bool = False
    shape: tuple[int, ...] | None = None

    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the file, outermost dimension first."""
        return self.shape or tuple(self.tensor.shape)

    def stored_as(self, request: Request) -> str:
        """Name of the GGML type."""
        shape = self.stored_shape()
        if self.exact or len(shape) == 1:
            return "F32"
        if request.quantize and self.linear and shape[-1] % _BLOCK == 0:
            return _QUANTISED[request.quantize]
        return _STORED[request.dtype]

    def values(self) -> np.ndarray:
        """float32, changed as it goes into the file."""
        tensor = self.tensor.detach().float().cpu()
        if self.change is not None:
            tensor = self.change(tensor)
        assert tuple(tensor.shape) == self.stored_shape(), (self.name, tensor.shape)
        return np.ascontiguousarray(tensor.numpy())


def write_file(path: Path, writer: Any, entries: Sequence[Entry], request: Request) -> None:
    """Write a file whose metadata `writer` holds, tensor by tensor."""
    gguf = gguf_package()
    kinds = [gguf.GGMLQuantizationType[entry.stored_as(request)] for entry in entries]
    for entry, kind in zip(entries, kinds):
        shape, (elements, size) = entry.stored_shape(), gguf.GGML_QUANT_SIZES[kind]
        # With any type but bytes, the shape is taken as that of the numbers.
        writer.add_tensor_info(
            entry.name, shape, np.dtype(np.float32), math.prod(shape) // elements * size, raw_dtype=kind
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry, kind in zip(entries, kinds):
        writer.write_tensor_data(gguf.quants.quantize(entry.values(), kind))
    writer.close()


def round_as_stored(entries: Sequence[Entry], request: Request) -> None:
    """Have the weights that are quantised in the file hold what a reader unpacks.

    A block lies within a row and `change` moves whole rows at most, so each row is rounded where it is.
    """
    gguf = gguf_package()
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.stored_as(request)]
        if entry.linear and entry.stored_as(request) in _QUANTISED.values():
            packed = gguf.quants.quantize(entry.tensor.detach().float().cpu().numpy(), kind)
            entry.tensor.detach().copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))
