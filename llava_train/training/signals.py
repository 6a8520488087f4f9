"""Signals that ask a run to stop: the step in flight is finished and saved; a second signal ends at once.

Python runs a signal's handler in the main thread, and only between two of its instructions: a thread that waits
for other ranks in C++ never gets there. So the interpreter's wakeup descriptor is listened to, in a thread.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from llava_train.training.monitor import say

# What a person, a launcher, a lost terminal and Slurm (`--signal=USR1@180`; submitit: USR2) send.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# A launcher passes on what its workers got already, or sends SIGINT and then SIGTERM: one request, not two.
SAME_REQUEST_SECONDS = 2.0


class StopRequest:
    """Whether the run was asked to stop, and by which signal: `number` is the first one's, 0 until then."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.number != 0

    def note(self, number: int) -> None:
        """A signal has come; ends the process, with 128 + number, if it is the second request."""
        if not self.number:
            self.number, self._since = number, time.monotonic()
            if number == signal.SIGHUP:
                _forget_terminal()
            name = signal.Signals(number).name
            say(f"{name}: stopping after this step, with a checkpoint; again in 2 s or later to stop at once")
        elif time.monotonic() - self._since >= SAME_REQUEST_SECONDS:
            with suppress(OSError):
                rank = os.environ.get("RANK", "0")
                os.write(2, f"\nllava-train: rank {rank}: stopped at once, by a second signal\n".encode())
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + number)


@contextmanager
def deferred_stop() -> Iterator[StopRequest]:
    """Yield a StopRequest that is called to learn whether a stop was asked for.

    Signals that the process ignores (under `nohup`, say) stay ignored. Outside the main thread all are left alone.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    former = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    listener = threading.Thread(target=_listen, args=(reader, request), name="signals", daemon=True)
    listener.start()
    former_descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in former:
        signal.signal(number, _wake)
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(former_descriptor)
        os.write(writer, b"\0")  # no signal: it ends the listener (workers hold the pipe too, so closing it would not)
        listener.join()
        os.close(writer)
        os.close(reader)


def _wake(number: int, frame: FrameType | None) -> None:
    """Nothing is left to do in the main thread; having a handler is what feeds the wakeup descriptor."""


def _listen(reader: int, request: StopRequest) -> None:
    while 0 not in (numbers := os.read(reader, 64)):  # a byte a signal; others than ours have their own handlers
        for number in numbers:
            if signal.getsignal(number) is _wake:
                request.note(number)


def _forget_terminal() -> None:
    """Writing to a terminal that hung up is an error; the run is to live on to its checkpoint."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # isatty denies it, once it hung up
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def shield_worker(worker: int = 0) -> None:
    """In a data worker (it is a `worker_init_fn`): what asks the run to stop neither ends the workers, which the last
    step may need, nor is reported to the run by them. A second SIGTERM ends a worker that does not leave.

    Launchers signal whole process groups: torchrun does, and so does a terminal.
    """
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, _first_term if number == signal.SIGTERM else signal.SIG_IGN)


def _first_term(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def _in_child() -> None:
    """A process forked in the midst of a run shares its wakeup descriptor; torch's workers call `shield_worker` later,
    for torch sets handlers of its own."""
    if any(signal.getsignal(number) is _wake for number in STOP_SIGNALS):
        shield_worker()


os.register_at_fork(after_in_child=_in_child)
