"""What a run leaves on the disk whenever it ends: the order of flushing and renaming, and every file operation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_train import load_recipe, train
from tests import tiny
from tests.conftest import REPOSITORY


class Disk:
    """Watches that what is renamed into place in a run folder is on the disk before, and its name soon after."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.named: list[str] = []
        self.faults: list[str] = []
        self.nameless: set[Path] = set()
        self._folders = (folder, folder / "checkpoints")
        self._flushed: dict[int, tuple[int, int]] = {}
        self._on = True
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._noting(getattr(os, name)))
        sys.addaudithook(self._hear)  # a hook stays for the life of the process

    def stop(self) -> None:
        self._on = False

    def _noting(self, flush):
        def noting(descriptor: int) -> None:
            flush(descriptor)
            found = os.fstat(descriptor)
            self._flushed[found.st_ino] = (found.st_size, found.st_mtime_ns)
            self.nameless = {path for path in self.nameless if path.parent.stat().st_ino != found.st_ino}

        return noting

    def _hear(self, event: str, arguments: tuple) -> None:
        """Called before the system renames (os.rename, os.replace and all that is made of them)."""
        if not self._on or event != "os.rename":
            return
        source, target = Path(os.fsdecode(arguments[0])), Path(os.fsdecode(arguments[1]))
        if target.parent not in self._folders or target.name.startswith("."):
            return
        inside = sorted(source.rglob("*")) if source.is_dir() else []
        for path in (source, *inside):
            found = path.stat()
            if self._flushed.get(found.st_ino) != (found.st_size, found.st_mtime_ns):
                self.faults.append(f"{target.name}: {path.name} was not flushed after its last change")
        self.faults += [f"{path.name}: its name was not flushed before {target.name} came" for path in self.nameless]
        self.nameless.add(target)
        self.named.append(target.name)


def test_data_is_flushed_before_its_name_and_the_name_after(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of power finds a checkpoint whole or not at all: file, folder, rename, parent, in this order."""
    options = ["optimization.max_steps=4", "checkpoint.save_every=2", "monitor.eval_every=2"]
    recipe = load_recipe(tiny.make_recipe(workplace), options)
    disk = Disk(workplace / "run", monkeypatch)
    try:
        train(recipe)
    finally:
        disk.stop()
    assert {"step-2", "step-4", "best", "final"} <= set(disk.named)
    assert not disk.faults
    assert not disk.nameless


@pytest.mark.corpus(reason="a dozen processes, each of which loads the libraries anew")
@pytest.mark.timeout(1200)  # where the machine is busy
def test_a_run_that_ends_at_a_file_operation_goes_on() -> None:
    """A sample of what `scripts/chaos_test.py` does in full."""
    command = [sys.executable, str(REPOSITORY / "scripts" / "chaos_test.py"), "--max-points", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["pass"] == figures["points"] == 6
