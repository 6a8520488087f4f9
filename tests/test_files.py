"""Files: whole or not at all, inside their root, and never opened where they are no files."""

import errno
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava_train.data.pictures.images import check_image, decode_image, open_image
from llava_train.errors import DataError, RecordError, StorageError
from llava_train.files import (
    atomic_folder,
    ensure_space,
    inside,
    read_json,
    regular_file,
    storage_faults,
    sweep,
    temporary_beside,
    write_json,
)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with atomic_folder(target) as folder:
            (folder / "file").write_text(text)
    assert (target / "file").read_text() == "second"
    assert list(tmp_path.iterdir()) == [target]


def test_space_is_checked_with_both_numbers(tmp_path: Path) -> None:
    ensure_space(tmp_path / "not" / "yet", 1, "x")
    with pytest.raises(StorageError, match=r"the model needs 1,000,000,000,000,000,000 bytes, [\d,]+ are free"):
        ensure_space(tmp_path, 10**18, "the model")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is a file"):
        ensure_space(tmp_path / "file" / "below", 1, "x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_a_disk_refuses_is_told(tmp_path: Path, number: int) -> None:
    path = tmp_path / "not" / "yet" / "file"
    with pytest.raises(StorageError) as caught, storage_faults(path, 12_345):
        raise OSError(number, os.strerror(number))
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    numbers = r"; 12,345 bytes are needed, [\d,]+ are free" if full else ""
    assert re.fullmatch(f"{path}: cannot be written: {os.strerror(number)}{numbers}", str(caught.value))


def test_a_file_above_the_limit_of_the_process_is_told(tmp_path: Path) -> None:
    """A quota as the system enforces it: the write itself fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        message = "cannot be written: File too large; 2,000 bytes are needed, "
        with pytest.raises(StorageError, match=message), storage_faults(tmp_path / "a", 2_000):
            (tmp_path / "a").write_bytes(bytes(2_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), storage_faults(tmp_path, 1):
        raise ValueError("mine")


HOSTILE = [
    "../x",
    "/etc/passwd",
    "a/../../x",
    "http://host/x.png",
    "a\0b",
    "link/x",
    "file:x",
    "\ud800",
    "lost",
    "link",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "top" / "sub").mkdir(parents=True)
    (tmp_path / "top" / "link").symlink_to(tmp_path)
    (tmp_path / "top" / "lost").symlink_to(tmp_path / "nowhere")
    (tmp_path / "top" / "short").symlink_to("sub")
    return tmp_path / "top"


@pytest.mark.parametrize("path", HOSTILE)
def test_no_path_leaves_its_root(root: Path, path: str) -> None:
    with pytest.raises(RecordError, match="image root") as caught:
        inside(root, path)
    assert (caught.value.cause, caught.value.hostile) == ("image_path", True)


def test_paths_inside_are_found_without_links(root: Path) -> None:
    found = {"a.png": "a.png", "sub/./b": "sub/b", "short/b": "sub/b", "sub/../short//b": "sub/b", "none/a": "none/a"}
    for relative, expected in found.items():
        assert inside(root, relative) == root / expected
    assert inside(Path("/"), "a/b") == Path("/a/b")


def test_links_may_lead_outside_where_that_is_allowed(root: Path) -> None:
    assert inside(root, "link/x", allow_links=True) == root / "link" / "x"
    assert inside(root, "link/../x", allow_links=True) == root / "x"  # as it is written, not as the link leads
    for path in [*HOSTILE[:5], "link/../../x"]:
        with pytest.raises(RecordError):
            inside(root, path, allow_links=True)


def test_the_root_itself_may_be_a_link_and_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / "top").unlink(missing_ok=True)
        (tmp_path / "top").symlink_to(tmp_path / name)
        for root in (tmp_path / "top", Path("top")):
            assert inside(root, "a.png") == tmp_path / name / "a.png"


def test_links_that_turn_in_a_circle_are_no_file(root: Path) -> None:
    (root / "ring").symlink_to("ring")
    with pytest.raises(RecordError) as caught:
        regular_file(inside(root, "ring/a.png"), "x", "video")
    assert (caught.value.cause, caught.value.hostile) == ("video_missing", False)


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        place = Path.cwd()
        os.chdir(tmp_path)  # the name of a socket must be short
        try:
            server.bind("socket")
        finally:
            os.chdir(place)
    told = {"folder": "a folder", "pipe": "a pipe", "socket": "a socket", "zero": "a device"}
    reads: list[Callable] = [lambda p: decode_image(p, "x"), lambda p: check_image(p, "x", "exists")]
    for name, kind in told.items():
        for read in reads:
            with pytest.raises(RecordError, match=f"x: {kind}") as caught:
                read(tmp_path / name)
            assert (caught.value.cause, caught.value.hostile) == ("image_path", True)
    for name in ("none.png", "folder/none.png", "n" * 300):
        with pytest.raises(RecordError, match="no such image") as caught:
            open_image(tmp_path, name)
        assert (caught.value.cause, caught.value.hostile) == ("image_missing", False)


OPENED_FILES = """
import os, sys
from pathlib import Path
from llava_train.data.pictures.images import check_image, open_image
from llava_train.errors import RecordError
from llava_train.files import inside

opened = []
sys.addaudithook(lambda event, arguments: event == "open" and opened.append(str(arguments[0])))
root = Path(sys.argv[1])
open_image(root, "good.png")  # what is imported at the first picture
open_image(root, "bad.png") if (root / "bad.png").exists() else None
opened.clear()
open_image(root, "good.png")
assert opened == [os.path.realpath(root / "good.png")], opened
opened.clear()
for name in sys.argv[2:] + ["a\\0b", "\\ud800.png"]:
    for read in (open_image, lambda root, name: check_image(inside(root, name), name, "decode")):
        try:
            read(root, name)
        except RecordError as error:
            assert error.cause == "image_path" and error.hostile, (name, error)
        else:
            raise SystemExit(f"{name} was read")
assert opened == [], opened
"""


def test_no_byte_outside_the_root_is_read(tmp_path: Path) -> None:
    root = tmp_path / "top"
    (root / "sub").mkdir(parents=True)
    for place in (root / "good.png", tmp_path / "secret.png"):
        Image.new("RGB", (2, 2)).save(place)
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "zero").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe")
    outside = str(tmp_path / "secret.png")
    hostile = ["../secret.png", "sub/../../secret.png", outside, "out.png", "up/secret.png", "up/../top/../secret.png"]
    hostile += [f"file://{outside}", "http://host/x.png", f"file:{outside}", "data:image/png;base64,AAAA"]
    hostile += ["pipe", "sub", "", ".", "zero", "/dev/zero", "/proc/self/environ"]
    command = [sys.executable, "-c", OPENED_FILES, str(root), *hostile]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def test_json_says_where_it_breaks(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ä": 1})
    assert read_json(tmp_path / "a.json") == {"ä": 1}
    (tmp_path / "b.json").write_text('{"a": 1,\n "b" 2}')
    with pytest.raises(DataError, match=r"b\.json:2:6"):
        read_json(tmp_path / "b.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("text", ["é한", "half \ud800 of it", "plain"])
def test_json_of_any_text_is_written_and_read(tmp_path: Path, text: str) -> None:
    write_json(tmp_path / "a.json", {"text": text})
    assert read_json(tmp_path / "a.json") == {"text": text}


def test_what_was_left_half_written_is_swept_after_a_day(tmp_path: Path) -> None:
    old, new = temporary_beside(tmp_path / "a"), temporary_beside(tmp_path / "a")
    assert old != new
    for path in (old, new, tmp_path / ".hidden", tmp_path / "a"):
        path.write_text("x")
        os.utime(path, (0, 0))
    os.utime(new)
    temporary_beside(tmp_path / "b").mkdir()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {new.name, ".hidden", "a"}
    assert not old.exists()
