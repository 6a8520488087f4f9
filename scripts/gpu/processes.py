"""A case in a process of its own: a fault of the device, a hang or a lack of memory ends that case and no other.

The process is forked from one that has imported everything and never touched the device, so that it starts at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from gpu.cases import Case
from gpu.meter import Send
from gpu.ours import Conditioned

LONGEST_ERROR = 1500
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")
POISONED = ("forked subprocess", "initialization error")
"""What is said where the parent has touched the device after all"""


@dataclass
class Outcome:
    """What a case came to: its figures, all of them ("done"), those it had when it was stopped ("cut short"), or none
    ("error", "out of memory"), and why."""

    status: str
    figures: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


def run_case(case: Case, run: Conditioned, limit: float, method: str = "fork") -> Outcome:
    """Run a case for at most `limit` seconds; never raises. `method` is multiprocessing's."""
    started = time.monotonic()
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, run, sender))
    process.start()
    sender.close()
    outcome = Outcome("error", error="the process ended without a word")
    try:
        _listen(receiver, outcome, run, started + limit)
    finally:
        _end(process, 0 if outcome.status == "cut short" else 2)
        receiver.close()
    if outcome.status == "error" and process.exitcode not in (0, None) and not outcome.error.startswith("Traceback"):
        outcome.error = f"the process ended with status {process.exitcode}"
    outcome.seconds = time.monotonic() - started
    if method == "fork" and any(sign in outcome.error for sign in POISONED):
        return run_case(case, run, limit, "spawn")
    return outcome


def _listen(receiver: Connection, outcome: Outcome, run: Conditioned, deadline: float) -> None:
    """Take what the process sends until it says how it ended, its end, or the deadline."""
    while True:
        left = deadline - time.monotonic()
        try:
            if left <= 0 or not receiver.poll(left):
                break
            status, found, known = receiver.recv()
        except (EOFError, OSError):
            return
        run.known.update(known)
        if status == "found":
            outcome.figures = found
            continue
        outcome.status, outcome.error = status, found
        return
    outcome.status, outcome.error = "cut short", "its time was over"


def _end(process: Any, seconds: float) -> None:
    """Wait for its end, then kill the process and those it started."""
    process.join(seconds)
    for kill in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
        try:
            kill()
        except (ProcessLookupError, PermissionError):
            continue
    process.join(10)


def _child(case: Case, run: Conditioned, sender: Connection) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        job(case)(case, run, lambda found: sender.send(("found", found, run.known)))
        sender.send(("done", "", run.known))
    except BaseException as error:  # told to the parent, whatever it is
        text = traceback.format_exc()
        lacking = any(sign in str(error) for sign in OUT_OF_MEMORY)
        sender.send(("out of memory" if lacking else "error", "Traceback ..." + text[-LONGEST_ERROR:], {}))
    sys.stdout.flush()
    sys.stderr.flush()
    sender.close()
    os._exit(0)  # what the parent would do at its end is not ours to do


def job(case: Case) -> Callable[[Case, Conditioned, Send], None]:
    """The function that measures a case."""
    from gpu import equality, ours, probe, trainer

    kinds = {"cuda": (("blocks", "varlen"), ("flex",)), "cpu": (("blocks",), ("dense",))}
    return {
        "probe": lambda case, run, send: probe.probe(run, send),
        "equality": lambda case, run, send: equality.check(run, send, kinds[run.device][0]),
        "equality_flex": lambda case, run, send: equality.check(run, send, kinds[run.device][1]),
        "ours": ours.measure,
        "trainer": trainer.measure,
    }[case.job]
