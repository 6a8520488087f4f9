"""Saving: disks that are full, that cannot be written or that lie; ranks that fail; saves beside the next steps."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llava_train.training.checkpoints.saving as saving
from llava_train import load_recipe, train
from llava_train.errors import LlavaTrainError, StorageError
from llava_train.model.checkpoint import WEIGHTS
from llava_train.recipe import CheckpointSettings
from llava_train.tensorfile import write_tensors
from llava_train.training.checkpoints.manifest import faults, place_of, steps_of
from llava_train.training.checkpoints.mirror import Mirror
from llava_train.training.checkpoints.resuming import newest
from llava_train.training.checkpoints.saving import Saver, sweep_unfinished
from llava_train.training.checkpoints.shards import shard_bytes
from llava_train.training.engines.base import Fragment
from llava_train.training.engines.ranks import Ranks
from llava_train.training.monitor import CLOCK, read_rows
from llava_train.training.state import RunState
from tests import tiny
from tests.training.threaded import together

ALONE = Ranks(0, 1, torch.device("cpu"))


class Training:
    """A saver over one flat buffer with the optimizer's state, as a rank of ZeRO has it; `step` changes all values."""

    def __init__(self, folder: Path, ranks: Ranks = ALONE, size: int = 400, **settings: Any) -> None:
        self.folder, self.weights, self.size = folder, torch.zeros(2 * size), size
        self.optimizer = torch.optim.AdamW([self.weights])
        first = ranks.rank * size
        fragments = [Fragment("w", first, size, self.weights), Fragment("b", first, size, self.weights, size)]
        engine: Any = SimpleNamespace(ranks=ranks, saves=True, fragments=lambda: fragments, stepped=self.optimizer)
        self.state = RunState()
        rules = CheckpointSettings(**settings)
        self.saver = Saver(folder, engine, rules, lambda: {"at": self.state.step}, Mirror(folder, rules))

    def step(self) -> None:
        self.state.step += 3
        self.weights.fill_(self.state.step)
        moments = {kind: torch.full_like(self.weights, self.state.step / 2) for kind in ("exp_avg", "exp_avg_sq")}
        self.optimizer.state[self.weights] = {"step": torch.tensor(float(self.state.step)), **moments}

    def save(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.step()
            self.saver.save(self.state)


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def require_whole(folder: Path, *steps: int) -> None:
    """The checkpoints are these, each verifies and holds what its step had; nothing half written lies beside them."""
    assert steps_of(folder) == [*steps]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {f"step-{step}" for step in steps}
    for step in steps:
        assert [*faults(place_of(folder, step))] == []
        values = json.loads((place_of(folder, step) / "state.json").read_text())
        assert (values["step"], values["at"]) == (step, step)
        for path in place_of(folder, step).glob("*.safetensors"):
            for name, tensor in load_file(path).items():
                assert (tensor == (step / 2 if ".exp_avg" in name else step)).all()


def test_checkpoints_are_whole_and_few(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.save(4)
    require_whole(tmp_path, 9, 12)


def test_the_estimate_is_the_size(tmp_path: Path) -> None:
    Training(tmp_path, size=50_000).save()
    found = sum(path.stat().st_size for path in place_of(tmp_path, 3).iterdir())
    assert shard_bytes(100_000) <= found <= 1.01 * shard_bytes(100_000)


class Disk:
    """A disk that refuses from the `room`-th operation on: opening, writing, flushing, closing, naming, renaming."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.number, self.room, self.done = number, 10**9, 0
        plain = Path.open

        def opened(path: Path, mode: str = "r", **options: Any) -> Any:
            if "w" not in mode:
                return plain(path, mode, **options)
            self.count()
            return _Stream(self, plain(path, mode, **options))

        def write_text(path: Path, text: str, encoding: str) -> None:
            with path.open("w", encoding=encoding) as stream:
                stream.write(text)

        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(Path, "write_text", write_text)
        for place, name in ((Path, "mkdir"), (Path, "rename"), (Path, "replace"), (os, "fsync")):
            monkeypatch.setattr(place, name, self._counted(getattr(place, name)))

    def _counted(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.count()
            return work(*arguments, **options)

        return counted

    def count(self) -> None:
        self.done += 1
        if self.done > self.room:
            raise OSError(self.number, os.strerror(self.number))


class _Stream:
    def __init__(self, disk: Disk, stream: Any) -> None:
        self.disk, self.stream = disk, stream

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.disk.count()

    def write(self, data: Any) -> int:
        self.disk.count()
        return self.stream.write(data)

    def flush(self) -> None:
        self.disk.count()
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_refuses_at_any_operation_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, asynchronous: bool
) -> None:
    """Told with the numbers, the former checkpoint is as it was, nothing is left; the next save works."""
    training = Training(tmp_path, asynchronous=asynchronous)
    training.save(2)
    training.saver.finish()
    training.step()
    former = content(place_of(tmp_path, 6))
    disk = Disk(monkeypatch, number)
    full = number in (errno.ENOSPC, errno.EDQUOT)
    numbers = r"; [\d,]+ bytes are needed, [\d,]+ are free" if full else ""
    room = 0
    while True:
        disk.done, disk.room = 0, room
        try:
            training.saver.save(training.state)
            training.saver.finish()
            break
        except StorageError as error:
            said = rf"{tmp_path}/checkpoints/\.step-9\.tmp[\w/.-]*: cannot be written: {os.strerror(number)}{numbers}"
            assert re.fullmatch(said, str(error))
        disk.room = 10**9
        assert content(place_of(tmp_path, 6)) == former
        found = newest(tmp_path, ALONE)
        assert found in (place_of(tmp_path, 6), place_of(tmp_path, 9))
        assert not list((tmp_path / "checkpoints").glob(".step-9.tmp"))
        room += 1
    assert room > 20
    sweep_unfinished(tmp_path)
    require_whole(tmp_path, 6, 9)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte, by root's leave."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("estimated", [True, False])
def test_a_disk_that_is_really_full(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, estimated: bool
) -> None:
    """Seen before the first byte, and, where another fills the disk meanwhile, at the byte that finds no room."""
    training = Training(small_disk, size=15_000, keep_last=1, asynchronous=asynchronous)
    training.save(2)  # of 360 kB each
    training.saver.finish()
    former = content(place_of(small_disk, 6))
    (small_disk / "ballast").write_bytes(bytes(500_000))
    with monkeypatch.context() as patch:
        if not estimated:
            patch.setattr(saving, "ensure_space", lambda *_: None)
        with pytest.raises(StorageError, match=r"360,\d{3} bytes(?: are needed)?, [\d,]+ are free") as caught:
            training.save()
            training.saver.finish()
    assert str(small_disk) in str(caught.value)
    assert ("a checkpoint needs" in str(caught.value)) == estimated
    assert content(place_of(small_disk, 6)) == former
    require_whole(small_disk, 6)
    (small_disk / "ballast").unlink()
    training.save()
    training.saver.finish()
    require_whole(small_disk, 12)


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(small_disk: Path, workplace: Path) -> None:
    recipe = load_recipe(tiny.make_recipe(workplace), [f"output={small_disk}/run"])
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageError, match=rf"{small_disk}/run: no right to write into {small_disk}; choose another"):
        train(recipe)
    assert not (workplace / "prepared").exists()


def spoil(path: Path) -> None:
    """Another byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_file_that_does_not_read_back_takes_no_older_one_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    training = Training(tmp_path, keep_last=1, asynchronous=asynchronous)
    training.save()
    training.saver.finish()

    def lie(path: Path, entries: Any) -> str:
        digest = write_tensors(path, entries)
        spoil(path)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_tensors", lie)
        with pytest.raises(StorageError, match="does not read back as it was written; check the disk"):
            training.save()
            training.saver.finish()
    require_whole(tmp_path, 3)
    training.save()
    training.saver.finish()
    require_whole(tmp_path, 9)


def test_while_the_newest_is_damaged_the_one_before_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every moment there is one that verifies: none goes before a newer one was read back."""
    training = Training(tmp_path, asynchronous=True)
    training.save(2)
    training.saver.finish()
    spoil(next(place_of(tmp_path, 6).glob("*.safetensors")))
    moments = []

    def watched(*arguments: Any) -> str:
        moments.append(newest(tmp_path, ALONE))
        digest = write_tensors(*arguments)
        moments.append(newest(tmp_path, ALONE))
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_tensors", watched)
        training.save()
        training.saver.finish()
    assert moments == [place_of(tmp_path, 3)] * 2
    assert newest(tmp_path, ALONE) == place_of(tmp_path, 9)


def test_a_run_that_went_back_replaces_the_damaged_ones(tmp_path: Path) -> None:
    """And they count for nothing until then: the one it went on from stays."""
    training = Training(tmp_path, keep_last=3)
    training.save(3)
    for step in (6, 9):
        spoil(place_of(tmp_path, step) / "state.json")
    training = Training(tmp_path, keep_last=2)
    training.step()
    training.save()
    assert steps_of(tmp_path) == [3, 6, 9]
    assert newest(tmp_path, ALONE) == place_of(tmp_path, 6)
    training.save()
    require_whole(tmp_path, 6, 9)


def test_beside_the_next_steps_the_values_of_its_own_step_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And as long as it is not committed, the former checkpoint is what a kill would leave."""
    gate, training = threading.Event(), Training(tmp_path, asynchronous=True)
    training.save()
    assert steps_of(tmp_path) == []
    training.saver.finish()
    require_whole(tmp_path, 3)

    def slow(*arguments: Any) -> str:
        assert gate.wait(20)
        return write_tensors(*arguments)

    monkeypatch.setattr(saving, "write_tensors", slow)
    training.save()
    training.step()
    assert not training.saver.written
    killed = [shutil.copytree(tmp_path, tmp_path.with_name("writing"))]
    gate.set()
    assert training.saver._writing is not None
    training.saver._writing.join(20)
    assert training.saver.written
    killed.append(shutil.copytree(tmp_path, tmp_path.with_name("written")))
    for folder in killed:
        assert newest(folder, ALONE) == place_of(folder, 3)
        sweep_unfinished(folder)
        require_whole(folder, 3)
    training.saver.commit()
    assert not training.saver.written
    require_whole(tmp_path, 3, 6)


def test_two_ranks_make_one_checkpoint(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        Training(tmp_path, ranks).save()

    assert together(2, work) == [None, None]
    require_whole(tmp_path, 3)
    names = {f"state-0000{rank}-of-00002.safetensors" for rank in range(2)}
    assert {path.name for path in place_of(tmp_path, 3).iterdir()} == {*names, "state.json", "manifest.json"}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "full"), RuntimeError("a bug")], ids=["disk", "bug"])
