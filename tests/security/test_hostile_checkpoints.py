"""S3: hostile files in a run's checkpoint, under a manifest that lists them: a hash says who is whole, not who is good.

The older checkpoint of the run is sound. Either it is used and the hostile one named, or the run is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_train import load_recipe, train
from llava_train.files import sha256_file
from llava_train.training.checkpoints.manifest import MANIFEST, seal
from tests.security.attacks import WEIGHTS, Attack, Place, hostile_pickle
from tests.security.guarded import refused

pytestmark = pytest.mark.timeout(60)

CHOSEN = (
    "pickle of posix.system",
    "torch checkpoint",
    "header of 2^63 bytes",
    "350,000 names",
    "overlapping tensors",
    "truncated",
    "link out of the folder",
    "pipe",
)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    """(newest checkpoint, how it is resumed) of a run that has two and is not finished."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "final")
    recipe = load_recipe(finished.parent / "recipe.yaml", [f"output={folder}"])
    *_, older, newest = sorted((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    assert (older / MANIFEST).is_file()
    return newest, lambda: train(recipe)


def sign(checkpoint: Path) -> None:
    """List what lies in a checkpoint now, links as what they lead to; no pipe can be hashed."""
    files = [file for file in checkpoint.iterdir() if file.name != MANIFEST]
    seal(checkpoint, {file.name: sha256_file(file) if file.is_file() else "0" * 64 for file in files})


def refused_or_passed_over(resume: Callable[[], object], canary: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What the user is told. A run that goes on, from the sound checkpoint, takes longer than a refusal may."""
    try:
        message = refused(resume, canary)
    except pytest.fail.Exception:
        message = capfd.readouterr().err
    assert not canary.exists()
    return message


@pytest.mark.parametrize("attack", [a for a in WEIGHTS if a.name in CHOSEN], ids=lambda attack: attack.name)
def test_weights(run, tmp_path: Path, capfd: pytest.CaptureFixture[str], attack: Attack) -> None:
    checkpoint, resume = run
    (file,) = checkpoint.glob("*.safetensors")
    attack.place(file, tmp_path / "canary")
    sign(checkpoint)
    assert file.name in refused_or_passed_over(resume, tmp_path / "canary", capfd)


def _write(name: str, content: str) -> Place:
    return lambda checkpoint, canary: (checkpoint / name).write_text(content) and None


def _change_state(**values: object) -> Place:
    def place(checkpoint: Path, canary: Path) -> None:
        state = json.loads((checkpoint / "state.json").read_text())
        (checkpoint / "state.json").write_text(json.dumps({**state, **values}))

    return place


def _remove_key(checkpoint: Path, canary: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    del state["identity"]
    (checkpoint / "state.json").write_text(json.dumps(state))


STATES = {
    "a list": _write("state.json", "[]"),
    "no JSON": _write("state.json", "import os"),
    "nested 100,000 deep": _write("state.json", '{"a":' * 100_000 + "1" + "}" * 100_000),
    "without identity": _remove_key,
    "a step that is text": _change_state(step="__import__('os')"),
    "a step before the first": _change_state(step=-5),
}


@pytest.mark.parametrize("place", STATES.values(), ids=STATES)
def test_state(run, tmp_path: Path, capfd: pytest.CaptureFixture[str], place: Place) -> None:
    checkpoint, resume = run
    place(checkpoint, tmp_path / "canary")
    sign(checkpoint)
    assert "state.json" in refused_or_passed_over(resume, tmp_path / "canary", capfd)


@pytest.mark.parametrize("name", ["../../../outside", "/etc/hostname", "step"])
def test_a_manifest_that_lists_what_is_elsewhere(run, tmp_path: Path, capfd, name: str) -> None:
    checkpoint, resume = run
    (tmp_path / "outside").write_text("x")
    os.mkfifo(checkpoint / "step")
    digests = {file.name: sha256_file(file) for file in checkpoint.iterdir() if file.is_file()}
    del digests[MANIFEST]
    seal(checkpoint, {**digests, name: "0" * 64})
    assert name in refused_or_passed_over(resume, tmp_path / "canary", capfd)


def test_weights_that_the_manifest_does_not_list(run, tmp_path: Path, capfd) -> None:
    """A file more, which no hash covers, is not read."""
    checkpoint, resume = run
    (checkpoint / "state-00009-of-00010.safetensors").write_bytes(hostile_pickle(tmp_path / "canary"))
    assert "resuming after step 8" in refused_or_passed_over(resume, tmp_path / "canary", capfd)
