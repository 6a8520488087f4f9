"""Copies of checkpoints in a store that fsspec knows by a URL (`checkpoint.remote`): s3://, gs://, file://, ...

    <url>/step-40/...               the files of checkpoints/step-40
    <url>/step-40/manifest.json     sent last and removed first: without it the step is not there

Stores of objects have no rename, so the manifest is what makes a step complete; what comes back is believed once
every file has the sha256 that the manifest names.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from llava_train.errors import RecordError, StorageError
from llava_train.files import atomic_folder, ensure_space, inside, sha256_file, storage_faults, temporary_beside
from llava_train.storage import is_remote
from llava_train.training.checkpoints.manifest import MANIFEST, read_manifest
from llava_train.training.monitor import say

_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_WAITS_S = (1.0, 4.0)
_PACKAGES = {"s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "abfs", "abfss": "abfs"}
"""Protocol -> fsspec's extra, where it is called otherwise."""
_OPTIONS: dict[str, dict[str, Any]] = {
    "file": {"auto_mkdir": True},
    "local": {"auto_mkdir": True},
    "s3": {"max_concurrency": 4},  # parts of 50 MB held at a time; ten are its default
    "s3a": {"max_concurrency": 4},
}
_LASTING = (
    ImportError,
    FileNotFoundError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
    FileExistsError,
    NotImplementedError,
    TypeError,
    ValueError,
)
"""What trying again does not mend; other errors of a store (500, a connection that broke) it may."""

T = TypeVar("T")


class DamagedError(StorageError):
    """What a store holds is not what its manifest says."""


