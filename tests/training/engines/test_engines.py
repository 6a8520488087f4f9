"""Every engine on two processes gives the losses and the weights of one process."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_train import export, load_recipe, train
from llava_train.model.checkpoint import WEIGHTS, load_model
from llava_train.training.engines.choice import ENGINES
from tests import tiny
from tests.training.engines.launching import run, run_jobs
from tests.training.test_run import rows_of

pytestmark = [
    pytest.mark.slow(reason="starts launchers with two processes each"),
    pytest.mark.timeout(700),
]

STAGES = {
    "stage1": ["tune.llm.mode=frozen", "data.template=plain"],
    "lora": ["tune.lora.dropout=0"],
    "full": ["tune.llm.mode=full", "tune.llm.learning_rate=1e-3"],
}
# Four steps: pictures and text mixed over ranks, the last with one sample for two ranks.
COMMON = ["optimization.max_steps=4", "checkpoint.save_every=0", "monitor.eval_every=2"]
# One sample a rank and step: steps of text alone, and of text on one rank; nothing that sees trains.
TEXT = ["optimization.global_batch_size=2", "optimization.micro_batch_size=1", "optimization.max_steps=12"]
TEXT += ["tune.connector.mode=frozen", "tune.lora.dropout=0", "checkpoint.save_every=0", "monitor.eval_every=0"]
OFFLOADS = {"deepspeed_zero2": "optimizer", "deepspeed_zero3": "all"}


def cases() -> dict[str, list[str]]:
    """Name of a run -> what it says beside the tiny recipe."""
    found = {}
    for kind in ENGINES:
        for stage, overrides in STAGES.items():
            found[f"{kind}/{stage}"] = [f"engine.kind={kind}", *COMMON, *overrides]
        bf16 = ["optimization.precision=bf16", f"engine.kind={kind}"]
        found[f"{kind}/bf16"] = [*COMMON, *STAGES["lora"], *bf16, "optimization.max_steps=8"]
        found[f"{kind}/text"] = [f"engine.kind={kind}", *TEXT]
    for kind, away in OFFLOADS.items():
        found[f"{kind}/full-offload"] = [f"engine.kind={kind}", f"engine.offload={away}", *COMMON, *STAGES["full"]]
    return found


@pytest.fixture(scope="module")
def place(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    for name in ("vision", "llm", "data"):
        (folder / name).symlink_to(parts / name)
    tiny.make_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def runs(place: Path) -> Path:
    """A folder with a run a case, all made by two processes in one launch."""
    made = {name: place / name.replace("/", "-") for name in cases()}
    jobs = [
        {"recipe": str(place / "recipe.yaml"), "overrides": [f"output={made[name]}", *overrides]}
        for name, overrides in cases().items()
    ]
    assert run_jobs(jobs, 2, place) == ["done"] * len(jobs)
    return place


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, Path]:
    """The runs of one process, by what they train."""
    named = {**{stage: [*COMMON, *overrides] for stage, overrides in STAGES.items()}, "text": TEXT}
    named["bf16"] = [*COMMON, *STAGES["lora"], "optimization.precision=bf16", "optimization.max_steps=8"]
    return {
        name: train(load_recipe(place / "recipe.yaml", [f"output={place}/alone-{name}", *overrides]))
        for name, overrides in named.items()
    }


def assert_same_curve(one: list[dict[str, Any]], two: list[dict[str, Any]], tolerance: float = 1e-5) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two):
        for key in a.keys() - {"positions"}:  # how a step is cut depends on the number of processes
            assert b[key] == pytest.approx(a[key], rel=tolerance), (key, a, b)


@pytest.mark.parametrize("name", [name for name in cases() if not name.endswith("bf16")])
def test_two_processes_are_one(runs: Path, alone: dict[str, Path], name: str) -> None:
    one, two = alone[name.split("/")[1].removesuffix("-offload")], runs / name.replace("/", "-")
    assert_same_curve(rows_of(one), rows_of(two))
    wanted, found = load_file(one / "final" / WEIGHTS), load_file(two / "final" / WEIGHTS)
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=2e-6)
    load_model(two)


@pytest.mark.parametrize("kind", ENGINES)
def test_bf16_is_near(runs: Path, alone: dict[str, Path], kind: str) -> None:
    """Engines round at different places, so curves are near and masters of float32."""
    two = runs / f"{kind}-bf16"
    losses = [row["loss"] for row in rows_of(two) if "loss" in row]
    assert losses == pytest.approx([row["loss"] for row in rows_of(alone["bf16"]) if "loss" in row], rel=0.02)
    assert losses[-1] < losses[0]
    trained = {key: t for key, t in load_file(two / "final" / WEIGHTS).items() if "lora" in key or "projector" in key}
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    for key, tensor in trained.items():
        assert not torch.equal(tensor, tensor.bfloat16().float()), f"{key} was rounded"


def test_a_model_of_spread_weights_exports(runs: Path, tmp_path: Path) -> None:
    folder = export(runs / "deepspeed_zero3-full", tmp_path / "export")
    assert json.loads((folder / "export_report.json").read_text())["verified"]


def test_the_deepspeed_launcher(place: Path, alone: dict[str, Path]) -> None:
    """Its own command line, with a file of the user's."""
    import sys

    pytest.importorskip("deepspeed")
    config = place / "zero3.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}))
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    shutil.rmtree(place / "launched", ignore_errors=True)
    overrides = [f"output={place}/launched", f"engine.deepspeed_config={config}", *COMMON, *STAGES["lora"]]
    run([*launcher, "scripts/train.py", str(place / "recipe.yaml"), *overrides])
    assert_same_curve(rows_of(alone["lora"]), rows_of(place / "launched"))
