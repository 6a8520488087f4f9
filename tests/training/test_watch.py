"""What a judge makes of what ranks tell it, and real ranks of which one dies, freezes, hangs or fails."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llava_train.training.judge import BROKEN, DONE, FAILED, STOPPED, Beat, Judge, Limits
from tests.conftest import REPOSITORY

# Two ranks that meet in each of 40 steps; what goes wrong with one of them before the fifth is named `<fault><rank>`.
RANKS = """
import json, os, signal, sys, time
import torch, torch.distributed as ranks
from datetime import timedelta
from llava_train.errors import DataError, TrainingError
from llava_train.training.judge import Limits
from llava_train.training.watch import watching

def go_wrong(fault):
    open("went_wrong", "w").close()
    if fault == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if fault == "frozen": os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "asleep": time.sleep(600)
    if fault == "late":
        time.sleep(1.8)
        with watch.patient(): time.sleep(4)
    if fault == "bad_data": raise DataError("record 5 is broken")
    if fault == "bug": raise ValueError("a bug")

def run(fault):
    global watch
    ranks.init_process_group("gloo", timeout=timedelta(hours=1))
    rank = ranks.get_rank()
    limits = Limits(beat_s=0.2, silence_s=2, behind_s=2.5, still_s=60, leave_s=1)
    with watching(rank, 2, torch.device("cpu"), limits) as watch:
        for step in range(1, 41):
            watch.at(step, "data")
            if step == 5 and fault.endswith(str(rank)): go_wrong(fault[:-1])
            watch.at(step, "sums over ranks")
            ranks.all_reduce(torch.ones(1))
            time.sleep(0.01)

def rank_main(fault):
    try:
        run(fault)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)

