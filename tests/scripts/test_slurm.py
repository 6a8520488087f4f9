"""What `sbatch scripts/slurm_train.sh` does: with stand-ins for Slurm's commands, and with Slurm where it runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "slurm_train.sh"
# Starts the tasks of a step as real processes; its status is the highest, as srun's is.
SRUN = """
import os, subprocess, sys
at = sys.argv.index("bash")
tasks, here = (int(sys.argv[sys.argv.index(option) + 1]) for option in ("--ntasks", "--ntasks-per-node"))
places = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % here)} for i in range(tasks)]
started = [subprocess.Popen(sys.argv[at:], env={**os.environ, **place}) for place in places]
with open("srun.json", "w") as stream:
    stream.write('{"options": "%s", "pids": %s}' % (" ".join(sys.argv[1:at]), [task.pid for task in started]))
sys.exit(max(code if code >= 0 else 128 - code for code in (task.wait() for task in started)))
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in show) printf 'node7\\nnode8\\n' ;; requeue) echo "$2" >> requeued ;; esac
"""
FAKE_TRAINING = """#!/usr/bin/env bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> ranks
exit "$STATUS"
"""


def make_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def job(folder: Path, *arguments: str, training: str = FAKE_TRAINING, **settings: str) -> subprocess.Popen:
    """The script as a job of one node with two CPUs runs it, in `folder`."""
    make_program(folder / "bin" / "srun", f"#!{sys.executable}{SRUN}")
    make_program(folder / "bin" / "scontrol", SCONTROL)
    make_program(folder / ".venv" / "bin" / "python", training)
    (folder / "mine.yaml").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_")) and k != "VENV"}
    environment |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    environment |= {"SLURM_JOB_ID": "123", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node[7-8]"}
    environment |= {"SLURM_CPUS_ON_NODE": "2", **settings}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(["bash", str(SCRIPT), *arguments], cwd=folder, env=environment, **streams)


def ended(started: subprocess.Popen) -> tuple[int, str]:
    said = started.communicate(timeout=120)[0]
    return started.returncode, said


def steps_of(run: Path) -> list[int]:
    """The steps in metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row["step"] for row in rows if "loss" in row]


def wait_for(what: Callable[[], object], seconds: float = 120) -> None:
    give_up = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_every_rank_learns_its_place(tmp_path: Path) -> None:
    two_nodes = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_ON_NODE": "8"}
    # One task a GPU, whatever the job was told about tasks.
    status, said = ended(job(tmp_path, "mine.yaml", "seed=7", STATUS="0", SLURM_NTASKS_PER_NODE="1", **two_nodes))
    assert status == 0, said
    common = "4 2 node7 20123 -m llava_train train mine.yaml seed=7"
    places = [f"{place} {common}" for place in ("0 0", "1 1", "2 0", "3 1")]
    assert sorted((tmp_path / "ranks").read_text().splitlines()) == places
    assert "--cpus-per-task 4" in json.loads((tmp_path / "srun.json").read_text())["options"]


@pytest.mark.parametrize(
    ("settings", "tasks"),
    [({"SLURM_NTASKS_PER_NODE": "2"}, 2), ({"SLURM_NTASKS": "2"}, 2), ({}, 1)],
    ids=["--ntasks-per-node", "--ntasks", "neither"],
)
def test_without_gpus_the_job_says_how_many_tasks(tmp_path: Path, settings: dict[str, str], tasks: int) -> None:
    assert ended(job(tmp_path, "mine.yaml", STATUS="0", **settings))[0] == 0
    assert len((tmp_path / "ranks").read_text().splitlines()) == tasks


