"""Timing of steps, and figures from what they did."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gpu.shapes import Sample, counts_of
from llava_train.model.costs import Costs, step_flops

Send = Callable[[dict[str, Any]], None]
"""Takes what a job found so far; the last one counts."""
LEAST, MOST = 2, 50
"""Timed steps."""


class Meter:
    """Counts a side's steps. The first is not timed: kernels are loaded, chosen and compiled in it.

    After each step the figures so far go to `send`, so that a job that is cut short leaves what it has.
    """

    def __init__(
        self, costs: Costs, modes: Mapping[str, str], device: torch.device, seconds: float, send: Send
    ) -> None:
        self.costs, self.modes, self.device, self.seconds, self.send = costs, modes, device, seconds, send
        self.settings: dict[str, Any] = {}
        self.losses: list[float] = []
        self._samples: list[Sample] = []
        self._positions = self._steps = 0
        self._warmup = self._first = 0.0
        self._stalled: float | None = None
        self._begun = 0.0

    def begin(self) -> None:
        """The model is ready; what comes now is warm-up, then steps. Peaks of memory count from here."""
        self._begun = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def described(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in self.settings.items()}

    def step(self, samples: Sequence[Sample], positions: int, stalled: float | None = None) -> bool:
        """A step of `samples` in `positions` (padding counts) ended, after `stalled` seconds of waiting for its data
        (None: not known); whether these were enough."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if not self._first:
            self._first, self._warmup = now, now - self._begun
            return False
        self._samples += samples
        self._positions += positions
        if stalled is not None:
            self._stalled = (self._stalled or 0.0) + stalled
        self._steps += 1
        self.send(self.figures(now))
        return self._steps >= MOST or (self._steps >= LEAST and now - self._first >= self.seconds)

    def figures(self, now: float) -> dict[str, Any]:
        """What the timed steps come to; see `rates` and the script's description."""
        seconds = now - self._first
        return {
            "settings": self.described(),
            "steps": self._steps,
            "warmup_seconds": round(self._warmup, 2),
            **rates(self.costs, self.modes, self._samples, self._positions, seconds),
            "stall": None if self._stalled is None else self._stalled / seconds,
            **memory(self.device),
            "losses": [round(loss, 4) for loss in (*self.losses[:1], *self.losses[-1:])],
        }


def rates(
    costs: Costs, modes: Mapping[str, str], samples: Sequence[Sample], positions: int, seconds: float
) -> dict[str, Any]:
    """Rates of `samples` that took `seconds`. FLOPs are those needed, in units of 10^12: by part a sample, and a
    second. `padding` is the share of positions that held no token."""
    counts = counts_of(samples)
    needed = step_flops(costs, counts, modes)
    return {
        "samples": len(samples),
        "seconds": seconds,
        "samples_per_second": len(samples) / seconds,
        "tokens_per_second": counts.tokens / seconds,
        "mean_tokens": counts.tokens / len(samples),
        "padding": 1 - counts.tokens / positions,
        "tflop_per_sample": {part: flops / len(samples) / 1e12 for part, flops in needed.items()},
        "needed_tflops": sum(needed.values()) / seconds / 1e12,
    }


def memory(device: torch.device) -> dict[str, float]:
    """Peaks of the device's memory in GB; nothing for a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_memory_gb": torch.cuda.max_memory_reserved() / 1e9,
    }
