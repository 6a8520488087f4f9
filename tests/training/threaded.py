"""Ranks that are threads of one process: what they say to one another is real, a process group is not needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from llava_train.training.engines.ranks import Ranks

T = TypeVar("T")
_PATIENCE_S = 20


class Meeting:
    """Where the threads leave their values."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=_PATIENCE_S)
        self.values: list[list[float]] = [[] for _ in range(count)]


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """One of `world_size` threads."""

    meeting: Meeting

    def total(self, values: list[float]) -> list[float]:
        self.meeting.values[self.rank] = values
        self.meeting.barrier.wait()
        sums = [sum(parts) for parts in zip(*self.meeting.values, strict=True)]
        self.meeting.barrier.wait()
        return sums


def together(count: int, work: Callable[[Ranks], T]) -> list[T | Exception]:
    """What `work` returns or raises on each of `count` ranks."""
    meeting = Meeting(count)

    def caught(rank: int) -> Any:
        try:
            return work(ThreadRanks(rank, count, torch.device("cpu"), meeting))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(caught, range(count)))
