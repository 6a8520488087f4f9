"""The downloader against a real server: broken, wrong, dead, slow, changed; and full disks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import llava_pretrain
from data_prep.common import fetching, transfer
from data_prep.common.fetching import Fetcher, Ledger, fetch_links
from data_prep.common.transfer import FetchError, Remote
from llava_train.errors import DataError, StorageError
from tests.data_prep.server import Served, Server

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
REPOSITORY = Path(__file__).parents[3]


def fetcher(root: Path, **more: object) -> Fetcher:
    return Fetcher(root, Ledger(root / "name" / "fetched.json"), **more)  # type: ignore[arg-type]


def remote(server: Server, content: bytes = CONTENT, path: str = "a/file.bin", **known: object) -> Remote:
    server.files.setdefault(f"/{path}", Served(content))
    return Remote(f"{server.url}/{path}", path, **known)  # type: ignore[arg-type]


def test_files_come_whole_at_once_and_only_once(server: Server, tmp_path: Path) -> None:
    files = [remote(server, CONTENT[number:], f"a/{number}.bin") for number in range(9)]
    fetcher(tmp_path).fetch(files)
    assert [(tmp_path / file.path).read_bytes() for file in files] == [CONTENT[number:] for number in range(9)]
    told = json.loads((tmp_path / "name" / "fetched.json").read_text())
    assert told["a/0.bin"]["sha256"] == SHA256.partition(":")[2]
    server.asked.clear()
    fetcher(tmp_path).fetch(files)
    assert server.asked == []
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(f"{number}.bin" for number in range(9))


def test_a_broken_connection_goes_on_where_it_broke(server: Server, tmp_path: Path) -> None:
    file = remote(server)
    server.files["/a/file.bin"].faults = ["drop", "drop"]
    fetcher(tmp_path).fetch([file])
    assert (tmp_path / file.path).read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, "bytes=150000-", "bytes=225000-"]


def test_a_server_without_ranges_begins_again(server: Server, tmp_path: Path) -> None:
    file = remote(server)
    server.files["/a/file.bin"].faults, server.files["/a/file.bin"].ranges = ["drop"], False
    fetcher(tmp_path).fetch([file])
    assert (tmp_path / file.path).read_bytes() == CONTENT


def test_a_file_that_changed_is_not_glued(server: Server, tmp_path: Path) -> None:
    file, changed = remote(server), CONTENT[::-1]
    server.files["/a/file.bin"].faults = ["drop", "404"]
    with pytest.raises(FetchError):
        fetcher(tmp_path).fetch([file])
    assert (tmp_path / "a" / "file.bin.part").stat().st_size == 150_000
    server.files["/a/file.bin"].content = changed
    fetcher(tmp_path).fetch([file])
    assert (tmp_path / file.path).read_bytes() == changed


@pytest.mark.parametrize(("checksum", "second"), [(None, None), (SHA256, "bytes=150000-")])
def test_without_a_validator_only_a_checksum_lets_it_go_on(
    server: Server, tmp_path: Path, checksum: str | None, second: str | None
) -> None:
    file = remote(server, checksum=checksum)
    server.files["/a/file.bin"].faults, server.files["/a/file.bin"].etag = ["drop"], False
    fetcher(tmp_path).fetch([file])
    assert (tmp_path / file.path).read_bytes() == CONTENT
    assert server.asked[1][1] == second


def test_a_part_that_is_the_whole_file_is_taken(server: Server, tmp_path: Path) -> None:
    file = remote(server, checksum=SHA256)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file.bin.part").write_bytes(CONTENT)
    fetcher(tmp_path).fetch([file])
    assert (tmp_path / file.path).read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == ["bytes=300000-"]


def test_a_wrong_checksum_names_file_expected_and_got_and_removes_the_part(server: Server, tmp_path: Path) -> None:
    file = remote(server, CONTENT + b"!", checksum=SHA256)
    with pytest.raises(FetchError, match=rf"a/file\.bin: wrong sha256: expected {SHA256[7:]}, got [0-9a-f]{{64}}"):
        fetcher(tmp_path).fetch([file])
    assert list((tmp_path / "a").glob("file.bin*")) == [tmp_path / "a" / "file.bin.part.etag"]


def test_md5_and_size_are_checked_where_they_are_published(server: Server, tmp_path: Path) -> None:
    fetcher(tmp_path).fetch([remote(server, checksum=f"md5:{hashlib.md5(CONTENT).hexdigest()}", size=300_000)])
    with pytest.raises(FetchError, match="wrong size: expected 7 bytes, got 300,000"):
        fetcher(tmp_path).fetch([remote(server, path="b.bin", size=7)])


def test_the_first_download_is_trusted_and_the_next_must_be_the_same(server: Server, tmp_path: Path) -> None:
    file = remote(server)
    fetcher(tmp_path).fetch([file])
    (tmp_path / file.path).unlink()
    fetcher(tmp_path).fetch([file])
    (tmp_path / file.path).unlink()
    server.files["/a/file.bin"].content = b"another"
    with pytest.raises(FetchError, match="wrong sha256"):
        fetcher(tmp_path).fetch([file])


def test_a_file_put_there_by_hand_is_verified(server: Server, tmp_path: Path) -> None:
    file = remote(server, checksum=SHA256)
    (tmp_path / "a").mkdir()
    (tmp_path / file.path).write_bytes(CONTENT)
    fetcher(tmp_path).fetch([file])
    assert server.asked == []
    (tmp_path / file.path).write_bytes(b"tampered")
    with pytest.raises(FetchError, match="wrong sha256"):
        fetcher(tmp_path).fetch([file])
    assert (tmp_path / file.path).exists()  # not ours to delete


def test_404_is_told_at_once_with_what_to_do(server: Server, tmp_path: Path) -> None:
    gone = Remote(f"{server.url}/gone.zip", "gone.zip")
    with pytest.raises(FetchError, match=r"/gone\.zip: the server answers 404 .*--mirror .*put a copy at .*gone\.zip"):
        fetcher(tmp_path).fetch([gone])
    assert len(server.asked) == 1


def test_a_busy_server_is_asked_again_and_a_broken_one_given_up(server: Server, tmp_path: Path) -> None:
    file = remote(server)
    server.files["/a/file.bin"].faults = ["500", "429", "500"]
    fetcher(tmp_path).fetch([file])
    assert len(server.asked) == 4
    server.files["/a/file.bin"].faults = ["500"] * 9
    (tmp_path / file.path).unlink()
    with pytest.raises(FetchError, match="answers 500; run the same command again"):
        fetcher(tmp_path).fetch([file])
    assert len(server.asked) == 4 + transfer.TRIES


def test_two_processes_do_not_write_one_part(server: Server, tmp_path: Path) -> None:
    file = remote(server)
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "file.bin.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(FetchError, match=r"file\.bin\.part: another process is fetching it"):
            fetcher(tmp_path).fetch([file])
    fetcher(tmp_path).fetch([file])
    assert (tmp_path / file.path).read_bytes() == CONTENT


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="no connection"):
        fetcher(tmp_path).fetch([Remote("http://127.0.0.1:9/x", "x")])


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "x"])
def test_only_http_is_fetched(url: str, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="only http and https"):
        fetcher(tmp_path).fetch([Remote(url, "x")])


@pytest.mark.parametrize(("where", "good"), [("{}/a/file.bin", True), ("file:///etc/hostname", False)])
def test_redirects_are_followed_to_http_alone(server: Server, tmp_path: Path, where: str, good: bool) -> None:
    remote(server)
    moved = Remote(f"{server.url}/moved", "moved")
    server.put("http://x/", b"")
    server.files["/moved"] = server.files.pop("/x/")
    server.files["/moved"].redirect = where.format(server.url)
    if good:
        fetcher(tmp_path).fetch([moved])
        assert (tmp_path / "moved").read_bytes() == CONTENT
    else:
        with pytest.raises(FetchError):
            fetcher(tmp_path).fetch([moved])


def test_a_mirror_takes_the_place_of_the_longest_prefix(server: Server, tmp_path: Path) -> None:
    server.put("https://far.away/data/x", b"near")
    mirrors = {"https://far.away/": "http://127.0.0.1:9/", "https://far.away/data/": f"{server.url}/far.away/data/"}
    fetcher(tmp_path, mirrors=mirrors).fetch([Remote("https://far.away/data/x", "x")])
    assert (tmp_path / "x").read_bytes() == b"near"


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x"])
def test_nothing_is_written_outside_the_root(server: Server, tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match="image root"):
        fetcher(tmp_path / "root").fetch([Remote(f"{server.url}/x", path)])


def test_no_room_is_told_before_the_download(server: Server, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"needs 1,000,000,000,000,000 bytes, [\d,]+ are free"):
        fetcher(tmp_path).fetch([remote(server, about=10**15)])
    assert server.asked == []


def test_dead_links_are_counted_listed_and_not_asked_again(server: Server, tmp_path: Path) -> None:
    for name in ("good", "odd"):
        server.put(f"http://{name}", name.encode())
    server.put("http://busy", b"x", faults=["500"] * 2)
    links = [Remote(f"{server.url}/{name}", f"raw/{name}") for name in ("good", "odd", "busy", "gone")]

    def finish(file: Remote, path: Path) -> None:
        if path.name == "odd":
            raise FetchError("no picture", "not_an_image")
        path.rename(tmp_path / path.name)

    missing = tmp_path / "missing.jsonl"
    causes = fetch_links(fetcher(tmp_path), links, finish, missing, "links")
    assert causes == {"not_an_image": 1, "http_500": 1, "http_404": 1}
    listed = [json.loads(line) for line in missing.read_text().splitlines()]
    assert {"path": "raw/gone", "url": f"{server.url}/gone", "cause": "http_404"} in listed
    server.asked.clear()
    assert fetch_links(fetcher(tmp_path), links[1:], finish, missing, "links") == {"not_an_image": 1, "http_404": 1}
    assert [path for path, _ in server.asked] == ["/busy"]


def test_no_network_is_not_forty_thousand_dead_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "ALL_DEAD", 3)
    links = [Remote(f"http://127.0.0.1:9/{number}", f"raw/{number}") for number in range(100)]
    with pytest.raises(DataError, match="the network is not there"):
        fetch_links(fetcher(tmp_path), links, lambda *_: None, tmp_path / "missing.jsonl", "links")


def command(out: Path, server: Server) -> list[str]:
    return ["--out", str(out), "--only", "annotations", *server.mirror("https://huggingface.co/")]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}


def test_ctrl_c_keeps_the_part_and_the_same_command_goes_on(server: Server, tmp_path: Path) -> None:
    content = json.dumps([{"id": "x" * 300_000, "image": "00000/000000010.jpg"}]).encode()
    server.put(llava_pretrain.SOURCE + llava_pretrain.JSON, content, faults=["slow"])
    script = [sys.executable, "-m", "data_prep.llava_pretrain", *command(tmp_path, server)]
    target = tmp_path / "LLaVA-Pretrain" / llava_pretrain.JSON
    part = target.with_name(f"{target.name}.part")
    process = subprocess.Popen(script, cwd=REPOSITORY, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told.strip().endswith("the same command goes on where it stopped")
    assert 0 < (kept := part.stat().st_size) < len(content)
    again = subprocess.run(script, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    assert again.returncode == 1  # one record is not 558,128
    assert json.loads(again.stdout)["records"][f"LLaVA-Pretrain/{llava_pretrain.JSON}"]["records"] == 1
    assert target.read_bytes() == content
    assert server.asked[-1][1] == f"bytes={kept}-"


FULL = """
import resource, sys
sys.argv, limit = sys.argv[1:], int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from data_prep.llava_pretrain import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_names_path_bytes_and_goes_on(server: Server, tmp_path: Path) -> None:
    server.put(llava_pretrain.SOURCE + llava_pretrain.JSON, CONTENT)
    script = [sys.executable, "-c", FULL, "100000", *command(tmp_path, server)]
    done = subprocess.run(script, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert "558k.json.part: File too large: 200,000 bytes are still needed" in done.stderr
    assert (tmp_path / "LLaVA-Pretrain" / f"{llava_pretrain.JSON}.part").stat().st_size == 100_000


def test_a_disk_that_is_really_full(server: Server, tmp_path: Path) -> None:
    """A tmpfs of its own in a namespace of its own; the warning before the download is switched off."""
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=128k tmpfs "$1" && shift && exec "$@"', "sh"]
    able = (
        shutil.which("unshare") and not subprocess.run([*mount, str(tmp_path), "true"], capture_output=True).returncode
    )
    if not able:
        pytest.skip("a file system can be mounted by root only")
    server.put("http://x/big", CONTENT)
    code = (
        "import sys; from pathlib import Path; from data_prep.common import transfer\n"
        "from data_prep.common.transfer import *\n"
        "transfer.ensure_space = lambda *_: None\n"
        "download(Remote(sys.argv[1], 'big'), sys.argv[1], Path(sys.argv[2], 'big'), Watch())"
    )
    script = [sys.executable, "-c", code, f"{server.url}/x/big", str(tmp_path)]
    done = subprocess.run(
        [*mount, str(tmp_path), *script], cwd=REPOSITORY, env=environment(), capture_output=True, text=True
    )
    assert "StorageError" in done.stderr
    assert "No space left on device" in done.stderr
    assert "are still needed, 0 are free; what is there is kept" in done.stderr
