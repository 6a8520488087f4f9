"""What a refusal costs: time, and memory at its highest point."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_train.errors import LlavaTrainError

MOST_SECONDS = 2.0
"""Of the processor: a machine that is busy with other things must not fail a test."""
MOST_WAITING = 12.0
"""Of the clock: less than transformers waits for an answer at the terminal (15 s)."""
MOST_BYTES = 100 << 20


def _memory(field: str) -> int:
    """Bytes that /proc tells of this process: `VmRSS` now, `VmHWM` at most since `_forget_peak`."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def refused(load: Callable[[], object], canary: Path) -> str:
    """The message that `load` is refused with: soon, in little memory, and without having run anything."""
    _forget_peak()
    before, start, waited = _memory("VmRSS"), time.process_time(), time.monotonic()
    with pytest.raises(LlavaTrainError) as caught:
        load()
    seconds, grown = time.process_time() - start, _memory("VmHWM") - before
    assert not canary.exists(), "code of the hostile file has run"
    assert seconds <= MOST_SECONDS
    assert time.monotonic() - waited <= MOST_WAITING
    assert grown <= MOST_BYTES
    return str(caught.value)
