"""Manifests: no damage to a checkpoint of a real run passes, and the one before it is taken."""

import contextlib
import io
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from llava_train.errors import CheckpointError
from llava_train.training.checkpoints.manifest import MANIFEST, faults, place_of, read_manifest, seal, steps_of
from llava_train.training.checkpoints.resuming import newest
from llava_train.training.engines.ranks import Ranks
from tests.training.threaded import together

ALONE = Ranks(0, 1, torch.device("cpu"))
FILES = ("state-00000-of-00001.safetensors", "state.json", MANIFEST)
FLIPS, CUTS = 1000, 100


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the checkpoints of steps 6 and 8; tests put back what they damage."""
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(finished / "checkpoints", folder / "checkpoints")
    return folder


def resumed_from(run: Path) -> tuple[str, str]:
    """The checkpoint a run would go on from, and what it says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        found = newest(run, ALONE)
    return found.name if found else "", said.getvalue()


def require_refused(run: Path, name: str, what: str) -> None:
    """Step 8 is damaged: it must be passed over by the name of the file, for step 6."""
    found, said = resumed_from(run)
    assert found == "step-6", (name, what)
    assert f"{run}/checkpoints/step-8: passed over: {name} " in said, (name, what)


def test_a_whole_run_is_read(run: Path) -> None:
    assert {path.name for path in place_of(run, 8).iterdir()} == {*FILES}
    assert [*faults(place_of(run, 8))] == []
    assert resumed_from(run) == ("step-8", "")


def test_no_flipped_byte_passes(run: Path) -> None:
    """A byte anywhere, as likely in the small files as in the large one, becomes any other byte."""
    rng, refused = random.Random(0), 0
    for index in range(FLIPS):
        name = FILES[index % len(FILES)]
        with (place_of(run, 8) / name).open("r+b", buffering=0) as stream:
            at = rng.randrange(stream.seek(0, os.SEEK_END))
            stream.seek(at)
            before = stream.read(1)
            after = bytes([before[0] ^ rng.randrange(1, 256)])
            stream.seek(at)
            stream.write(after)
            require_refused(run, name, f"byte {at}: {before!r} became {after!r}")
            refused += 1
            stream.seek(at)
            stream.write(before)
    assert refused == FLIPS
    assert resumed_from(run) == ("step-8", "")


def test_no_byte_of_a_manifest_may_be_any_other(run: Path) -> None:
    path = place_of(run, 8) / MANIFEST
    content = path.read_bytes()
    for at in range(len(content)):
        for other in {0, 9, 10, 13, 32, 48, 255, content[at] ^ 32, content[at] ^ 1} - {content[at]}:
            path.write_bytes(content[:at] + bytes([other]) + content[at + 1 :])
            with pytest.raises(ValueError, match="damaged"):
                read_manifest(path.parent)
    path.write_bytes(content)
    read_manifest(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_no_cut_file_passes(run: Path, name: str) -> None:
    path = place_of(run, 8) / name
    content = path.read_bytes()
    lengths = sorted({0, 1, len(content) - 1, *random.Random(1).sample(range(len(content)), CUTS - 3)})
    for length in lengths:
        path.write_bytes(content[:length])
        require_refused(run, name, f"{length} of {len(content)} bytes")
    path.write_bytes(content + b"\n")
    require_refused(run, name, "a byte more")
    path.write_bytes(content)
    assert resumed_from(run) == ("step-8", "")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("instead", ["nothing", "a folder", "a link to a copy elsewhere", "another step's"])
def test_every_file_must_be_there(run: Path, tmp_path: Path, name: str, instead: str) -> None:
    path = place_of(run, 8) / name
    kept = shutil.move(path, tmp_path / name)
    if instead == "a folder":
        path.mkdir()
    elif instead.startswith("a link"):
        path.symlink_to(kept)
    elif instead.startswith("another"):
        shutil.copy(place_of(run, 6) / name, path)
    if instead.startswith("a link") and name == MANIFEST:
        assert resumed_from(run) == ("step-8", "")  # what it lists was verified
    else:
        found, said = resumed_from(run)
        assert found == "step-6"
        assert name in said or (name == MANIFEST and "does not match" in said)
    path.rmdir() if instead == "a folder" else path.unlink(missing_ok=True)
    shutil.move(kept, path)


def test_where_none_verifies_nothing_starts_over_by_itself(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    for step in (6, 8):
        (place_of(folder, step) / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="none of its checkpoints verifies; mend them, or"):
        resumed_from(folder)
    assert resumed_from(tmp_path / "empty") == ("", "")


def test_ranks_verify_together_and_agree(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each reads its share; one that finds damage turns all of them away."""
    folder = shutil.copytree(run, tmp_path / "run")
    assert together(3, lambda ranks: newest(folder, ranks)) == [place_of(folder, 8)] * 3
    for name in FILES[:2]:
        path = place_of(folder, 8) / name
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        capsys.readouterr()
        assert together(3, lambda ranks: newest(folder, ranks)) == [place_of(folder, 6)] * 3
        assert capsys.readouterr().err.count(f"step-8: passed over: {name} does not match its sha256") == 1
        path.write_bytes(content)


def test_no_manifest_reads_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "step-1").mkdir()
    for name in ("../secret", str(tmp_path / "secret"), "a\0b"):
        seal(tmp_path / "step-1", {name: "0" * 64})
        assert "must be a path" in "".join(faults(tmp_path / "step-1")) or "leads outside" in "".join(
            faults(tmp_path / "step-1")
        )


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": 1}', '{"files": [1]}', "[" * 9999, '{"files": {}}', "\xff"]
)
def test_what_is_no_manifest_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    assert [*faults(tmp_path)] == [f"{MANIFEST} is damaged"]


def test_a_manifest_says_what_it_is(tmp_path: Path) -> None:
    seal(tmp_path, {"b": "2", "a": "1"})
    assert json.loads((tmp_path / MANIFEST).read_text())["format"] == "llava_train/checkpoint"
    assert [*read_manifest(tmp_path).items()] == [("a", "1"), ("b", "2")]


def test_steps_are_numbers(tmp_path: Path) -> None:
    for name in ("step-9", "step-10", "step-x", "step--1", ".step-11.tmp", ".step-3.old.tmp", "step-", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert steps_of(tmp_path) == [9, 10]