def test_a_rank_that_fails_stops_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, asynchronous: bool, fault: Exception
) -> None:
    """No checkpoint is made without its share, and no rank waits for it."""

    def write(path: Path, entries: Any) -> str:
        if path.name.startswith(f"state-0000{failing}") and ".step-6" in str(path):
            with saving.storage_faults(path, 1):
                raise fault
        return write_tensors(path, entries)

    def work(ranks: Ranks) -> None:
        training = Training(tmp_path, ranks, asynchronous=asynchronous, keep_last=1)
        training.save(2)
        training.saver.finish()

    monkeypatch.setattr(saving, "write_tensors", write)
    found = together(2, work)
    assert "another rank could not write its share" in str(found[1 - failing])
    assert isinstance(found[1 - failing], StorageError)
    assert isinstance(found[failing], StorageError if isinstance(fault, OSError) else RuntimeError)
    require_whole(tmp_path, 3)


def test_every_rank_counts_for_the_room_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(saving, "ensure_space", lambda folder, needed, purpose: asked.append(needed))
    assert together(2, lambda ranks: Training(tmp_path, ranks, size=500).save()) == [None, None]
    assert asked == [shard_bytes(2000)]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_rows(folder / "metrics.jsonl")]


def test_a_run_that_saves_beside_its_steps_is_the_same_run(workplace: Path, finished: Path) -> None:
    run = train(load_recipe(tiny.make_recipe(workplace, checkpoint__asynchronous=True)))
    assert rows_of(run) == rows_of(finished)
    assert steps_of(run) == steps_of(finished) == [6, 8]
    shard = "state-00000-of-00001.safetensors"
    for step in (6, 8):
        assert content(place_of(run, step))[shard] == content(place_of(finished, step))[shard]
        here, there = (json.loads((place_of(folder, step) / "state.json").read_text()) for folder in (run, finished))
        one, other = here.pop("identity"), there.pop("identity")
        moved = {"model.vision", "model.llm", "data.train", "data.validation"}  # to the folder of the test
        assert {key for key in one if one[key] != other[key]} == moved
        assert here == there
    for folder in ("final", "best"):
        assert content(run / folder)[WEIGHTS] == content(finished / folder)[WEIGHTS]


def test_a_run_stops_where_its_saves_fail_and_goes_on_where_they_work(
    workplace: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(tiny.make_recipe(workplace), ["checkpoint.asynchronous=true"])

    def write(path: Path, entries: Any) -> str:
        if ".step-6" not in str(path):
            return write_tensors(path, entries)
        with saving.storage_faults(path, 12_345):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_tensors", write)
        with pytest.raises(
            LlavaTrainError, match=r"step-6.*No space left on device; 12,345 bytes are needed"
        ) as caught:
            train(recipe)
    assert isinstance(caught.value, StorageError)
    run = workplace / "run"
    assert steps_of(run) == [3]
    assert not (run / "final").exists()
    train(recipe)
    assert rows_of(run) == rows_of(finished)
    assert content(run / "final")[WEIGHTS] == content(finished / "final")[WEIGHTS]
