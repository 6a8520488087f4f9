#!/usr/bin/env python3
"""End training at every file operation of a run, one operation at a time, and judge what a resume makes of it.

    python scripts/chaos_test.py                        # every operation, two ways, one process
    python scripts/chaos_test.py --ranks 2              # two processes (gloo); rank 0, which writes, is the one to end
    python scripts/chaos_test.py --max-points 6         # an even sample

The judge is not ours: `ckpt-chaos` (PyPI, MIT) runs `llava-train train` on a tiny LoRA recipe once undisturbed and
notes every file it opens for writing, renames, makes or removes in the run folder. Then, for each of them, it runs the
command anew and ends the process right there (`before`), or with the file cut to half its size (`torn`), or as if all
that was written but not flushed were lost (`unsynced`), or with SIGTERM (`term`). It gives the same command again and
judges: PASS, HARD_FAIL (the command failed), SILENT_DIVERGENCE (another final/weights.safetensors than the undisturbed
run's), LOST_WORK (it went on from an older checkpoint than the newest complete one). Any verdict but PASS fails.

What it does not cover: it ends a process with os._exit, which is neither SIGKILL in the middle of a system call (see
scripts/crash_test.py) nor a loss of power (see the order of fsync and rename in tests/training/test_chaos.py). Only
what Python opens, and safetensors' and torch's writers, are cut.

The command that ckpt-chaos starts only asks this process to fork one that trains (see `scripts/forked_training.py`):
the libraries are loaded once, not twice a point. ckpt-chaos's injector is armed in what trains by its own function, in
the environment that it gave the command; its runner, injector and rules are as they were installed.

One JSON comes last on stdout; progress goes to stderr. Exit status 0 when every point passes, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.forked_training import forked, load_everything, make_recipe, train  # noqa: E402

VERDICTS = ("HARD_FAIL", "SILENT_DIVERGENCE", "LOST_WORK")
# Sends its arguments, its environment and its stderr to the server at argv[1]; ends as the process there ends.
CLIENT = """
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(sys.argv[1])
order = {"arguments": sys.argv[2:], "environment": dict(os.environ)}
socket.send_fds(server, [json.dumps(order).encode()], [2])
sys.exit(server.recv(1)[0])
"""
SETTINGS = [
    "optimization.max_steps=4",
    "checkpoint.save_every=2",
    "checkpoint.keep_last=100",  # the judge must find every checkpoint
    "monitor.eval_every=2",
]


def chaos_command(recipe: Path, work: Path, server: Path, options: argparse.Namespace) -> list[str]:
    """The command line of ckpt-chaos: `work` is its folder, `{out}` stands for a run folder in it."""
    judged = {
        "--checkpoint-glob": "{out}/checkpoints/step-*",
        "--step-regex": r"(?:resuming after step|finished at step) (\d+)",
        "--result-file": "{out}/final/weights.safetensors",
        "--fail-on": ",".join((*VERDICTS, "CONTROL_FAIL")),
        "--modes": options.modes,
        "--ranks": str(options.ranks),
        "--jobs": str(options.jobs),
        "--max-points": str(options.max_points),
        "--work": str(work),
    }
    train = [sys.executable, "-IS", "-c", CLIENT, str(server), str(recipe), "output={out}", *SETTINGS]
    named = [word for pair in judged.items() for word in pair]
    return [sys.executable, "-m", "ckpt_chaos", "run", *named, "--", *train]


class Server:
    """Forks a process that trains for each client that connects, and tells the client its exit status.

    A client that is killed takes its process with it.
    """

    def __init__(self, address: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(address))
        self._socket.listen()
        self._clients: dict[int, socket.socket] = {}

    def serve(self, seconds: float) -> None:
        """Take in clients, and let go those whose process has ended, for a while."""
        ready, _, _ = select.select([self._socket, *self._clients.values()], [], [], seconds)
        if self._socket in ready:
            client = self._socket.accept()[0]
            text, descriptors, *_ = socket.recv_fds(client, 1 << 20, 1)
            order = json.loads(text)
            self._clients[forked(partial(_armed_training, **order), descriptors[0])] = client
            os.close(descriptors[0])
        for process, client in list(self._clients.items()):
            if client in ready:  # nobody is at the other end
                os.killpg(process, signal.SIGKILL)
            done, how = os.waitpid(process, 0 if client in ready else os.WNOHANG)
            if done:
                with suppress(OSError):
                    client.send(bytes([os.waitstatus_to_exitcode(how) % 256]))
                client.close()
                del self._clients[process]

    def close(self) -> None:
        """End what still trains."""
        for process in self._clients:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
        self._socket.close()


def _armed_training(arguments: list[str], environment: dict[str, str]) -> int:
    """What the command would do: arm the injector as ckpt-chaos's sitecustomize does, then train."""
    from ckpt_chaos.targets.common import arm_from_env

    os.environ.clear()
    os.environ.update(environment)
    arm_from_env(int(environment.get("RANK", 0)), lazy=True)
    return train(arguments, {})


