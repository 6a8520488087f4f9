"""S1, S4 and S5 as they happen: what training, resuming, exporting and chatting reach for, in one offline process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow(reason="trains, resumes, exports and chats in a process of its own")

Event = tuple[str, str, list[str]]
WORK = ("import", "train", "resume", "export", "chat", "between")


@pytest.fixture(scope="module")
def life(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """(folder, what `tests.security.watched` saw in it)."""
    folder = tmp_path_factory.mktemp("life")
    for name in ("vision", "llm", "data"):
        (folder / name).symlink_to(parts / name)
    command = [sys.executable, "-m", "tests.security.watched", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [tuple(event) for event in json.loads(done.stdout.splitlines()[-1])]


def of(events: list[Event], kind: str, phases: tuple[str, ...] = WORK) -> list[Event]:
    return [event for event in events if event[1].startswith(kind) and event[0] in phases]


def test_nothing_is_unpickled(life) -> None:
    _, events = life
    assert not of(events, "pickle.find_class")
    assert of(events, "pickle.find_class", ("control",))


def test_no_socket_is_opened(life) -> None:
    _, events = life
    assert not of(events, "socket.")
    assert of(events, "socket.connect", ("control",))


def test_the_one_process_started_is_the_check_of_the_export(life) -> None:
    _, events = life
    (started,) = [
        event for kind in ("subprocess.", "os.system", "os.exec", "os.posix_spawn") for event in of(events, kind)
    ]
    assert started[0] == "export"
    assert started[2][0] == sys.executable


def test_an_export_writes_where_it_was_told_to(life) -> None:
    """Everything lands in the folder (under its temporary name beside it) or in a scratch folder that is gone after."""
    folder, events = life
    export = [event for event in events if event[0] == "export" and event[1] not in ("subprocess.Popen",)]
    touched = {path for event in export for path in event[2]}
    out = folder / "out"
    scratch = {path for path in touched if not Path(path).is_relative_to(out)} - {os.devnull}
    assert str(out / "hf") in touched
    assert all(Path(path).is_relative_to(tempfile.gettempdir()) and not Path(path).exists() for path in scratch), (
        scratch
    )
    assert [path.name for path in out.iterdir()] == ["hf"]


def test_a_run_writes_into_its_folder_and_its_cache(life) -> None:
    folder, events = life
    known = (
        folder / "run",
        folder / "prepared",
        Path(tempfile.gettempdir()),
        Path.home() / ".cache",
        Path.home() / ".config",
    )
    written = {path for event in of(events, "", ("train", "resume")) for path in event[2]} - {os.devnull}
    assert written
    outside = [path for path in written if not any(Path(path).is_relative_to(each) for each in known)]
    assert not outside