def fork(fault, rank):
    process = os.fork()
    if process: return process
    os.environ["RANK"] = str(rank)
    os.dup2(os.open(f"{fault}-{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    rank_main(fault)
    os._exit(0)

if "RANK" in os.environ:
    rank_main(sys.argv[1])
else:
    for port, fault in zip(json.loads(sys.argv[1]), sys.argv[2:]):
        os.environ.update(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
        begun = time.time()
        processes = [fork(fault, rank) for rank in (0, 1)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        print(json.dumps([fault, codes, processes, time.time() - begun]), flush=True)
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "TORCH_CPP_LOG_LEVEL": "ERROR"}
SILENT, BEHIND, LEFT = "has not been heard of for", "stood still for", "its own message tells why"
FAULTS = {
    # who falls out: the exit codes of both, what the other one says of it
    "killed1": ([1, -9], SILENT),
    "killed0": ([-9, 1], SILENT),
    "frozen0": ([-9, 1], SILENT),
    "asleep1": ([1, 1], BEHIND),
    "bad_data1": ([1, 1], LEFT),
    "bug0": ([1, 1], LEFT),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list]]:
    """The folder of what ranks wrote to stderr, and of each fault: exit codes, process ids, seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    faults = [*FAULTS, "late1"]
    free = [socket.socket() for _ in faults]
    for bound in free:
        bound.bind(("localhost", 0))
    ports = json.dumps([bound.getsockname()[1] for bound in free])
    for bound in free:
        bound.close()
    command = [sys.executable, "-c", RANKS, ports, *faults]
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=200
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(faults), done.stderr
    return folder, {fault: rest for fault, *rest in rows}


@pytest.mark.slow(reason="real ranks, seven times")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_rank_ends_both_and_is_named(outcomes: tuple, fault: str) -> None:
    folder, rows = outcomes
    codes, processes, seconds = rows[fault]
    expected, said = FAULTS[fault]
    rank = int(fault[-1])
    assert codes == expected
    assert seconds < 12
    told = (folder / f"{fault}-{1 - rank}.err").read_text()
    assert f"rank {rank} (process {processes[rank]} on {socket.gethostname()})" in told
    assert said in told and f"ending rank {1 - rank}. The same command goes on from the last checkpoint" in told
    own = (folder / f"{fault}-{rank}.err").read_text()
    if said == BEHIND:
        assert "at step 5: data, and the other ranks waited for it" in told
        assert f"rank {rank} stands here:" in own and "in go_wrong" in own
    if said == LEFT:
        assert own.startswith(("DataError: record 5 is broken", "ValueError: a bug"))


@pytest.mark.slow(reason="real ranks, seven times")
def test_a_run_without_a_fault_ends_in_order_and_silence(outcomes: tuple) -> None:
    """Though one rank is late, and saves for longer than it might otherwise stand still."""
    folder, rows = outcomes
    assert rows["late1"][0] == [0, 0]
    assert [(folder / f"late1-{rank}.err").read_text() for rank in (0, 1)] == ["", ""]


@pytest.mark.slow(reason="starts torchrun with two processes")
def test_torchrun_need_not_wait_for_a_frozen_rank(tmp_path: Path) -> None:
    """It waits 30 s for the others when one left; a rank that is frozen is ended by its neighbour instead."""
    (tmp_path / "ranks.py").write_text(RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(tmp_path / "ranks.py"), "frozen1"]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120
    )
    assert time.time() - (tmp_path / "went_wrong").stat().st_mtime < 25
    assert done.returncode == 1
    assert SILENT in done.stderr and "rank 1 (process " in done.stderr


def beats(*where: tuple[int, int], **changes: object) -> list[Beat]:
    """A beat of each rank, at (step, mark)."""
    return [Beat(rank, 100 + rank, "node", step=step, mark=mark, **changes) for rank, (step, mark) in enumerate(where)]


def sit(judge: Judge, told: list[Beat], start: int, seconds: int) -> tuple[int, str] | None:
    """Hear the same beats, counted on, once a second: when the verdict falls, and its words."""
    for second in range(start, start + seconds):
        judge.hear([beat if beat.left else replace(beat, count=second) for beat in told], second)
        verdict = judge.verdict(second)
        if verdict:
            return second - start, verdict.text
    return None


def test_ranks_that_wait_a_minute_for_one_are_ended_but_not_for_fifty_seconds() -> None:
    judge = Judge(3, Limits())
    assert sit(judge, beats((1, 1), (1, 1), (1, 0)), 0, 51) is None
    after, text = sit(judge, beats((1, 2), (1, 1), (1, 2)), 51, 60) or (0, "")
    assert 50 < after < 57
    assert text.startswith("rank 1 (process 101 on node) stood still for 53 s")


def test_all_ranks_at_the_same_place_are_given_half_an_hour() -> None:
    judge = Judge(2, Limits())
    after, text = sit(judge, beats((7, 1), (7, 1)), 0, 4000) or (0, "")
    assert 1800 < after < 1810
    assert "no rank has moved" in text


def test_where_steps_take_minutes_so_may_the_wait_for_a_rank() -> None:
    judge = Judge(2, Limits())
    for step in range(1, 10):
        assert sit(judge, beats((step, 0), (step, 0)), 100 * step, 100) is None
    after, _ = sit(judge, beats((9, 1), (9, 0)), 1000, 2000) or (0, "")
    assert 300 < after < 310


def test_what_is_patient_is_not_hurried_but_must_live() -> None:
    judge = Judge(2, Limits())
    saving = [beats((4, 2), (4, 2))[0], beats((4, 2), (4, 1), patient=True)[1]]
    assert sit(judge, saving, 0, 5000) is None
    verdict = None
    for second in range(5000, 5060):
        judge.hear([replace(saving[0], count=second), saving[1]], second)
        verdict = verdict or judge.verdict(second)
    assert verdict and verdict.blamed == [1] and verdict.kill and "not been heard of for 46 s" in verdict.text


@pytest.mark.parametrize(
    ("first", "second", "blamed"),
    [
        (DONE, DONE, None),
        (STOPPED, STOPPED, None),
        (BROKEN, FAILED, 1),  # what broke rank 0 was the end of rank 1
        (BROKEN, BROKEN, 0),
        (DONE, FAILED, 1),
        ("", FAILED, 1),
        (STOPPED, "", 0),
        (DONE, "", None),
    ],
)
def test_who_left_and_how(first: str, second: str, blamed: int | None) -> None:
    judge = Judge(2, Limits())
    sit(judge, beats((3, 0), (3, 0)), 0, 3)
    left = [replace(beat, left=how) for beat, how in zip(beats((3, 0), (3, 0)), (first, second))]
    fell = sit(judge, left, 3, 40)
    assert (fell and fell[1].split(" (")[0]) == (None if blamed is None else f"rank {blamed}")
