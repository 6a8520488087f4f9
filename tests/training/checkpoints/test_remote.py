"""Checkpoints in a store: complete or not listed, verified or refused; stores that fail; the upload beside a run."""

import contextlib
import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from llava_train.errors import StorageError
from llava_train.training.checkpoints.manifest import seal
from llava_train.training.checkpoints.mirror import Uploader
from llava_train.training.checkpoints.remote import DamagedError, Remote

FILES = ("state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors", "state.json", "zero/rank-0.bin")


def write_step(run: Path, step: int, *files: str) -> Path:
    folder = run / "checkpoints" / f"step-{step}"
    for name in files or FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"{name} of {step} ".encode() * 5000)
    seal(folder, {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files or FILES})
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Bucket:
    """A bucket of moto's S3 server on this machine; `fault` sees each request first and may answer a status."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self.server.start()
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        listener: Any = self.server._server
        inner = listener.app

        def app(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
            status = self.fault(environ["REQUEST_METHOD"], environ["PATH_INFO"])
            if status is None:
                return inner(environ, start)
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(f"{status} told to", [("Content-Length", "0")])
            return [b""]

        listener.app = app

    def environment(self) -> dict[str, str]:
        host, port = self.server.get_host_and_port()
        return {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # botocore's own retries would hide ours
            "AWS_EC2_METADATA_DISABLED": "true",
            "no_proxy": "127.0.0.1",
        }


@pytest.fixture(scope="module")
def moto() -> Iterator[Bucket]:
    pytest.importorskip("moto.server", reason="needs moto[s3,server]")
    pytest.importorskip("s3fs", reason="needs s3fs")
    with pytest.MonkeyPatch.context() as patch:
        found = Bucket()
        for name, value in found.environment().items():
            patch.setenv(name, value)
        with contextlib.suppress(FileExistsError):  # moto keeps its buckets for the process
            fsspec.filesystem("s3").mkdir("bucket")
        yield found
        found.server.stop()
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture
def s3(moto: Bucket, tmp_path: Path) -> Iterator[Bucket]:
    """The server, with no fault, and the environment that leads to it."""
    yield moto
    moto.fault = lambda method, path: None


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://bucket/{tmp_path.name}"
    return f"memory://{tmp_path.name}" if request.param == "memory" else f"file://{tmp_path}/store"


def at(url: str, name: str) -> tuple[Any, str]:
    system, base = fsspec.core.url_to_fs(url)
    system.invalidate_cache()
    return system, f"{base}/{name}"


# What a store holds


def test_a_step_goes_to_a_store_and_comes_back(url: str, tmp_path: Path) -> None:
    remote, sent = Remote(f"{url}/", ()), {}
    remote.probe()
    assert remote.steps() == [] and remote.pull_newest(tmp_path / "b", -1) is None
    for step in (20, 100, 40):
        folder = write_step(tmp_path / "a", step)
        sent[step] = content(folder)
        assert remote.push(folder) == sum(map(len, sent[step].values()))
    assert remote.push(folder) == 0
    fsspec.get_filesystem_class(url.split(":")[0]).clear_instance_cache()
    again = Remote(url, ())
    assert again.steps() == [20, 40, 100]
    assert again.pull(40, tmp_path / "b") == tmp_path / "b" / "step-40"
    assert again.pull_newest(tmp_path / "b", 100) is None and again.pull_newest(tmp_path / "b", 40) == 100
    assert content(tmp_path / "b" / "step-40") == sent[40] and content(tmp_path / "b" / "step-100") == sent[100]
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"step-40", "step-100"}
    again.remove(40)
    again.remove(40)
    assert remote.steps() == [20, 100]
    system, gone = at(url, "step-40")
    assert not system.exists(gone) and system.find(at(url, "")[1].rstrip("/"))
    with pytest.raises(StorageError, match=re.escape(f"{url}/step-40: has no manifest.json")):
        remote.pull(40, tmp_path / "b")


def test_a_step_done_again_replaces_the_old_one(url: str, tmp_path: Path) -> None:
    remote = Remote(url, ())
    remote.push(write_step(tmp_path / "a", 4))
    other = write_step(tmp_path / "b", 4, "state.json", "other.bin")
    remote.push(other)
    system, base = at(url, "step-4")
    assert len(system.find(base)) == 3
    write_step(tmp_path / "c" / "checkpoints", 4)
    assert content(remote.pull(4, tmp_path / "c" / "checkpoints")) == content(other)


def test_files_and_trees_of_a_run(url: str, tmp_path: Path) -> None:
    remote, back = Remote(url, ()), tmp_path / "back"
    assert remote.pull_file("metrics.jsonl", back) is False and not back.exists()
    for text in ("one", "two"):
        (tmp_path / "rows").write_text(text)
        remote.push_file(tmp_path / "rows", "metrics.jsonl")
        assert remote.pull_file("metrics.jsonl", back) is True and back.read_text() == text
    remote.push_tree(write_step(tmp_path / "a", 1), "final")
    remote.push_tree(write_step(tmp_path / "b", 1, "other.bin"), "final")
    system, base = at(url, "final")
    assert [path.rpartition("/")[2] for path in sorted(system.find(base))] == ["manifest.json", "other.bin"]
    assert remote.steps() == []


@pytest.mark.parametrize("sent", range(len(FILES) + 1))
def test_an_upload_that_ends_in_the_middle_is_not_listed(sent: int, tmp_path: Path, monkeypatch: Any) -> None:
    remote, system = Remote(f"memory://{tmp_path.name}", ()), fsspec.filesystem("memory")
    older, newer = write_step(tmp_path / "a", 4, "state.json"), write_step(tmp_path / "b", 4)
    remote.push(older)
    put, count = system.put_file, iter(range(99))

    def failing(local: str, target: str) -> None:
        if next(count) == sent:
            raise ValueError("told to")
        put(local, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(system), "put_file", lambda self, local, target: failing(local, target))
        with pytest.raises(StorageError, match=r"memory://.*: step-4/.* cannot be uploaded: ValueError: told to"):
            remote.push(newer)
    assert remote.steps() == []
    assert remote.push(newer) and remote.steps() == [4]
    assert content(remote.pull(4, tmp_path / "c")) == content(newer)


def test_a_process_killed_while_it_sends_leaves_nothing_that_is_listed(s3: Bucket, tmp_path: Path) -> None:
    url, folder = f"s3://bucket/{tmp_path.name}", write_step(tmp_path / "a", 40)
    code = (
        "import sys; from pathlib import Path; from llava_train.training.checkpoints.remote import Remote\n"
        "Remote(sys.argv[1]).push(Path(sys.argv[2]))"
    )
    reached, killed = threading.Event(), threading.Event()

    def fault(method: str, path: str) -> int | None:
        if method == "PUT" and path.endswith(FILES[2]):
            reached.set()
            return 500 if killed.wait(30) else None
        return None

    s3.fault = fault
    with subprocess.Popen([sys.executable, "-c", code, url, str(folder)]) as process:
        assert reached.wait(60)
        process.kill()
        process.wait()
        killed.set()
    assert process.returncode == -signal.SIGKILL
    s3.fault = lambda method, path: None
    remote = Remote(url, ())
    assert remote.steps() == [] and len(at(url, "")[0].find(f"bucket/{tmp_path.name}")) == 2
    remote.retain(41, lambda steps: [])
    assert not at(url, "")[0].find(f"bucket/{tmp_path.name}")
    assert remote.push(folder) and content(remote.pull(40, tmp_path / "b")) == content(folder)
    remote.retain(40, lambda steps: steps)
    assert remote.steps() == [40]
    s3.fault = lambda method, path: 403 if method == "POST" else None  # files are removed many at a time
    with pytest.raises(StorageError, match=f"{url}: step-40 cannot be removed"):
        remote.remove(40)
    assert remote.steps() == []


# What does not verify


def flip(system: Any, path: str) -> None:
    stored = bytearray(system.cat_file(path))
    stored[len(stored) // 2] ^= 1
    system.pipe_file(path, bytes(stored))


DAMAGES: dict[str, Callable[[Any, str], object]] = {
    "flipped": flip,
    "shorter": lambda system, path: system.pipe_file(path, system.cat_file(path)[:-1]),
    "empty": lambda system, path: system.pipe_file(path, b""),
    "gone": lambda system, path: system.rm_file(path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_is_refused_whole(url: str, damage: str, tmp_path: Path, capsys: Any) -> None:
    remote, name = Remote(url, ()), FILES[1]
    for step in (20, 40):
        remote.push(write_step(tmp_path / "a", step))
    DAMAGES[damage](*at(url, f"step-40/{name}"))
    before = write_step(tmp_path / "b" / "checkpoints", 40, "old").parent
    into = before.parent.parent
    with pytest.raises(DamagedError, match=re.escape(f"{url}/step-40/{name}") + ".*refused"):
        remote.pull(40, into)
    assert sorted(path.name for path in into.iterdir()) == ["checkpoints"]
    assert remote.pull_newest(into, -1) == 20
    assert content(into / "step-20") == content(tmp_path / "a" / "checkpoints" / "step-20")
    said = capsys.readouterr().err
    assert f"passed over: {url}/step-40/{name}" in said and "downloaded step-20 (" in said


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "a/../../outside",
        "/outside",
        "file://outside",
        "a\0b",
        "\udcff",
        "manifest.json",
        ".",
        "",
        "a/../b",
    ],
)
def test_a_manifest_that_leads_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    remote, system = Remote(url, ()), fsspec.filesystem("memory")
    (tmp_path / "a").mkdir()
    seal(tmp_path / "a", {"state.json": hashlib.sha256(b"x").hexdigest(), name: hashlib.sha256(b"x").hexdigest()})
    for file in ("step-40/state.json", "outside", "step-40/b"):
        system.pipe_file(f"/{tmp_path.name}/{file}", b"x")
    system.put_file(str(tmp_path / "a" / "manifest.json"), f"/{tmp_path.name}/step-40/manifest.json")
    with pytest.raises(DamagedError, match=re.escape(f"{url}/step-40/manifest.json: names {name!r}, which ")):
        remote.pull(40, tmp_path / "b")
    assert remote.pull_newest(tmp_path / "b", -1) is None
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "manifest.json"]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"files": {}}'])
def test_a_manifest_that_is_none_is_refused(text: bytes, tmp_path: Path) -> None:
    remote = Remote(f"memory://{tmp_path.name}", ())
    fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/step-40/manifest.json", text)
    with pytest.raises(DamagedError, match=re.escape(f"{remote.url}/step-40/manifest.json is damaged; the step")):
        remote.pull(40, tmp_path / "b")


def test_what_is_damaged_here_is_not_sent(tmp_path: Path) -> None:
    remote = Remote(f"memory://{tmp_path.name}", ())
    folder = write_step(tmp_path, 40)
    (folder / FILES[1]).write_bytes(b"other")
    with pytest.raises(StorageError, match=re.escape(f"{folder / FILES[1]}: does not match its sha256")):
        remote.push(folder)
    (folder / FILES[1]).unlink()
    with pytest.raises(StorageError, match=re.escape(f"{folder / FILES[1]}: cannot be uploaded: No such file")):
        remote.push(folder)
    with pytest.raises(StorageError, match=r"step-41/manifest.json: cannot be uploaded: No such file"):
        remote.push(tmp_path / "checkpoints" / "step-41")
    assert remote.steps() == []


# Stores that fail


def test_stores_that_cannot_be_used_are_found_before_the_first_step(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    (tmp_path / "file").touch()
    for url, told in {
        "gs://bucket/x": r'gs://bucket/x: .*pip install "fsspec\[gcs\]"',
        "nonsense://x": r"nonsense://x: .*Protocol not known: nonsense",
        f"file://{tmp_path}/file/x": r"file:///.*: Not a directory",
    }.items():
        with pytest.raises(StorageError, match=told):
            Remote(url).probe()
    for url in ("bucket/x", "/bucket", "s3://", "file:///"):
        with pytest.raises(StorageError, match="is no URL; write s3://"):
            Remote(url)


def test_buckets_that_cannot_be_used_are_found_before_the_first_step(s3: Bucket, monkeypatch: Any) -> None:
    asked: list[str] = []
    s3.fault = lambda method, path: asked.append(path)
    told = r"s3://bukket/x: .*bucket does not exist; create the bucket or the folder, or"
    with pytest.raises(StorageError, match=told):
        Remote("s3://bukket/x").probe()
    with pytest.raises(StorageError, match=told):
        Remote("s3://bukket/x", (0.01,)).push_file(Path(__file__), "file")
    assert len(asked) == len(set(asked)), "a missing bucket was asked for twice"
    for method, failure in {"PUT": "uploaded", "GET": "listed", "DELETE": "removed"}.items():
        s3.fault = lambda asked, path, method=method: 403 if asked == method else None  # type: ignore[misc]
        told = rf"s3://bucket/rights: .*cannot be {failure}: .*check the credentials \(AWS_ACCESS_KEY_ID"
        with pytest.raises(StorageError, match=told):
            Remote("s3://bucket/rights").probe()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    with pytest.raises(StorageError, match=r"s3://bucket/x: .*credentials; check the credentials \(AWS_ACCESS_KEY_ID"):
        Remote("s3://bucket/x").probe()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_failure_that_passes_is_tried_again_and_one_that_lasts_is_told(s3: Bucket, tmp_path: Path) -> None:
    url, folder = f"s3://bucket/{tmp_path.name}", write_step(tmp_path / "a", 40)
    failed: list[tuple[str, str]] = []

    def once(method: str, path: str) -> int | None:
        if (method, path) in failed:
            return None
        failed.append((method, path))
        return 500

    s3.fault = once
    remote = Remote(url, (0.01, 0.01))
    assert remote.push(folder) and remote.steps() == [40]
    assert content(remote.pull(40, tmp_path / "b")) == content(folder)
    assert len(failed) > 2 * len(FILES)
    s3.fault = lambda method, path: 500 if method == "PUT" else None
    with pytest.raises(StorageError, match=rf"{url}: step-41/{FILES[0]} cannot be uploaded: Internal Server Error"):
        remote.push(write_step(tmp_path / "a", 41))


def test_parts_that_the_store_forgot_are_sent_again(tmp_path: Path, monkeypatch: Any) -> None:
    system, folder = type(fsspec.filesystem("memory")), write_step(tmp_path, 40)
    put, forgot = system.put_file, iter([True])

    def forgetful(self: Any, local: str, target: str) -> None:
        if next(forgot, False):  # how s3fs tells of NoSuchUpload, which is no missing bucket
            raise FileNotFoundError("The specified upload does not exist. The upload ID may be invalid, or ...")
        put(self, local, target)

    monkeypatch.setattr(system, "put_file", forgetful)
    assert Remote(f"memory://{tmp_path.name}", (0.01,)).push(folder)


def test_a_process_forked_later_uses_the_store_as_well(s3: Bucket, tmp_path: Path) -> None:
    remote = Remote(f"s3://bucket/{tmp_path.name}", ())
    remote.push(write_step(tmp_path, 40))
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os._exit(0 if remote.steps() == [40] else 1)
        os._exit(2)
    deadline = time.monotonic() + 20
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done == (child, 0)


# Beside the training


class Held(Remote):
    """A store in which a push waits until it is let go, and fails as often as it is told."""

    failures = 0

    def __init__(self, url: str) -> None:
        super().__init__(url, ())
        self.reached, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def push(self, folder: Path) -> int:
        self.reached.release()
        assert self.go.acquire(timeout=20)
        if self.failures:
            self.failures -= 1
            raise StorageError("the store is away")
        return super().push(folder)


def test_checkpoints_are_sent_beside_the_training(tmp_path: Path, capsys: Any) -> None:
    remote = Held(f"memory://{tmp_path.name}")
    uploader = Uploader(remote, lambda steps: steps[:-2])
    uploader.wait()
    steps = [write_step(tmp_path, step) for step in (10, 20, 30, 40, 50)]
    Remote(remote.url).push(write_step(tmp_path, 90))
    (tmp_path / "metrics.jsonl").write_text("rows")
    uploader.submit(steps[0], [tmp_path / "metrics.jsonl"])
    assert remote.reached.acquire(timeout=20)
    assert uploader.busy() == {steps[0]} and remote.pull_file("metrics.jsonl", tmp_path / "back")
    uploader.submit(steps[1])
    uploader.submit(steps[2])
    assert uploader.busy() == {steps[0], steps[2]}
    for _ in range(2):
        remote.go.release()
    uploader.wait()
    assert remote.steps() == [10, 30, 90] and uploader.busy() == set()
    for folder in steps[3:]:
        remote.go.release()
        uploader.submit(folder)
        uploader.wait()
    assert remote.steps() == [40, 50, 90]
    said = capsys.readouterr().err
    assert re.search(r"step-20 is not uploaded: step-30 came before", said)
    assert re.findall(r"uploaded (step-\d+) \(0\.\d MB in 0 s\)", said) == ["step-10", "step-30", "step-40", "step-50"]


def test_a_failed_upload_is_said_tried_again_and_raised_at_the_end(tmp_path: Path, capsys: Any) -> None:
    remote = Held(f"memory://{tmp_path.name}")
    uploader = Uploader(remote, lambda steps: [1 // 0])
    for _ in range(9):
        remote.go.release()
    remote.failures = 1
    uploader.submit(write_step(tmp_path, 10))
    uploader._idle()
    assert "warning: step-10 is not uploaded: the store is away; the next checkpoint" in capsys.readouterr().err
    uploader.submit(write_step(tmp_path, 20))
    uploader.wait()
    assert remote.steps() == [20]
    assert "warning: old checkpoints stay in the store: integer division" in capsys.readouterr().err
    remote.failures = 1
    uploader.submit(write_step(tmp_path, 30))
    uploader.wait()
    assert remote.steps() == [20, 30]
    remote.failures = 2
    uploader.submit(write_step(tmp_path, 40))
    with pytest.raises(StorageError, match="the store is away"):
        uploader.wait()
    assert remote.steps() == [20, 30] and uploader.busy() == set()
