"""Two real processes, as the launchers start them, give the losses of one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava_train import load_recipe, train
from tests import tiny
from tests.conftest import REPOSITORY
from tests.training.test_run import rows_of

pytestmark = pytest.mark.slow(reason="starts launchers with two processes each")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
ZERO = ["engine.kind=deepspeed", f"engine.deepspeed_config={REPOSITORY}/configs/deepspeed/zero2.json"]
STAGES = {
    "stage1": ["tune.llm.mode=frozen", "data.template=plain"],
    "lora": ["tune.lora.dropout=0"],
    "full": ["tune.llm.mode=full", "tune.llm.learning_rate=1e-3"],
}


def launch(launcher: list[str], recipe: Path, output: Path, *overrides: str) -> list[dict]:
    script = str(REPOSITORY / "scripts" / "train.py")
    common = [f"output={output}", "checkpoint.save_every=0", "monitor.eval_every=4"]
    command = [*launcher, script, str(recipe), *common, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return rows_of(output)


def alone(recipe: Path, output: Path, *overrides: str) -> list[dict]:
    """The same run in this process."""
    common = [f"output={output}", "checkpoint.save_every=0", "monitor.eval_every=4"]
    return rows_of(train(load_recipe(recipe, [*common, *overrides])))


def assert_same_curve(one: list[dict], two: list[dict]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two):
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-5), (key, a, b)


@pytest.mark.parametrize("stage", STAGES)
def test_ddp_under_torchrun(workplace: Path, stage: str) -> None:
    recipe = tiny.make_recipe(workplace)
    one = alone(recipe, workplace / "one", *STAGES[stage])
    assert_same_curve(one, launch(TORCHRUN, recipe, workplace / "two", *STAGES[stage]))


@pytest.mark.parametrize("stage", ["stage1", "lora"])
def test_zero2_under_deepspeed(workplace: Path, stage: str) -> None:
    """In some steps one rank's micro-batch is text alone while the other's has pictures (an order of gradients)."""
    pytest.importorskip("deepspeed")
    recipe = tiny.make_recipe(workplace)
    one = alone(recipe, workplace / "one", *STAGES[stage])
    assert_same_curve(one, launch(DEEPSPEED, recipe, workplace / "two", *STAGES[stage], *ZERO))


def test_zero2_resumes(workplace: Path) -> None:
    """A ZeRO run that lost everything after a checkpoint goes on from it along the same curve."""
    pytest.importorskip("deepspeed")
    recipe, run = tiny.make_recipe(workplace), workplace / "run"
    options = [*STAGES["lora"], *ZERO, "checkpoint.save_every=3"]
    whole = launch(DEEPSPEED, recipe, run, *options)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-8")
    assert_same_curve(whole, launch(DEEPSPEED, recipe, run, *options))
