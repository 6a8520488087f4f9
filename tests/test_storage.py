"""Where sources lie: names that expand, stores that fail, content that is recognised; hub datasets from a folder."""

import contextlib
import http.server
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from llava_train.data.pictures.media import Media, open_picture
from llava_train.data.reading import find_format, read_samples
from llava_train.data.records.containers import CONTAINERS
from llava_train.data.records.hub import hub_files
from llava_train.data.sample import Sample
from llava_train.errors import DataError, RecordError
from llava_train.storage import Identities, expand_paths, file_size, is_remote, open_binary, read_range

EXAMPLES = Path(__file__).parent / "data" / "examples"
ONE_OF_EACH = {
    expected["container"]: f"{folder.parent.name}/{name}"
    for folder in sorted(EXAMPLES.glob("*/expected.json"))
    for name, expected in json.loads(folder.read_text(encoding="utf-8")).items()
}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_names_expand_in_order(tmp_path: Path) -> None:
    touch(tmp_path, *(f"s-{n:03}.tar" for n in range(12)), "a[1].json", "[x].json")
    shards = [str(tmp_path / f"s-{n:03}.tar") for n in range(12)]
    assert expand_paths(str(tmp_path / "s-{000..011}.tar")) == shards
    assert expand_paths(str(tmp_path / "s-{009..011}.tar")) == shards[9:]
    assert expand_paths(str(tmp_path / "s-*.tar")) == expand_paths(str(tmp_path)) == shards
    assert expand_paths(str(tmp_path / "a[1].json")) == [str(tmp_path / "a[1].json")]
    assert expand_paths(str(tmp_path / "**/s-00?.tar")) == shards[:10]


def test_a_folder_gives_its_shards_and_nothing_that_describes_them(tmp_path: Path) -> None:
    touch(tmp_path, "b/data-0.arrow", "a/data-1.arrow", "a/cache-1.arrow", ".cache/x.arrow", "a/state.json", "a/x.json")
    assert expand_paths(str(tmp_path)) == [str(tmp_path / "a/data-1.arrow"), str(tmp_path / "b/data-0.arrow")]
    touch(tmp_path, "c.parquet")
    assert expand_paths(str(tmp_path)) == [str(tmp_path / "c.parquet")]


@pytest.mark.parametrize(
    "name",
    ["none.json", "none-*.json", "s-{0..3}.tar", "s-{3..0}.tar", "s-{0..99999999999}.tar", "empty", "x" * 5000, "\0"],
)
def test_names_of_nothing_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "s-0.tar")
    with pytest.raises(DataError, match=r"no such file|must count up"):
        expand_paths(str(tmp_path / name))


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, os.fsdecode(b"\xff.json"))
    for name in ("", "*.json"):
        with pytest.raises(DataError, match="name is not UTF-8"):
            expand_paths(str(tmp_path / name))


def test_local_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "\0"):
        for read in (open_binary, lambda name: read_range(name, 0, 3), file_size):
            if not (path == tmp_path and read is file_size):
                with pytest.raises(DataError, match="cannot be read") as caught:
                    read(str(path))
                assert str(caught.value).startswith(str(path))


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    file, memory = tmp_path / "a", tmp_path / "files.json"
    file.write_text("one")
    os.utime(file, (1, 1))
    first = Identities(memory)
    digest = first.of(str(file))
    first.save()
    written = memory.stat().st_mtime_ns
    known = Identities(memory)
    assert known.of(str(file)) == digest
    known.save()
    assert memory.stat().st_mtime_ns == written
    file.write_text("two")
    assert known.of(str(file)) != digest
    for damaged in ("[1]", "{", '"x"', '{"x": 1}'):
        memory.write_text(damaged)
        file.write_text("one")
        assert Identities(memory).of(str(file)) == digest


def test_a_file_in_a_store_is_known_by_what_the_store_says() -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/a/1.tar", b"one")
    system.pipe("/a/2.tar", b"two!")
    identities = Identities(Path("none"))
    first = identities.of("memory://a/1.tar")
    assert is_remote("memory://a/1.tar") and file_size("memory://a/2.tar") == 4
    assert read_range("memory://a/2.tar", 1, 2) == b"wo" and read_range("memory://a/2.tar", 3, 9) == b"!"
    assert expand_paths("memory://a/*.tar") == ["memory:///a/1.tar", "memory:///a/2.tar"]
    assert expand_paths("memory://a/{1..2}.tar") == ["memory://a/1.tar", "memory://a/2.tar"]
    system.pipe("/a/1.tar", b"1")
    assert identities.of("memory://a/1.tar") != first
    system.store.clear()


@pytest.mark.parametrize("url", ["memory://none.json", "nonsense://a", "abfs://a/b.tar", "memory://none-*.tar"])
def test_stores_that_fail_are_named(url: str) -> None:
    for read in (
        open_binary,
        file_size,
        Identities(Path("none")).of,
        lambda name: read_range(name, 0, 1),
        expand_paths,
    ):
        if read is expand_paths and "*" not in url:
            continue
        with pytest.raises(DataError, match=re.escape(url)):
            read(url)


# A web server

