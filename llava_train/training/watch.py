"""A rank that died or hangs ends the run: every other rank says which one it was, and leaves.

Each rank tells a store, once a second, that it lives and where its main thread stands. Rank 0 hosts the store, and
judges (see judge.py); the others watch rank 0, whose store falls silent with it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed

from llava_train.errors import StoppedError, TrainingError
from llava_train.training.judge import BROKEN, DONE, ENDED, FAILED, FAULTS, STOPPED, Beat, Judge, Limits, Verdict
from llava_train.training.monitor import say

_VERDICT = "verdict"


class Watch:
    """Where the main thread stands. All ranks make the same marks in the same order, or they seem to lag."""

    def __init__(self) -> None:
        self.where = (0, 0, "the start")
        self.is_patient = False

    def at(self, step: int, what: str) -> None:
        """Mark that the main thread has come to `what` ("forward") of a step (counted from 1)."""
        before, mark, _ = self.where
        self.where = (step, mark + 1 if step == before else 0, f"step {step}: {what}")

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Around what may rightly take long (preparing, a checkpoint): here only silence is held against a rank."""
        before, self.is_patient = self.is_patient, True
        try:
            yield
        finally:
            self.is_patient = before


@contextmanager
def watching(rank: int, world_size: int, device: torch.device, limits: Limits) -> Iterator[Watch]:
    """Watch over the ranks of a run while the body runs; all enter together, with the process group up.

    A rank whose main thread does not come back is ended by `os._exit(1)`, after a line on stderr that names the rank at
    fault. Where an error that another rank's end brought about comes out of the body, TrainingError says the same.
    """
    watch = Watch()
    beat = Beat(rank, os.getpid(), socket.gethostname(), _identity(os.getpid()))
    store = _meet(beat, device) if world_size > 1 else None
    if store is None:
        yield watch
        return
    member = _Member(beat, world_size, store, watch, limits)
    try:
        yield watch
    except BaseException as error:
        # A collective whose peer is gone raises a RuntimeError; so does a GPU out of memory.
        fault = BROKEN if isinstance(error, RuntimeError) else FAILED
        manner = STOPPED if isinstance(error, (KeyboardInterrupt, StoppedError)) else fault
        verdict = member.leave(manner)
        if manner == BROKEN and verdict and rank not in verdict.blamed:
            raise TrainingError(member.line(verdict)) from error
        raise
    verdict = member.leave(DONE)
    if verdict:
        raise TrainingError(member.line(verdict))


def _meet(beat: Beat, device: torch.device) -> torch.distributed.TCPStore | None:
    """A store of our own on rank 0's machine with a beat of every rank; None where a rank cannot reach it."""
    store = None
    port = torch.zeros(1, dtype=torch.int64, device=device)
    if beat.rank == 0:
        store = _store(0, True)
        store.set(_VERDICT, "")
        port += store.port
    torch.distributed.broadcast(port, 0)
    with suppress(RuntimeError):
        store = store or _store(int(port), False)
        store.set(f"beat/{beat.rank}", json.dumps(asdict(beat)))
    met = torch.tensor([int(store is not None)], device=device)
    torch.distributed.all_reduce(met, torch.distributed.ReduceOp.MIN)
    if int(met) == 1:
        return store
    say("a rank cannot reach rank 0 to be watched; a dead or hung rank will not be named")
    return None


def _store(port: int, host: bool) -> torch.distributed.TCPStore:
    """Rank 0's machine is where the launcher says that the ranks meet."""
    address = "localhost" if host else os.environ.get("MASTER_ADDR", "localhost")
    wait = timedelta(seconds=10)
    return torch.distributed.TCPStore(address, port, is_master=host, timeout=wait, wait_for_workers=False)


