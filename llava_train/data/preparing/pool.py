"""A pool of processes over pieces: outcomes come back in the order of the pieces, a bounded number is under way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.process import BaseProcess
from pathlib import Path

from llava_train.data.preparing.pieces import Outcome, make_piece
from llava_train.data.preparing.rows import Job
from llava_train.data.records.containers import Piece
from llava_train.errors import TrainingError
from llava_train.files import sweep

_UNDER_WAY = 2
"""Pieces a worker may have waiting: enough that none waits, few enough that memory stays flat."""


@dataclass(frozen=True)
class PieceTask:
    """A piece of source number `source` and the key of its result."""

    source: int
    piece: Piece
    key: str


def run_pieces(
    tasks: Iterator[PieceTask],
    jobs: Sequence[Job],
    folder: Path,
    known: Callable[[PieceTask], Outcome | None],
    workers: int = 0,
) -> Iterator[tuple[PieceTask, Outcome]]:
    """Make each piece that `known` does not have already; a single piece is made in this process.

    Raises TrainingError if a worker dies, naming what it may have been at.
    """
    sweep(folder)
    workers = workers or _cores()
    head = list(islice(tasks, 2))
    tasks = chain(head, tasks)
    if workers == 1 or len(head) < 2:
        for task in tasks:
            yield task, known(task) or make_piece(task.piece, jobs[task.source], folder, task.key)
        return
    # Forked workers share the tokenizers in memory and start at once; where there is no fork they are sent over.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(tuple(jobs), folder, os.getpid())) as pool:
        try:
            yield from _in_order(tasks, pool, known, workers * _UNDER_WAY)
        except BaseException:
            _stop(set(multiprocessing.active_children()) - others, folder)
            # Python before 3.11.6 waits for what is on its way to workers that are gone (gh-94777) as long as a reader
            # is left, and the last one is this process itself.
            pool._call_queue._reader.close()  # type: ignore[attr-defined]
            raise


def _stop(workers: set[BaseProcess], folder: Path) -> None:
    """End the workers at once, and remove what they were writing."""
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join()
        for path in folder.glob(f".*.{worker.pid}-*.tmp"):
            path.unlink(missing_ok=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_order(
    tasks: Iterator[PieceTask], pool: ProcessPoolExecutor, known: Callable[[PieceTask], Outcome | None], limit: int
) -> Iterator[tuple[PieceTask, Outcome]]:
    waiting: deque[tuple[PieceTask, Outcome | Future[Outcome]]] = deque()
    for task in chain(tasks, [None] * limit):
        if task is not None:
            waiting.append((task, known(task) or pool.submit(_work, task)))
        if waiting and (len(waiting) >= limit or task is None):
            first, outcome = waiting.popleft()
            try:
                yield first, outcome.result() if isinstance(outcome, Future) else outcome
            except BrokenProcessPool as error:
                raise TrainingError(
                    f"a worker process died while preparing {first.piece.path} from record {first.piece.first} on, or "
                    "a piece near it (killed, or out of memory?); what is done is kept: the same command goes on, "
                    "with data.prepare_workers=1 in this process"
                ) from error


_jobs: tuple[Job, ...] = ()
_folder = Path()


def _start(jobs: tuple[Job, ...], folder: Path, parent: int) -> None:
    """In a worker: what every task needs; Ctrl-C is the parent's to handle, and a worker ends with its parent."""
    global _jobs, _folder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # The tokenizers' threads do not survive a fork, and the pool keeps the cores busy without them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _jobs, _folder = jobs, folder


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(task: PieceTask) -> Outcome:
    return make_piece(task.piece, _jobs[task.source], _folder, task.key)