@pytest.mark.parametrize(("status", "again"), [(0, False), (138, True), (143, False), (1, False), (2, False)])
def test_only_a_run_stopped_by_the_warning_goes_back_into_the_queue(tmp_path: Path, status: int, again: bool) -> None:
    assert ended(job(tmp_path, "mine.yaml", STATUS=str(status)))[0] == status
    assert (tmp_path / "requeued").exists() == again


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (["other.yaml"], {}, "other.yaml: there is no such recipe"),
        (["mine.yaml"], {"SLURM_JOB_ID": ""}, "start it with sbatch"),
        (["mine.yaml"], {"SLURM_GPUS_ON_NODE": "4"}, "2 CPUs for 4 tasks on a node"),
        (["mine.yaml"], {"VENV": "nowhere"}, "VENV=nowhere has no bin/python"),
        ([], {}, "sbatch --nodes 2 --gpus-per-node 8"),
    ],
)
def test_what_cannot_run_is_told(tmp_path: Path, arguments: list[str], settings: dict[str, str], said: str) -> None:
    status, output = ended(job(tmp_path, *arguments, STATUS="0", **settings))
    assert status == 2
    assert said in output
    assert not (tmp_path / "ranks").exists()


OPTIONS = ["optimization.max_steps=60", "monitor.eval_every=0", "checkpoint.save_every=0"]
REAL_TRAINING = f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n'


@pytest.mark.slow(reason="two processes train, twice")
def test_two_ranks_are_warned_and_go_on(workplace: Path) -> None:
    tiny.make_recipe(workplace)
    place = {"SLURM_NTASKS_PER_NODE": "2", "MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"}
    first = job(workplace, "recipe.yaml", *OPTIONS, training=REAL_TRAINING, **place)
    wait_for(lambda: first.poll() is not None or len(steps_of(workplace / "run")) >= 2)
    for pid in json.loads((workplace / "srun.json").read_text())["pids"]:
        os.kill(pid, signal.SIGUSR1)
    status, said = ended(first)
    assert status == 138, said[-3000:]
    assert (workplace / "requeued").read_text() == "123\n"
    done = len(steps_of(workplace / "run"))
    assert done < 60
    status, said = ended(job(workplace, "recipe.yaml", *OPTIONS, training=REAL_TRAINING, **place))
    assert status == 0, said[-3000:]
    assert f"resuming after step {done}" in said
    assert steps_of(workplace / "run") == list(range(1, 61))


def slurm_answers() -> bool:
    return bool(shutil.which("sbatch")) and subprocess.run(["sinfo"], capture_output=True, check=False).returncode == 0


@pytest.mark.corpus
@pytest.mark.timeout(900)
@pytest.mark.skipif(not slurm_answers(), reason="no Slurm answers here")
def test_slurm_warns_requeues_and_finishes(workplace: Path) -> None:
    """For a Slurm that sees this disk. It waits two minutes, unless told otherwise, before a job starts again."""
    recipe = tiny.make_recipe(workplace)
    make_program(workplace / "venv" / "bin" / "python", REAL_TRAINING)
    environment = {**os.environ, "VENV": str(workplace / "venv"), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = ["sbatch", "--parsable", "--nodes", "1", "--ntasks-per-node", "2", "--output", str(workplace / "log")]
    command += [str(SCRIPT), str(recipe), *OPTIONS]
    done = subprocess.run(command, env=environment, cwd=workplace, capture_output=True, text=True, check=True)
    number = done.stdout.strip()

    def shown(word: str) -> bool:
        asked = ["scontrol", "show", "job", number]
        return word in subprocess.run(asked, capture_output=True, text=True, check=True).stdout

    try:
        wait_for(lambda: len(steps_of(workplace / "run")) >= 2)
        subprocess.run(["scancel", "--signal=USR1", number], check=True)
        wait_for(lambda: shown("Restarts=1"))
        assert len(steps_of(workplace / "run")) < 60
        wait_for(lambda: shown("JobState=COMPLETED"), seconds=400)
    finally:
        subprocess.run(["scancel", number], check=False)
    assert "resuming after step" in (workplace / "log").read_text()
    assert steps_of(workplace / "run") == list(range(1, 61))
