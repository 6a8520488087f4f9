"""Training that is killed goes on along the same curve; a harness that saw no kill, or another curve, says so."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

COMMAND = [sys.executable, str(REPOSITORY / "scripts" / "crash_test.py")]


def crash_test(*arguments: str) -> dict:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow(reason="loads all libraries anew, then starts training six times")
@pytest.mark.timeout(900)  # where the machine is busy
def test_four_kills() -> None:
    figures = crash_test("--kills", "4", "--stages", "stage1")
    assert figures["kills"] == figures["resumed"] == figures["identical"] == 4
    assert figures["inside_save"] >= 1


@pytest.mark.corpus(reason="trains a minute and more")
@pytest.mark.timeout(1200)  # where the machine is busy
def test_twenty_kills_of_three_stages() -> None:
    figures = crash_test("--kills", "20")
    assert figures["kills"] == figures["resumed"] == figures["identical"] == 20
    assert figures["inside_save"] >= 5
    assert set(figures["stages"]) == {"stage1", "full", "lora"}


@pytest.mark.corpus(reason="loads all libraries anew")
def test_ctrl_c_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([*COMMAND, "--ranks", "2"], env=environment, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if list(tmp_path.glob("*/*-reference/metrics.jsonl")):
            break
        time.sleep(0.1)
    assert len(_below(process.pid)) == 2
    started = _below(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    assert not list(tmp_path.iterdir())


def _below(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
