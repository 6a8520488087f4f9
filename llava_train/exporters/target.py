"""What an export target says and does; the table of them is `llava_train.exporters.table`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava_train.model.assemble import Assembly

if TYPE_CHECKING:
    from llava_train.exporters.verify import Reference


@dataclass(frozen=True)
class Request:
    """How a target is to write the weights: precision, and `int8` or `int4` for what is quantised on top of it."""

    dtype: torch.dtype
    quantize: str | None = None


class Target(ABC):
    """A layout that a model can be written in.

    Attributes:
        summary: what it makes and who reads it, in a line.
        merges: whether adapters are folded in before `refusal`, `write` and the reference see the model.
        quantizes: what `Request.quantize` may ask for.
    """

    summary: str
    merges: bool = True
    quantizes: tuple[str, ...] = ()

    def missing(self, request: Request) -> str | None:
        """Which package is not installed that `write` needs, and how it is; None if nothing is missing."""
        return None

    @abstractmethod
    def refusal(self, assembly: Assembly) -> str | None:
        """Why this layout cannot carry the model, as a clause; None if it can."""

    @abstractmethod
    def write(self, assembly: Assembly, folder: Path, request: Request) -> None:
        """Write the folder (which exists and is empty); the model is in `request.dtype` and may be changed.

        Where `request.quantize` is given, the model afterwards holds what a reader unpacks: that is what `prove`
        compares with, and what held-out records are measured on.

        Raises ExportError.
        """

    @abstractmethod
    def prove(self, reference: Reference, folder: Path, request: Request) -> dict[str, Any]:
        """Load what was written with the reader's own loader, in a fresh process, and compare it with the model.

        Returns what the report says of it: at least what `verify.compare` returns, and `loaded_with`.
        Raises ExportError naming what differs.
        """
