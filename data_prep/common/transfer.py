"""One file over HTTP: gone on with where it broke off, tried again while that can help, never half there."""

from __future__ import annotations

import email.utils
import errno
import fcntl
import hashlib
import http.client
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from llava_train.errors import DataError, StorageError
from llava_train.files import ensure_space

TRIES, PAUSE, LONGEST_PAUSE = 5, 1.0, 60.0  # tries without a new byte; seconds before the second, doubling
TIMEOUT = 30.0  # seconds without an answer or a byte
CHUNK = 1 << 18
PASSING = {408, 425, 429, *range(500, 600)}  # answers that may be another one the next time
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Identity: a server that compresses on the fly would make sizes, ranges and checksums those of other bytes.
HEADERS = {"User-Agent": "llava-train data_prep", "Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Remote:
    """A file to fetch.

    Attributes:
        url: http or https.
        path: where it goes below the output folder.
        checksum: "sha256:..." or "md5:..." as published; None: the first download is trusted and remembered.
        size: its exact bytes, if published.
        about: its rounded bytes, to ask before the download whether the disk has room.
    """

    url: str
    path: str
    checksum: str | None = None
    size: int | None = None
    about: int | None = None


class FetchError(DataError):
    """A file cannot be had; `cause` is the slug it is counted under ("http_404", "no_connection", ..)."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


class Stopped(Exception):  # noqa: N818 - no error: another thread's error, or Ctrl-C, ends this download too
    """The download was told to stop; what is there is kept."""


class _Again(Exception):  # noqa: N818
    """A fault that may pass; after `wait` seconds if the server said so."""

    def __init__(self, message: str, cause: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.cause, self.wait = cause, wait


class Watch:
    """What the downloads of one command share: the bar over bytes, if it is shown, and the sign to stop."""

    def __init__(self, bar: tqdm[Any] | None = None, totals: dict[Path, int] | None = None) -> None:
        self.stop, self._bar, self._totals, self._lock = Event(), bar, totals or {}, Lock()

    def advance(self, count: int) -> None:
        """Count bytes (negative: they are fetched again); Stopped once the sign is given."""
        if self.stop.is_set():
            raise Stopped
        if self._bar is not None:
            with self._lock:
                self._bar.update(count)

    def expect(self, part: Path, total: int) -> None:
        """Correct the bar's end, now that the bytes of one file are known."""
        if self._bar is not None:
            with self._lock:
                self._totals[part] = total
                self._bar.total = sum(self._totals.values())

    def pause(self, seconds: float) -> None:
        """Sleep, unless the sign to stop comes."""
        if self.stop.wait(seconds):
            raise Stopped


def download(remote: Remote, url: str, target: Path, watch: Watch, tries: int = TRIES) -> str:
    """Fetch `url` into `target` and return its sha256; `url` is that of `remote` or of a mirror.

    Unfinished it is `target`.part, and the next call goes on there if the server's file is still the same.
    Raises FetchError, StorageError, Stopped.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part, failures = target.with_name(f"{target.name}.part"), 0
    while True:
        before = _size(part)
        try:
            _stream(remote, url, part, watch)
            break
        except _Again as fault:
            failures = 1 if _size(part) > before else failures + 1
            if failures >= tries:
                raise FetchError(f"{url}: {fault}; run the same command again to go on", fault.cause) from fault
            watch.pause(fault.wait if fault.wait is not None else PAUSE * 2 ** (failures - 1))
    digest = verify(remote, part, remove=True)
    part.replace(target)
    _validator(part).unlink(missing_ok=True)
    return digest


def verify(remote: Remote, path: Path, remove: bool = False) -> str:
    """The file's sha256; FetchError naming file, expected and got if size or checksum are not the published."""
    kind, _, expected = (remote.checksum or "sha256:").partition(":")
    digests = {name: hashlib.new(name) for name in {"sha256", kind}}
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            for digest in digests.values():
                digest.update(chunk)
    got, size = digests[kind].hexdigest(), _size(path)
    wrong = f"wrong {kind}: expected {expected}, got {got}" if expected and got != expected else ""
    if remote.size is not None and size != remote.size:
        wrong = f"wrong size: expected {remote.size:,} bytes, got {size:,}"
    if wrong:
        if remove:
            path.unlink()
        name = path.with_name(path.name.removesuffix(".part"))
        raise FetchError(f"{name}: {wrong} ({remote.url}); delete it and run again", "wrong_content")
    return digests["sha256"].hexdigest()


def _stream(remote: Remote, url: str, part: Path, watch: Watch) -> None:
    """One request: append what the part lacks, or begin again if the server will not continue it."""
    have = _size(part)
    validator = _validator(part).read_text() if have and _validator(part).exists() else ""
    if have and not validator and not remote.checksum:
        have = 0  # nothing could tell whether old and new bytes are of one file
    headers = dict(HEADERS)
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": validator} if validator else {})
    with _faults(url, part), _answer(url, headers, part, have) as response:
        if response is None:
            return  # the part is the whole file already
        start = have if response.status == 206 else 0
        if start == 0:
            _validator(part).write_text(_fresh_validator(response))
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdigit() else remote.size
        if total is not None:
            ensure_space(part.parent, total - start, f"fetching {part.name.removesuffix('.part')}")
            watch.expect(part, total)
        watch.advance(start - _size(part))
        _append(response, part, start, total, watch)
    if total is not None and _size(part) < total:
        raise _Again(f"the connection broke after {_size(part):,} of {total:,} bytes", "broken_connection")


def _append(response: Any, part: Path, start: int, total: int | None, watch: Watch) -> None:
    with part.open("ab", buffering=0) as stream:  # unbuffered: what arrived survives a kill
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FetchError(f"{part}: another process is fetching it", "busy") from error
        stream.truncate(start)
        while chunk := response.read1(CHUNK):  # what has come, not a whole chunk: a slow server is seen to move
            watch.advance(len(chunk))
            with full_disk(part, total or 0):
                view = memoryview(chunk)
                while view:
                    view = view[stream.write(view) :]


@contextmanager
def _answer(url: str, headers: dict[str, str], part: Path, have: int) -> Iterator[Any]:
    """The open answer; None if the server says that there is nothing after the `have` bytes of the part."""
    try:
        response = OPENER.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
            yield None
            return
        part.unlink()
        raise _Again("the server's file is another one now", "changed") from error
    with response:
        told = response.headers.get("Content-Range", "")
        if response.status == 206 and not told.startswith(f"bytes {have}-"):
            part.unlink()
            raise _Again(f"the server sent the wrong range ({told!r})", "wrong_range")
        yield response


@contextmanager
def _faults(url: str, part: Path) -> Iterator[None]:
    """Turn what urllib raises into FetchError (final) or _Again (may pass)."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in PASSING:
            raise _Again(f"the server answers {error.code}", f"http_{error.code}", _wait(error.headers)) from error
        target = part.with_name(part.name.removesuffix(".part"))
        raise FetchError(
            f"{url}: the server answers {error.code} {error.reason}. Name another server that has it "
            f"(--mirror {url.rpartition('/')[0]}/=URL/), or put a copy at {target} and run again",
            f"http_{error.code}",
        ) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError) or "unknown url type" in str(error.reason):
            raise FetchError(f"{url}: {error.reason}", "refused") from error
        raise _Again(f"no connection: {error.reason}", "no_connection") from error
    except (TimeoutError, ConnectionError, http.client.HTTPException, ssl.SSLError) as error:
        raise _Again(f"the connection broke: {error or type(error).__name__}", "broken_connection") from error


@contextmanager
def full_disk(path: Path, total: int = 0) -> Iterator[None]:
    """Turn "no space left" (and a quota, and a file too large) into a StorageError with the bytes.

    `total` is what the file at `path` should get, if that is known.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        needed = f"{total - _size(path):,} bytes are still needed, " if total else ""
        raise StorageError(
            f"{path}: {error.strerror}: {needed}{shutil.disk_usage(path.parent).free:,} are free; "
            "what is there is kept: free some space and run the same command again"
        ) from error


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS with proxies and redirects; no file:, ftp: or data:, not after a redirect either."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor, urllib.request.UnknownHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener


OPENER = _opener()


def mirrored(url: str, mirrors: dict[str, str]) -> str:
    """The URL with the longest matching prefix replaced; FetchError unless it is http or https."""
    prefix = max((prefix for prefix in mirrors if url.startswith(prefix)), key=len, default="")
    url = mirrors.get(prefix, "") + url[len(prefix) :]
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise FetchError(f"{url!r}: only http and https addresses are fetched", "refused")
    return url


def _validator(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _fresh_validator(response: Any) -> str:
    """What names this version of the file in If-Range: a strong ETag, or else the date of the last change."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _wait(headers: Any) -> float | None:
    """Seconds that Retry-After asks for (a number or a date), at most LONGEST_PAUSE."""
    told = headers.get("Retry-After", "")
    date = email.utils.parsedate_tz(told)
    seconds = float(told) if told.isdigit() else email.utils.mktime_tz(date) - time.time() if date else None
    return None if seconds is None else min(max(seconds, 0.0), LONGEST_PAUSE)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
