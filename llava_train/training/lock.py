"""One run a folder: the second is refused before it touches anything."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_train.errors import RecipeError
from llava_train.files import ensure_space
from llava_train.training.engines.ranks import Ranks
from llava_train.training.monitor import say


@contextmanager
def sole_run(folder: Path, is_main: bool) -> Iterator[None]:
    """Hold a run folder for as long as the body runs; rank 0 does it for all ranks of a run.

    The lock is the system's (flock on `.lock`), so it ends with its process, however that ends. Raises RecipeError
    that names the process which holds it.
    """
    if not is_main:
        yield
        return
    ensure_space(folder, 1_000_000, "a run")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecipeError(f"{folder}: {_holder(folder)} is at work here; choose another output folder") from error
        except OSError as error:
            say(f"warning: {folder} cannot be locked ({error.strerror}); see to it that no other run writes there")
        stream.truncate(0)
        stream.write(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": time.time()}))
        stream.flush()
        _HELD.add(stream.fileno())
        try:
            yield
        finally:
            _HELD.discard(stream.fileno())


_HELD: set[int] = set()
"""Descriptors of locks: forked data workers let go of them, or the lock would outlive a run that is killed."""


def _let_go() -> None:
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)


def _holder(folder: Path) -> str:
    try:
        held = json.loads((folder / ".lock").read_text(encoding="utf-8"))
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(held["since"]))
        return f"another run (process {held['process']} on {held['host']}, since {since})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"


def require_shared(folder: Path, ranks: Ranks) -> None:
    """Raise RecipeError where a rank sees another folder under this name than rank 0 does. Every rank calls it."""
    mark = ranks.agree(secrets.randbits(48))
    path = folder / ".shared"
    if ranks.is_main:
        path.write_text(str(mark), encoding="utf-8")
    ranks.barrier()
    try:
        here = path.read_text(encoding="utf-8") == str(mark)
    except OSError:
        here = False
    apart = ranks.total([float(not here)])[0]
    if ranks.is_main:
        path.unlink()
    if apart:
        where = f" (rank {ranks.rank} on {socket.gethostname()} sees another)" if not here else ""
        raise RecipeError(
            f"{folder}: is not one folder for all ranks{where}; put `output` and `data.cache_dir` on a disk that every "
            "node has"
        )