def run_chaos(command: list[str], work: Path, server: Server, log: Path) -> int:
    """Run ckpt-chaos to its end, its output in `log`; returns its exit status. Ctrl-C ends all it started."""
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        with tqdm(desc="crash points", unit="point", file=sys.stderr, dynamic_ncols=True) as bar:
            while process.poll() is None:
                server.serve(0.05)
                bar.total = bar.total or _planned(log)
                bar.update(len(list(work.glob("pt_[0-9]*/result.json"))) - bar.n)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        server.close()
    return process.returncode


def _planned(log: Path) -> int | None:
    words = log.read_text(encoding="utf-8").split()
    return int(words[words.index("crash") - 1]) if "(+1" in words else None


def figures_of(work: Path) -> dict[str, Any]:
    """What ckpt-chaos judged: counts, and a line for each point that did not pass or did not come as planned."""
    from ckpt_chaos.runner import rejudge

    rows = [row for row in rejudge(work) if not row.label.startswith("no crash")]
    found = Counter(row.verdict for row in rows)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(work.glob("pt_[0-9]*/result.json"))]
    missed = [result["label"] for result in results if not _as_planned(work, result)]
    return {
        "points": len(rows),
        "pass": found["PASS"],
        "hard_fail": found["HARD_FAIL"],
        "silent": found["SILENT_DIVERGENCE"],
        "lost_work": found["LOST_WORK"],
        "faults": [f"{row.label}: {row.verdict}" for row in rows if row.verdict != "PASS"]
        + [f"{label}: the process did not end there" for label in missed],
    }


def _as_planned(work: Path, result: dict[str, Any]) -> bool:
    """Whether the process ended at its point. ckpt-chaos compares names; those of temporary files differ each time."""
    number = result["point"][0]
    there = _operation(work / f"pt_{result['order']:03d}" / "events.log.rank0", number)
    return result["crashed"] and there == _operation(work / "reference" / "events.log.rank0", number)


def _operation(log: Path, number: int) -> tuple[str, str] | None:
    lines = log.read_text(encoding="utf-8").splitlines()
    if len(lines) < number:
        return None
    kind, name = lines[number - 1].split("\t")[1:3]
    return kind, re.sub(r"\.\d+-[0-9a-f]+\.tmp$", ".*.tmp", name)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2), help="processes a run (default: 1)")
    parser.add_argument("--modes", default="before,torn", help="also: unsynced, term (default: %(default)s)")
    parser.add_argument("--max-points", type=int, default=1000, metavar="N", help="an even sample (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="points at a time (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in this new folder; runs and logs stay there")
    options = parser.parse_args(arguments)
    if find_spec("ckpt_chaos") is None:
        parser.error("ckpt-chaos is not installed; pip install 'llava-train[test]'")
    started = time.monotonic()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="chaos-test-"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        load_everything()
        recipe, work, log = make_recipe(folder, hidden_size=32), folder / "points", folder / "ckpt-chaos.log"
        address = folder / "server"
        status = run_chaos(chaos_command(recipe, work, address, options), work, Server(address), log)
        print(log.read_text(encoding="utf-8"), file=sys.stderr)
        figures = figures_of(work)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"ranks": options.ranks, "modes": options.modes, **figures, "seconds": seconds}))
    return 0 if status == 0 and figures["points"] and not figures["faults"] else 1


if __name__ == "__main__":
    sys.exit(main())