class _Member:
    """One rank's part. Two threads: one speaks with the store, and may hang with it; one judges, and ends."""

    def __init__(
        self, beat: Beat, world_size: int, store: torch.distributed.TCPStore, watch: Watch, limits: Limits
    ) -> None:
        self.rank, self.world_size, self.watch, self.limits = beat.rank, world_size, watch, limits
        self._store: torch.distributed.TCPStore | None = store
        self._port, self._beat = store.port, beat
        self._left, self._lock = "", threading.Lock()
        self._beats: list[Beat] = []
        self._received: Verdict | None = None
        self._verdict: Verdict | None = None
        self._judged, self._told, self._hurry, self._over = (threading.Event() for _ in range(4))
        self._talk(store)
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._exchange, self._judge)]
        for thread in self._threads:
            thread.start()

    def line(self, verdict: Verdict) -> str:
        """The verdict as it is told."""
        return f"{verdict.text}; ending rank {self.rank}. The same command goes on from the last checkpoint"

    def leave(self, manner: str) -> Verdict | None:
        """Say goodbye and stop watching. What ended the run, where that has become known."""
        with self._lock:
            ended, self._left = bool(self._left), self._left or manner
        if ended:
            threading.Event().wait()  # the judge is ending this process
        self._hurry.set()
        if self.rank == 0:
            self._judged.wait()  # the store is here: the others need it until they have left
            if self._verdict:
                self._wait_for_others(self._verdict)
        else:
            if manner == BROKEN:  # was it another rank's end that broke it?
                self._judged.wait(3 * self.limits.leave_s)
                self._hurry.set()
            self._told.wait(self.limits.beat_s)
        self._over.set()
        self._hurry.set()
        for thread in self._threads:
            thread.join(self.limits.beat_s)
        if self._verdict:
            _kill(self._verdict)
        return self._verdict

    def _exchange(self) -> None:
        """Tell and be told, every beat."""
        while not self._over.is_set():
            try:
                self._store = self._store or _store(self._port, False)
                self._talk(self._store)
            except RuntimeError:  # lost: the judge counts for how long
                self._store = None
            if self._told.is_set() and self.rank > 0 and self._left != BROKEN:
                return
            self._hurry.wait(self.limits.beat_s / (10 if self._left else 1))
            self._hurry.clear()

    def _talk(self, store: torch.distributed.TCPStore) -> None:
        left, (step, mark, place), patient = self._left, self.watch.where, self.watch.is_patient
        count = self._beat.count + 1
        self._beat = replace(self._beat, count=count, step=step, mark=mark, place=place, patient=patient, left=left)
        store.set(f"beat/{self.rank}", json.dumps(asdict(self._beat)))
        seen = range(self.world_size) if self.rank == 0 else (0,)
        verdict, *beats = store.multi_get([_VERDICT, *(f"beat/{rank}" for rank in seen)])
        self._beats = [Beat(**json.loads(beat)) for beat in beats]
        self._received = Verdict(**json.loads(verdict)) if verdict else None
        if left and left != BROKEN:
            self._told.set()

    def _judge(self) -> None:
        judge, limits = Judge(self.world_size, self.limits), self.limits
        heard: list[Beat] = []
        # Seconds that this process was awake: a job that was suspended finds nobody silent when it goes on.
        awake, left_at, last = 0.0, 0.0, time.monotonic()
        while not self._over.wait(limits.beat_s / 4):
            now = time.monotonic()
            awake, last = awake + min(now - last, limits.beat_s), now
            if self._beats is not heard:
                heard = self._beats
                judge.hear(heard, awake)
            if self.rank == 0:
                verdict = judge.verdict(awake)
            else:
                left_at = left_at if self._left in FAULTS else awake
                limit = limits.leave_s if awake - left_at > limits.leave_s else limits.silence_s
                verdict = self._received or judge.silent(awake, limit)
            if verdict:
                self._pass(verdict)
            if verdict or (self.rank == 0 and judge.over):
                self._judged.set()
                return

    def _pass(self, verdict: Verdict) -> None:
        """Tell the verdict, and end this process unless its main thread is leaving by itself."""
        with self._lock:
            self._verdict = verdict
            leaving = bool(self._left)
            self._left = ENDED if self._left in ("", BROKEN) else self._left
        if self.rank == 0 and self._store:
            self._store.set(_VERDICT, json.dumps(asdict(verdict)))
        if leaving:
            return
        self._hurry.set()
        _print(f"\nllava-train: {self.line(verdict)}\n")
        if verdict.stacks and self.rank in verdict.blamed:
            _print(f"rank {self.rank} stands here:\n{_main_stack()}")
        if self.rank == 0:
            self._wait_for_others(verdict)
        else:
            self._told.wait(2 * self.limits.beat_s)
        _kill(verdict)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)

    def _wait_for_others(self, verdict: Verdict) -> None:
        """Rank 0 keeps the store until those that can have read the verdict, or have had the time to."""
        end = time.monotonic() + 3 * self.limits.beat_s
        lost = set() if verdict.stacks else {rank for rank in verdict.blamed if not self._beats[rank].left}
        while time.monotonic() < end and any(
            beat.left in ("", BROKEN) for beat in self._beats if beat.rank not in {0, *lost}
        ):
            time.sleep(self.limits.beat_s / 10)


def _print(text: str) -> None:
    """To stderr past its lock, which a main thread that hangs may hold."""
    with suppress(OSError):
        os.write(2, text.encode())


def _main_stack() -> str:
    """Where the main thread is; its source is not read, for the disk may be what hangs."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    places = [
        f'  File "{f.f_code.co_filename}", line {at}, in {f.f_code.co_name}' for f, at in traceback.walk_stack(frame)
    ]
    return "\n".join(reversed(places)) + "\n"


def _identity(process: int) -> str:
    """What tells a process of this machine from any other, on any machine, at any time; empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        born = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        return f"{boot} {Path('/proc/self/ns/pid').readlink()} {born}"
    except OSError:
        return ""


def _kill(verdict: Verdict) -> None:
    """End processes that cannot end themselves (stopped ones), where they run on this machine: they keep their GPU."""
    for beat in (Beat(**values) for values in verdict.kill):
        if beat.identity and beat.identity == _identity(beat.process):
            with suppress(OSError):
                os.kill(beat.process, signal.SIGKILL)
