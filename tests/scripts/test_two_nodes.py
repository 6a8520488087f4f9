"""Two nodes with addresses of their own, started as on a cluster, train along the curve of one process."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "two_nodes.py"
spec = importlib.util.spec_from_file_location("two_nodes", SCRIPT)
assert spec and spec.loader
two_nodes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(two_nodes)


def require_namespaces() -> None:
    try:
        two_nodes.allowed()
    except two_nodes.NamespaceError as error:
        pytest.skip(f"no namespaces here: {error}")


def left_running(word: object) -> list[str]:
    """Command lines of processes that name `word`."""
    found = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in found if str(word) in line]


@pytest.mark.parametrize(
    "launchers",
    [
        pytest.param(["torchrun"], marks=pytest.mark.slow(reason="starts three processes that train")),
        pytest.param(["deepspeed", "accelerate"], marks=pytest.mark.corpus),
    ],
    ids=" ".join,
)
def test_two_nodes_give_the_curve_of_one_process(workplace: Path, launchers: list[str]) -> None:
    require_namespaces()
    command = [sys.executable, SCRIPT, tiny.make_recipe(workplace), "--launchers", *launchers]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert [(run["launcher"], run["steps"]) for run in result["runs"]] == [(name, 3) for name in launchers]
    # Not 0: two ranks add their numbers up in another order than one.
    assert all(0 < run["max_relative_difference"] <= 1e-5 for run in result["runs"])


@pytest.mark.parametrize(("limit", "status"), [("2", 1), ("60", 130)], ids=["time limit", "Ctrl-C"])
def test_nothing_is_left_behind(workplace: Path, limit: str, status: int) -> None:
    require_namespaces()
    recipe, scratch = tiny.make_recipe(workplace), workplace / "scratch"
    scratch.mkdir()
    command = [sys.executable, SCRIPT, recipe, "--time-limit", limit]
    started = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(scratch)}, stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + 30
    while not any("train.py" in line for line in left_running(recipe)):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    if status == 130:
        started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=30)[1]
    assert started.returncode == status, said
    assert ("not done after 2 s" in said) == (status == 1)
    assert left_running(recipe) == []
    assert list(scratch.iterdir()) == []


def test_a_system_without_namespaces_is_told_apart(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "recipe.yaml"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 77
    assert "allows no namespaces: unshare: No such file" in done.stderr


def test_the_largest_difference_counts_and_missing_rows_are_a_fault() -> None:
    one = [{"loss": 2.0, "learning_rate": 0.0}, {"loss": 1.0, "learning_rate": 0.1}]
    two = [{"loss": 2.0, "learning_rate": 0.0}, {"loss": 1.25, "learning_rate": 0.1}]
    assert two_nodes.difference(one, one) == 0
    assert two_nodes.difference(one, two) == pytest.approx(0.2)
    with pytest.raises(two_nodes.RunError, match="2 rows of one process, 1 of two"):
        two_nodes.difference(one, two[:1])
