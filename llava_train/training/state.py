"""Where a run stands, and the random numbers of its steps. What is written of it lies in `checkpoints/`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass
class RunState:
    """Steps done, and the best validation loss with its step."""

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank, so that a resumed step draws the same dropout."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
