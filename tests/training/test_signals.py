"""Signals as they really come: to a process, to its group, from a launcher, from a terminal that is gone."""

import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_train.training.signals import STOP_SIGNALS, deferred_stop
from tests.conftest import REPOSITORY

RUN = """
import os, signal, sys, time
from pathlib import Path
from llava_train.training.signals import deferred_stop
with deferred_stop() as stop:
    Path("ready").write_text("")
    {body}
    print("a step is finished", file=sys.stderr)
    Path("saved").write_text(str(stop.number))
os._exit(128 + stop.number)
"""
STEP = "while not stop(): time.sleep(0.01)\n    time.sleep(1)"
# The main thread waits in C, where Python runs no handlers, for a lock that nobody gives back.
STUCK = "import ctypes; lock = ctypes.create_string_buffer(64); mutex = ctypes.CDLL(None).pthread_mutex_lock\n    "
STUCK += "mutex(lock); mutex(lock)"
WORKERS = """import torch
    from llava_train.training.signals import shield_worker
    loader = torch.utils.data.DataLoader(range(10**6), num_workers=2, worker_init_fn=shield_worker)
    for number, _ in enumerate(loader):
        if number == 10: os.killpg(0, signal.SIGTERM)
        if stop() and number > 1000: break
    del loader"""
GLOO = """import torch, torch.distributed as ranks
    ranks.init_process_group("gloo")
    Path(f"ready{ranks.get_rank()}").write_text("")
    time.sleep(600) if ranks.get_rank() else ranks.all_reduce(torch.ones(1))"""


def start(folder: Path, body: str, **options: object) -> subprocess.Popen:
    """A process that runs `body` where signals are deferred, and has begun to."""
    command = [sys.executable, "-c", RUN.format(body=body)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **options.pop("env", {})}
    options = {"stderr": subprocess.PIPE, **options}
    process = subprocess.Popen(command, cwd=folder, env=environment, **options)
    wait_for(folder / "ready")
    return process


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_noted(number: int, capfd: pytest.CaptureFixture) -> None:
    before = signal.getsignal(number)
    with deferred_stop() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # what a launcher sends on
        deadline = time.monotonic() + 10
        while not stop() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert stop() and stop.number == number
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err.count("stopping after this step, with a checkpoint") == 1


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferred_stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert not stop()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_signal_ends_at_once_whatever_the_main_thread_does(tmp_path: Path) -> None:
    process = start(tmp_path, STUCK)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # the same request
    time.sleep(4)
    assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert time.monotonic() - sent < 5
    assert process.returncode == 128 + signal.SIGINT
    assert b"SIGTERM: stopping after this step" in err and b"stopped at once" in err
    assert not (tmp_path / "saved").exists()


@pytest.mark.slow(reason="two processes that import torch")
def test_the_second_signal_ends_a_rank_whose_peer_never_comes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = [
        start(tmp_path, GLOO, env={"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port})
        for rank in "01"
    ]
    try:
        wait_for(tmp_path / "ready0")
        time.sleep(0.5)
        ranks[0].send_signal(signal.SIGTERM)
        time.sleep(4)  # longer than one request may take to be noted on a busy machine
        assert ranks[0].poll() is None
        sent = time.monotonic()
        ranks[0].send_signal(signal.SIGTERM)
        assert ranks[0].wait(timeout=10) == 128 + signal.SIGTERM
        assert time.monotonic() - sent < 5
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_a_run_outlives_its_terminal_until_the_step_is_saved(tmp_path: Path) -> None:
    terminal, line = pty.openpty()
    # A session of its own whose terminal that is: it hangs up with the last descriptor of the other end.
    adopt = "import fcntl, termios; fcntl.ioctl(2, termios.TIOCSCTTY, 0)\n    "
    ends = {"stdin": line, "stdout": line, "stderr": line}
    process = start(tmp_path, adopt + 'Path("adopted").write_text("")\n    ' + STEP, start_new_session=True, **ends)
    wait_for(tmp_path / "adopted")
    os.close(line)
    os.close(terminal)
    assert process.wait(timeout=20) == 128 + signal.SIGHUP
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGHUP))


def test_data_workers_neither_end_with_the_first_signal_nor_report_theirs() -> None:
    begun, beginning = os.pipe()
    with deferred_stop() as stop:
        worker = os.fork()
        if worker == 0:
            os.write(beginning, b".")
            while True:
                time.sleep(0.01)
        os.read(begun, 1)
        for number in STOP_SIGNALS:
            os.kill(worker, number)
        time.sleep(0.3)
        assert os.waitpid(worker, os.WNOHANG) == (0, 0)
        os.kill(worker, signal.SIGTERM)  # the data loader's own way to end a worker that does not leave
        _, status = os.waitpid(worker, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert not stop()


@pytest.mark.slow(reason="imports torch")
def test_a_data_loader_goes_on_when_the_whole_group_is_signalled(tmp_path: Path) -> None:
    """As torchrun does on SIGTERM, and a terminal on Ctrl-C."""
    process = start(tmp_path, WORKERS, start_new_session=True)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert err.count(b"stopping after this step") == 1
    assert (tmp_path / "saved").exists()
