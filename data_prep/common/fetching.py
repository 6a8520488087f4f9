"""Many files at once, each verified and remembered: run twice, it does nothing.

`fetched.json` remembers the sha256 of every file. A file whose publisher gives no checksum is trusted the
first time (trust on first use); should it be fetched again, it must be the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, TypeVar

from tqdm import tqdm

from data_prep.common.transfer import PASSING, FetchError, Remote, Stopped, Watch, download, mirrored, verify
from llava_train.errors import DataError
from llava_train.files import ensure_space, flush, inside, read_json, write_json

Item = TypeVar("Item")
Finish = Callable[[Remote, Path], None]
LINK_TRIES = 2  # a link of many may be dead; it is not worth a minute
ALL_DEAD = 40  # so many failed connections before the first success: it is not the links, it is the network
MAY_PASS = {"no_connection", "broken_connection", *(f"http_{code}" for code in PASSING)}


class Ledger:
    """`fetched.json`: path below the output folder -> url, sha256, size and time of each file fetched."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, Lock()
        self._files: dict[str, Any] = read_json(path) if path.exists() else {}

    def sha256(self, remote: Remote) -> str | None:
        """The digest this file had when it was fetched first."""
        return self._files.get(remote.path, {}).get("sha256")

    def unchanged(self, remote: Remote, path: Path) -> bool:
        """True if the file is as it was when its digest was taken, by size and time: reading it takes long."""
        entry, stat = self._files.get(remote.path, {}), path.stat()
        return (entry.get("size"), entry.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns)

    def put(self, remote: Remote, path: Path, sha256: str) -> None:
        """Remember the file at `path`."""
        stat = path.stat()
        entry = {"url": remote.url, "sha256": sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        with self._lock:
            self._files[remote.path] = entry
            write_json(self.path, self._files)


@dataclass
class Fetcher:
    """Fetches files into `root`, `workers` at a time; `mirrors` maps URL prefixes to other servers."""

    root: Path
    ledger: Ledger
    mirrors: dict[str, str] = field(default_factory=dict)
    workers: int = 4

    def fetch(self, remotes: Sequence[Remote]) -> None:
        """Have every file there and verified, or raise the first error; the parts of the others are kept."""
        wanted = [remote for remote in dict.fromkeys(remotes) if not self._there(remote)]
        totals = {inside(self.root, f"{file.path}.part"): file.size or file.about or 0 for file in wanted}
        had, total = sum(part.stat().st_size for part in totals if part.exists()), sum(totals.values())
        ensure_space(self.root, total - had, f"fetching {len(wanted)} files")
        if not wanted:
            return
        shown = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "disable": None}
        with tqdm(total=total, initial=had, desc="fetching", **shown) as bar:
            watch = Watch(bar, totals)

            def one(remote: Remote) -> None:
                target = inside(self.root, remote.path)
                digest = download(self._known(remote), mirrored(remote.url, self.mirrors), target, watch)
                flush(target)
                self.ledger.put(remote, target, digest)

            run_all(wanted, one, self.workers, watch.stop)

    def fetch_living(self, remotes: Sequence[Remote], finish: Finish, what: str, failed: dict[str, FetchError]) -> None:
        """Fetch each of many files that may be dead and hand it to `finish`, which moves it on.

        `failed` takes the errors (of the fetch, or a FetchError of `finish`) by path. A network that is not
        there at all is raised. No file is remembered: the caller asks only for those that it lacks.
        """
        watch, alive, lock = Watch(), Event(), Lock()
        with tqdm(total=len(remotes), desc=what, unit="link", disable=None) as bar:

            def one(remote: Remote) -> None:
                target = inside(self.root, remote.path)
                try:
                    download(remote, mirrored(remote.url, self.mirrors), target, watch, LINK_TRIES)
                    alive.set()
                    finish(remote, target)
                except FetchError as error:
                    failed[remote.path] = error
                    if error.cause != "no_connection":
                        alive.set()
                    elif len(failed) >= ALL_DEAD and not alive.is_set():
                        raise DataError(f"the network is not there: {error}") from error
                with lock:
                    bar.update()

            run_all(remotes, one, self.workers, watch.stop)

    def _known(self, remote: Remote) -> Remote:
        """The file with the checksum to demand: the published one, or the one it had the first time."""
        first = self.ledger.sha256(remote)
        if remote.checksum or not first:
            return remote
        return Remote(remote.url, remote.path, f"sha256:{first}", remote.size, remote.about)

    def _there(self, remote: Remote) -> bool:
        """True if the file is there and right; a file put there by hand is verified and remembered."""
        target = inside(self.root, remote.path)
        if not target.is_file():
            return False
        if not self.ledger.unchanged(remote, target):
            self.ledger.put(remote, target, verify(self._known(remote), target))
        return True


def run_all(items: Iterable[Item], work: Callable[[Item], None], workers: int, stop: Event) -> None:
    """Do `work` on each item on some threads; the first error, or Ctrl-C, stops all and is raised.

    The threads are daemons: a read that hangs in the network does not keep Ctrl-C from ending the process.
    """
    pending, lock, errors = iter(items), Lock(), []

    def loop() -> None:
        while not stop.is_set():
            with lock:
                item = next(pending, None)
            if item is None:
                return
            try:
                work(item)
            except BaseException as error:
                errors.append(error)
                stop.set()

    threads = [Thread(target=loop, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join(timeout=1)
        raise
    for error in errors:
        if not isinstance(error, Stopped):
            raise error


def fetch_links(fetcher: Fetcher, remotes: Sequence[Remote], finish: Finish, missing: Path, what: str) -> Counter[str]:
    """Fetch what is left of many links; the dead are counted by cause and listed in `missing` (JSONL).

    One that the server has refused for good is not asked for again: delete `missing` to ask anew.
    """
    lines = missing.read_text(encoding="utf-8").splitlines() if missing.exists() else []
    lacking = {file.path for file in remotes}  # what was dead and is there now is not listed any more
    dead = {fault["path"]: fault for fault in map(json.loads, lines) if fault["path"] in lacking}
    asked = [file for file in remotes if file.path not in dead or dead[file.path]["cause"] in MAY_PASS]
    failed: dict[str, FetchError] = {}
    try:
        if asked:
            fetcher.fetch_living(asked, finish, what, failed)
    finally:  # what is known by the time of a Ctrl-C is known
        for remote in asked:
            dead.pop(remote.path, None)
            if error := failed.get(remote.path):
                dead[remote.path] = {"path": remote.path, "url": remote.url, "cause": error.cause}
        missing.parent.mkdir(parents=True, exist_ok=True)
        missing.write_text("".join(f"{json.dumps(fault)}\n" for fault in dead.values()), encoding="utf-8")
    return Counter(fault["cause"] for fault in dead.values())
