"""Training runs of a tiny model as forked processes, for tests that start and kill hundreds of them.

Why fork: to import torch and transformers takes longer than the run. The process that calls `load_everything` imports
them, starts no threads and computes nothing; what trains is forked from it: a process of its own in a process group
of its own, which calls what `llava-train train` calls, and a SIGKILL to it is the system's.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "stage1": ["tune.llm.mode=frozen", "data.template=plain"],
    "full": ["tune.llm.mode=full", "tune.llm.learning_rate=1e-3"],
    "lora": ["tune.lora.r=64"],
}
STEPS = 20
_SAID = re.compile(r"(?:resuming after step|finished at step) (\d+)")


def load_everything() -> None:
    """Import what training imports, so that forked processes need not."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import datasets  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import peft  # noqa: F401
    from tqdm import tqdm

    from llava_train.training import run  # noqa: F401
    from tests import tiny  # noqa: F401

    # tqdm's own lock is shared with forked processes and stays locked for ever if its holder is killed; its monitor
    # is a thread, which a process that forks must not have.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0


def make_recipe(folder: Path, hidden_size: int = 1024) -> Path:
    """A recipe of `STEPS` steps over a tiny model, tower and data made in `folder`, by a process of its own.

    A wide and shallow model makes a checkpoint of 13 to 30 MB, so that writing it takes a while, and a step is quick.
    """

    def make() -> int:
        from tests import tiny

        sizes = {**tiny.LLMS["llama"][2], "hidden_size": hidden_size, "head_dim": 16}
        tiny.LLMS["wide"] = (*tiny.LLMS["llama"][:2], sizes)
        tiny.make_llm(folder / "llm", "wide")
        tiny.make_recipe(
            folder,
            optimization__global_batch_size=4,
            optimization__epochs=4,
            checkpoint__save_every=2,
            monitor__eval_every=5,
        )
        return 0

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "parts.log").open("wb") as stream:
        os.waitpid(forked(make, stream.fileno()), 0)
    return folder / "recipe.yaml"


def forked(work: Callable[[], int], output: int, group: int = 0) -> int:
    """Do `work` in a new process of the process group `group` (0: its own); returns its id.

    `output` is the descriptor that its stdout and stderr go to, `work` returns its exit status.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgid(0, group)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    with suppress(OSError):  # it did so itself, or is over
        os.setpgid(pid, group or pid)
    return pid


def train(arguments: list[str], environment: dict[str, str]) -> int:
    """What a process does whose command is `llava-train train ARGUMENTS`; returns the exit status."""
    from tqdm import tqdm

    from llava_train.cli import main

    tqdm._instances.clear()  # the bars of the process that forked this one
    os.environ.update(environment)
    return main(["train", *arguments])


class Training:
    """`llava-train train ARGUMENTS` as one process group, a process a rank."""

    def __init__(self, arguments: list[str], log: Path, ranks: int = 1) -> None:
        self.log, self.status = log, 0
        self._pids: list[int] = []
        port = _free_port()
        with log.open("wb") as stream:
            for rank in range(ranks):
                launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                environment = {key: str(value) for key, value in launch.items()}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                work = partial(train, arguments, environment if ranks > 1 else {})
                self._pids.append(forked(work, stream.fileno(), self._pids[0] if rank else 0))
        self._running = set(self._pids)

    def over(self) -> bool:
        """Whether every process has ended; `status` is then 0, or that of one which did not end well."""
        for pid in list(self._running):
            self._ended(pid, os.WNOHANG)
        return not self._running

    def kill(self) -> bool:
        """SIGKILL whatever still runs and wait for its end; False where all had ended by themselves."""
        with suppress(ProcessLookupError):
            os.killpg(self._pids[0], signal.SIGKILL)
        for pid in list(self._running):
            self._ended(pid, 0)
        return self.status == -signal.SIGKILL

    def said(self) -> int | None:
        """The step that the command said it goes on from, or that the run is finished at."""
        found = _SAID.search(self._text())
        return int(found[1]) if found else None

    def last_words(self) -> str:
        """The end of its log, for a person to read."""
        return "\n".join([line for line in self._text().replace("\r", "\n").splitlines() if line.strip()][-8:])

    def _ended(self, pid: int, options: int) -> None:
        done, how = os.waitpid(pid, options)
        if done:
            self._running.discard(pid)
            self.status = self.status or os.waitstatus_to_exitcode(how)

    def _text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