needs_http = pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="fsspec's http needs aiohttp")


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Files of the examples, by range as web stores give them; /broken/ fails while it is read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, directory=str(EXAMPLES))

    def do_GET(self) -> None:
        broken = self.path.startswith("/broken/")
        path = EXAMPLES / self.path.removeprefix("/broken").lstrip("/")
        if not path.is_file() or (broken and self.command == "GET"):
            self.send_error(500 if broken else 404)
            return
        content, asked = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(asked[1]), min(int(asked[2]), len(content) - 1)) if asked else (0, len(content) - 1)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(end - start + 1))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        self.send_header("ETag", f'"{len(content)}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start : end + 1])

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as found:
        threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_there_is_an_example_of_each_container() -> None:
    assert set(ONE_OF_EACH) == set(CONTAINERS)


@needs_http
@pytest.mark.parametrize("container", ONE_OF_EACH)
def test_files_on_the_web_are_read_in_place(server: str, container: str) -> None:
    name, media = ONE_OF_EACH[container], Media(EXAMPLES)
    url, count = f"{server}/{name}", 0
    assert find_format(url) == find_format(str(EXAMPLES / name))
    for ours, theirs in zip(read_samples(str(EXAMPLES / name), media), read_samples(url, media), strict=True):
        assert isinstance(ours, Sample) and isinstance(theirs, Sample)
        assert [turn.text for turn in ours.turns] == [turn.text for turn in theirs.turns]
        for one, other in zip(ours.images, theirs.images, strict=True):
            assert open_picture(one, media).tobytes() == open_picture(other, media).tobytes()
            assert other.path.startswith("http") == (other.kind in ("span", "cell"))
        count += 1
    assert count and Identities(Path("none")).of(url) == Identities(Path("none")).of(url)


@needs_http
def test_a_process_forked_later_reads_the_web_as_well(server: str) -> None:
    url = f"{server}/{ONE_OF_EACH['tar']}"
    assert read_range(url, 0, 3)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os._exit(0 if read_range(url, 0, 9) == b"000000000" else 1)
        os._exit(2)
    deadline = time.monotonic() + 20
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done == (child, 0)


@needs_http
@pytest.mark.parametrize("container", ONE_OF_EACH)
def test_a_server_that_fails_is_named(server: str, container: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{closed.getsockname()[1]}/{ONE_OF_EACH[container]}"
        for url in (f"{server}/none/{ONE_OF_EACH[container]}", f"{server}/broken/{ONE_OF_EACH[container]}", refused):
            with pytest.raises(DataError, match=re.escape(url)):
                list(read_samples(url, Media(EXAMPLES)))


def test_without_aiohttp_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "from llava_train.storage import open_binary\n"
        "open_binary('http://127.0.0.1:1/a.tar')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert re.search(r"DataError: http://127.0.0.1:1/a.tar: cannot be read: .*aiohttp.*pip install", result.stderr)


# Hub datasets


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    return tmp_path


def test_a_folder_stands_for_a_hub_dataset(hub_cache: Path) -> None:
    folder = hub_cache / "flags"
    folder.mkdir()
    shutil.copy(EXAMPLES / "cauldron" / "train.parquet", folder / "train-00000-of-00001.parquet")
    (file,) = hub_files(str(folder), None, "train")
    assert find_format(file) == "cauldron"
    samples = list(read_samples(file, Media(hub_cache)))
    assert not [sample for sample in samples if isinstance(sample, RecordError)]
    opened = [open_picture(ref, Media(hub_cache)) for s in samples if isinstance(s, Sample) for ref in s.images]
    assert [picture.size for picture in opened] == [(16, 12), (16, 14)]


def test_a_folder_that_datasets_saved(hub_cache: Path) -> None:
    from datasets import DatasetDict, load_from_disk

    saved = EXAMPLES / "vqa" / "saved"
    assert hub_files(str(saved), None, "train") == [str(saved / "data-00000-of-00001.arrow")]
    DatasetDict({"test": load_from_disk(str(saved))}).save_to_disk(str(hub_cache / "splits"))
    (file,) = hub_files(str(hub_cache / "splits"), None, "test")
    assert file == str(hub_cache / "splits" / "test" / "data-00000-of-00001.arrow")
    with pytest.raises(DataError, match=r"split train.*cannot be loaded"):
        hub_files(str(hub_cache / "splits"), None, "train")


def test_parts_of_splits_are_refused(hub_cache: Path) -> None:
    with pytest.raises(DataError, match="names a part of a split"):
        hub_files("any/thing", None, "train[:10%]")


@pytest.mark.parametrize("offline", ["1", pytest.param("0", marks=pytest.mark.corpus)])  # the library tries for 24 s
def test_a_dataset_that_is_not_there_is_named_at_once(tmp_path: Path, offline: str) -> None:
    code = "import sys; from llava_train.data.records.hub import hub_files; hub_files(sys.argv[1], None, 'train')"
    # A port that refuses stands for a network that is not there.
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": offline,
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:1",
    }
    for name in ("nobody/nothing", str(tmp_path)):
        started = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-c", code, name], capture_output=True, text=True, timeout=60, env=environment, check=False
        )
        assert f"DataError: hub: {name} (subset None, split train): cannot be loaded" in result.stderr
        assert time.monotonic() - started < (20 if offline == "1" else 50)
