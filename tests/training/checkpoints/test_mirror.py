# ruff: noqa: F811  (fixtures are imported)
"""A run whose machine is lost goes on from its store on another one."""

import shutil
from pathlib import Path

import pytest

from llava_train import load_recipe, train
from llava_train.errors import StoppedError, StorageError
from llava_train.model.checkpoint import WEIGHTS
from tests import tiny
from tests.training.checkpoints.test_remote import at, moto, s3, url  # noqa: F401
from tests.training.test_run import rows_of, stop_after


@pytest.fixture
def recipe(workplace: Path, url: str):
    return load_recipe(tiny.make_recipe(workplace), [f"checkpoint.remote={url}", "checkpoint.keep_last=1"])


def test_a_lost_machine_costs_the_steps_since_the_last_checkpoint(
    workplace: Path,
    finished: Path,
    recipe,
    url: str,
    monkeypatch,
    capsys,
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 7, StoppedError(7, 15))
        with pytest.raises(StoppedError):
            train(recipe)
    shutil.rmtree(workplace / "run")
    run = train(recipe)
    assert "resuming after step 6" in capsys.readouterr().err
    assert rows_of(run) == rows_of(finished)
    weights = (finished / "final" / WEIGHTS).read_bytes()
    assert (run / "final" / WEIGHTS).read_bytes() == weights
    system, path = at(url, f"final/{WEIGHTS}")
    assert system.cat_file(path) == weights
    kept = {Path(name).name for name in system.ls(at(url, "")[1].rstrip("/"), detail=False)}
    assert {"step-8", "final", "metrics.jsonl"} <= kept
    assert not kept & {"step-3", "step-6"}


def test_fresh_forgets_what_the_store_holds(workplace: Path, recipe, url: str, capsys) -> None:
    train(recipe)
    shutil.rmtree(workplace / "run")
    train(recipe, fresh=True)
    assert "resuming" not in capsys.readouterr().err


def test_a_store_that_cannot_be_used_is_told_before_anything_is_computed(workplace: Path) -> None:
    (workplace / "file").write_text("no folder")
    recipe = load_recipe(tiny.make_recipe(workplace), [f"checkpoint.remote=file://{workplace}/file/store"])
    with pytest.raises(StorageError, match="file/store"):
        train(recipe)
    assert not (workplace / "prepared").exists()
