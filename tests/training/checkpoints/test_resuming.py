"""Going on: what must be the same, what may change by name, and what is removed to start over."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava_train import load_recipe, train
from llava_train.errors import CheckpointError
from llava_train.training.checkpoints.manifest import place_of, seal
from llava_train.training.checkpoints.resuming import forget, require_same_run
from llava_train.training.checkpoints.saving import STATE
from tests import tiny


@pytest.fixture
def checkpoint(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place_of(finished, 8), tmp_path / "step-8"))


@pytest.fixture
def identity(checkpoint: Path) -> dict[str, Any]:
    found = json.loads((checkpoint / STATE).read_text())["identity"]
    assert {"optimization.learning_rate", "tokenizer", "data.train", "seed", "weights.llm"} <= found.keys()
    assert not {key for key in found if key.split(".")[0] in ("name", "output", "engine", "checkpoint", "monitor")}
    return found


CHANGES = {"optimization.learning_rate": 0.5, "seed": 4, "data.template": "plain"}


def test_the_same_run_goes_on(checkpoint: Path, identity: dict[str, Any]) -> None:
    require_same_run(checkpoint, identity)
    require_same_run(checkpoint, identity, ["seed"])


def test_all_that_changed_is_told_at_once(checkpoint: Path, identity: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        require_same_run(checkpoint, {**identity, **CHANGES})
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(
        f"{checkpoint}: cannot resume, the run was another one; choose a new output folder, --fresh"
    )
    assert "--allow-change KEY" in first
    assert lines == [
        "  data.template: was 'vicuna_v1', is 'plain'",
        "  optimization.learning_rate: was 0.01, is 0.5",
        "  seed: was 3, is 4",
    ]


def test_a_key_that_came_or_went_is_a_change(checkpoint: Path, identity: dict[str, Any]) -> None:
    changed = {**identity, "data.new": 1}
    del changed["seed"]
    with pytest.raises(CheckpointError, match=r"(?s)  data\.new: was None, is 1\n  seed: was 3, is None$"):
        require_same_run(checkpoint, changed)


def test_each_change_is_allowed_by_its_name(
    checkpoint: Path, identity: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {**identity, **CHANGES}
    require_same_run(checkpoint, changed, list(CHANGES))
    said = capsys.readouterr().err
    assert "resuming although optimization.learning_rate was 0.01, is 0.5\nresuming although seed was 3, is 4" in said
    with pytest.raises(CheckpointError) as caught:
        require_same_run(checkpoint, changed, ["seed", "data.template"])
    assert str(caught.value).splitlines()[1:] == ["  optimization.learning_rate: was 0.01, is 0.5"]


def test_keys_that_there_are_not_are_told_with_those_that_changed(checkpoint: Path, identity: dict[str, Any]) -> None:
    message = r"--allow-change sede, lr: no such key; what changed: data\.template, optimization\.learning_rate, seed$"
    with pytest.raises(CheckpointError, match=message):
        require_same_run(checkpoint, {**identity, **CHANGES}, ["sede", "seed", "lr"])
    with pytest.raises(CheckpointError, match=r"--allow-change sede: no such key; what changed: nothing$"):
        require_same_run(checkpoint, identity, ["sede"])


def test_allowing_other_shapes_does_not_load_a_part_of_the_old_ones(workplace: Path, finished: Path) -> None:
    """LoRA of another rank has weights of the same names."""
    run = workplace / "run"
    path = tiny.make_recipe(workplace)
    train(load_recipe(path, ["optimization.max_steps=4"]))
    shutil.rmtree(run / "final")
    for rank in (2, 8):
        recipe = load_recipe(path, ["optimization.max_steps=4", f"tune.lora.r={rank}"])
        with pytest.raises(CheckpointError, match=r"step-4: holds [\d,]+ trained elements, [\d,]+ train now"):
            train(recipe, allowed=["tune.lora.r"])


def test_a_state_that_says_nothing_is_told(checkpoint: Path, identity: dict[str, Any]) -> None:
    (checkpoint / STATE).write_text("{}")
    seal(checkpoint, {})
    with pytest.raises(CheckpointError, match=r"step-8/state\.json: "):
        require_same_run(checkpoint, identity)


def test_starting_over_leaves_nothing_of_the_run(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "notes.txt").write_text("mine")
    forget(run)
    left = {path.name for path in run.iterdir()}
    assert not left & {"checkpoints", "final", "best", "metrics.jsonl"}
    assert (run / "notes.txt").read_text() == "mine"
    forget(run)
    forget(tmp_path / "none")