class Remote:
    """Checkpoints and files of one run below a URL.

    Every method raises StorageError that names the URL, what was being done and why it failed, after errors that may
    pass were tried again after each of `waits_s` seconds (on top of what the store's own package does).
    """

    def __init__(self, url: str, waits_s: Collection[float] = _WAITS_S) -> None:
        self.url, self._waits_s = url.rstrip("/"), waits_s
        if not is_remote(self.url):
            raise StorageError(f"checkpoint.remote: {url!r} is no URL; write s3://bucket/folder or file:///folder")

    def push(self, folder: Path) -> int:
        """Send `<anywhere>/step-<n>`, its manifest last. Bytes sent; 0 where the very same step is there already.

        Files are read as they are sent (s3fs holds 0.4 GB of a large one) and must match the manifest.
        """
        step = int(folder.name.removeprefix("step-"))
        with _readable(folder / MANIFEST):
            content = (folder / MANIFEST).read_bytes()
        digests = _digests(str(folder), folder)
        there = self._content(f"{folder.name}/{MANIFEST}")
        if there == content:
            return 0
        if there is not None:  # from now on it would be complete with files of both
            self.remove(step)
        size = 0
        for name, digest in sorted(digests.items()):
            with _readable(folder / name):
                if sha256_file(folder / name) != digest:
                    raise DamagedError(f"{folder / name}: does not match its sha256; {folder.name} is not uploaded")
            size += self._send(folder / name, f"{folder.name}/{name}")
        return size + self._send(folder / MANIFEST, f"{folder.name}/{MANIFEST}")

    def steps(self) -> list[int]:
        """The steps that are complete, in order. A missing bucket has none: see `probe`."""
        return sorted(step for step, complete in self._found().items() if complete)

    def pull(self, step: int, into: Path) -> Path:
        """Fetch a step as `into/step-<n>`, which appears whole and verified or not at all; an older one is replaced.

        Raises DamagedError where a file is missing, does not match, or has a name that leads elsewhere.
        """
        name = f"step-{step}"
        where = f"{self.url}/{name}"
        content = self._content(f"{name}/{MANIFEST}")
        if content is None:
            raise DamagedError(f"{where}: has no {MANIFEST}, so it is not complete")
        size = self._size(name)
        ensure_space(into, size, where)
        with storage_faults(into / name, size), atomic_folder(into / name) as temporary:
            (temporary / MANIFEST).write_bytes(content)
            for file, digest in sorted(_digests(where, temporary).items()):
                path = temporary / file
                path.parent.mkdir(parents=True, exist_ok=True)
                if not self.pull_file(f"{name}/{file}", path):
                    raise DamagedError(f"{where}/{file}: is missing; the step is refused")
                if sha256_file(path) != digest:
                    raise DamagedError(f"{where}/{file}: does not match its sha256; the step is refused")
        return into / name

    def pull_newest(self, into: Path, after: int) -> int | None:
        """Pull the newest step after step `after` that verifies (-1: any); None where there is none.

        Damaged steps are named and passed over.
        """
        for step in reversed(self.steps()):
            if step <= after:
                break
            started = time.monotonic()
            try:
                folder = self.pull(step, into)
            except DamagedError as error:
                say(f"passed over: {error}")
            else:
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                say(f"downloaded {told(folder.name, size, started)} from {self.url}")
                return step
        return None

    def remove(self, step: int) -> None:
        """Remove a step, its manifest first. Nothing happens where it is not there."""
        self._remove(f"step-{step}/{MANIFEST}", whole=False)
        self._remove(f"step-{step}")

    def retain(self, newest: int, superfluous: Callable[[list[int]], Iterable[int]]) -> None:
        """Remove, of the steps before `newest`, broken uploads and what `superfluous` names of the complete ones.

        `superfluous` is given the complete steps up to `newest`, in order.
        """
        found = {step: complete for step, complete in self._found().items() if step <= newest}
        whole = sorted(step for step, complete in found.items() if complete)
        for step in sorted({*(found.keys() - whole), *superfluous(whole)} - {newest}):
            self.remove(step)

    def push_file(self, path: Path, name: str) -> None:
        """Send a small file, as it is now, as `<url>/<name>`; it may grow meanwhile."""
        with tempfile.NamedTemporaryFile() as copy, _readable(path):
            copy.write(path.read_bytes())
            copy.flush()
            self._send(Path(copy.name), name)

    def push_tree(self, folder: Path, name: str) -> None:
        """Send a folder of finished files as `<url>/<name>`, in place of what is there. Not all at once."""
        self._remove(name)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self._send(path, f"{name}/{path.relative_to(folder)}")

    def pull_file(self, name: str, path: Path) -> bool:
        """Fetch `<url>/<name>`, whole or not at all; False where it is not there."""
        temporary = temporary_beside(path)

        def fetch(system: Any, base: str) -> bool:
            try:
                system.get_file(f"{base}/{name}", str(temporary))
            except FileNotFoundError:
                return False
            return temporary.is_file()  # nothing, or a folder, where the store has a folder of that name

        try:
            found = self._try(f"{name} cannot be downloaded", fetch)
            if found:
                temporary.replace(path)
            return found
        finally:
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)

    def probe(self) -> None:
        """Write, list, read and remove a small file: what is wrong with the store is known before the first step."""
        once, name = Remote(self.url, waits_s=()), f"probe-{secrets.token_hex(8)}"
        with tempfile.TemporaryDirectory() as place:
            sent, back = Path(place) / "sent", Path(place) / "back"
            sent.write_text(name)
            once._send(sent, name)
            if once._size(name) != len(name) or not once.pull_file(name, back) or back.read_text() != name:
                raise StorageError(f"{self.url}: what is written there does not come back; choose another store")
        once._remove(name, whole=False)

    def _found(self) -> dict[int, bool]:
        """Steps of which there is a file -> whether the manifest is one of them."""
        found: dict[int, bool] = {}
        for path in self._listed(""):
            top, _, name = path.partition("/")
            if name and (step := _STEP.fullmatch(top)):
                found[int(step[1])] = found.get(int(step[1]), False) or name == MANIFEST
        return found

    def _size(self, name: str) -> int:
        return sum(self._listed(name).values())

    def _listed(self, name: str) -> dict[str, int]:
        """Files at or below a name -> bytes; their paths are relative to the URL."""

        def listed(system: Any, base: str) -> dict[str, int]:
            try:
                found = system.find(f"{base}/{name}".rstrip("/"), detail=True)
            except FileNotFoundError:
                return {}
            return {path.removeprefix(f"{base}/"): int(info.get("size") or 0) for path, info in found.items()}

        return self._try("cannot be listed", listed)

    def _content(self, name: str) -> bytes | None:
        def read(system: Any, base: str) -> bytes | None:
            try:
                return bytes(system.cat_file(f"{base}/{name}"))
            except FileNotFoundError:
                return None

        return self._try(f"{name} cannot be read", read)

    def _send(self, path: Path, name: str) -> int:
        with _readable(path):  # as a FileNotFoundError below it would read like a missing bucket
            size = path.stat().st_size
        self._try(f"{name} cannot be uploaded", lambda system, base: system.put_file(str(path), f"{base}/{name}"))
        return size

    def _remove(self, name: str, whole: bool = True) -> None:
        """Remove the folder, or the one file, of a name."""

        def remove(system: Any, base: str) -> None:
            with suppress(FileNotFoundError):
                if whole:  # s3fs keeps silent about files that it may not remove
                    system.rm(f"{base}/{name}", recursive=True)
                else:
                    system.rm_file(f"{base}/{name}")

        self._try(f"{name} cannot be removed", remove)

    def _try(self, failure: str, act: Callable[[Any, str], T]) -> T:
        """What `act` gives for the file system and the path in it, neither ending in a slash."""
        for wait_s in (*self._waits_s, None):
            try:
                return act(*self._located())
            except Exception as error:  # stores raise their own types: aiohttp's, botocore's, ...
                if wait_s is None or _lasts(error):
                    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                    raise StorageError(f"{self.url}: {failure}: {reason}{_advice(self.url, error)}") from error
                time.sleep(wait_s)
        raise AssertionError

    def _located(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        # fsspec keeps instances by process and thread, so that asking each time is cheap and safe after a fork.
        system, base = url_to_fs(self.url, **_OPTIONS.get(self.url.split("://", 1)[0], {}))
        system.invalidate_cache()  # listings that it remembers may be old
        return system, str(base).rstrip("/")


def _digests(where: str, folder: Path) -> dict[str, str]:
    """What a folder's manifest lists, name -> sha256; DamagedError also for names that lead out of the folder."""
    try:
        digests = read_manifest(folder)
    except ValueError as error:
        raise DamagedError(f"{where}/{error}; the step is refused") from error
    for name in digests:
        try:
            inside(folder, name)
        except RecordError as error:
            raise DamagedError(f"{where}/{MANIFEST}: names {name[:200]!r}, which leads elsewhere") from error
        if os.path.normpath(name) != name or name in (".", MANIFEST) or not name.isprintable():
            raise DamagedError(f"{where}/{MANIFEST}: names {name[:200]!r}, which is no file of a step")
    return digests


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A local file that cannot be read in the body is a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be uploaded: {error.strerror or error}") from error


def told(name: str, size: int, started: float) -> str:
    """A file or folder with its bytes and the time it took."""
    return f"{name} ({size / 1e6:,.1f} MB in {time.monotonic() - started:.0f} s)"


def _lasts(error: Exception) -> bool:
    if "upload does not exist" in str(error):  # S3 forgot the parts of this file: another try sends them again
        return False
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return full or isinstance(error, _LASTING) or "Credential" in type(error).__name__


def _advice(url: str, error: Exception) -> str:
    scheme = url.split("://", 1)[0]
    if isinstance(error, ImportError):
        return f'; pip install "fsspec[{_PACKAGES.get(scheme, scheme)}]"'
    if isinstance(error, FileNotFoundError) and _lasts(error):
        return "; create the bucket or the folder, or correct checkpoint.remote"
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        known = " (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)" if scheme in ("s3", "s3a") else ""
        return f"; check the credentials{known} and their rights to list, read, write and delete there"
    return ""
