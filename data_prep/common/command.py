"""What every data script runs: fetch -> unpack -> convert -> check, from a table of what the data set is.

A script is its docstring (what, from, licence, size, counts, what it writes), a `Dataset` and `main`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.common.archives import Archive, unpack
from data_prep.common.fetching import Fetcher, Ledger
from data_prep.common.records import RecordFile, count_records
from data_prep.common.transfer import Remote
from llava_train.errors import DataError, LlavaTrainError
from llava_train.files import inside

PICTURES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp"}
EPILOG = """Ctrl-C and broken connections lose nothing: the same command goes on. A file without a published checksum
is trusted the first time; its sha256 is kept in DIR/NAME/fetched.json, and the file must have it the next time."""


@dataclass(frozen=True)
class Job:
    """One run of a script: what was asked for, and the means."""

    out: Path
    home: Path
    parts: tuple[str, ...]
    limit: int | None
    keep_archives: bool
    fetcher: Fetcher


@dataclass(frozen=True)
class Dataset:
    """What a script is about.

    Attributes:
        name: the module's name, and the folder below DIR that is the data set's own.
        document: the module's docstring, shown by --help.
        parts: part name -> the files and archives fetched for it (`--only`).
        records: the record files the final check reads.
        convert: makes the record files of what is there, and fetches what only they name.
        limit: what `--limit N` counts; empty: there is no such option.
        limit_files: the limit is on the files of the parts; False: `convert` heeds it.
        out: the default of --out.
    """

    name: str
    document: str | None
    parts: Mapping[str, Sequence[Remote | Archive]]
    records: Sequence[RecordFile] = ()
    convert: Callable[[Job], None] | None = None
    limit: str = ""
    limit_files: bool = False
    out: str = "data"

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Command line; exit status 0 done, 1 failed or incomplete, 2 wrong arguments, 130 interrupted."""
        options = self._parser().parse_args(arguments)
        return guarded(lambda: self.run(options))

    def run(self, options: argparse.Namespace) -> int:
        """All the steps, or the check alone; its report goes to stdout as one JSON object."""
        home = options.out / self.name
        mirrors = dict(options.mirror)
        fetcher = Fetcher(options.out, Ledger(home / "fetched.json"), mirrors, options.workers)
        limit = getattr(options, "limit", None)
        job = Job(options.out, home, options.only, limit, options.keep_archives, fetcher)
        if not options.check:
            self.make(job)
        report = self.check(job)
        print(json.dumps(report))
        for path, entry in {**report["records"], **report["images"]}.items():
            if not entry["complete"]:
                say(f"incomplete: {path}: " + ", ".join(f"{word} {number}" for word, number in entry.items()))
        return 0 if report["complete"] else 1

    def make(self, job: Job) -> None:
        """Fetch, unpack and convert what is not there."""
        sources = self._sources(job)
        archives = [source for source in sources if isinstance(source, Archive)]
        left = [archive for archive in archives if not archive.marker(job.out).exists()]
        files = [source for source in sources if isinstance(source, Remote)]
        job.fetcher.fetch([*files, *(archive.remote for archive in left)])
        for archive in archives:
            file = inside(job.out, archive.remote.path)
            if archive in left:
                unpack(file, inside(job.out, archive.into), archive.marker(job.out))
            if not job.keep_archives:
                file.unlink(missing_ok=True)
        if self.convert:
            self.convert(job)

    def check(self, job: Job) -> dict[str, Any]:
        """Count records and pictures; `complete` is False if a verified count or a needed picture is missing."""
        whole = job.limit is None
        every = whole and set(job.parts) == set(self.parts)
        records: dict[str, Any] = {}
        for file in self.records:
            if file.part is None or file.part in job.parts:
                path = inside(job.out, file.path)
                counted = count_records(path, job.out / file.root, file.key) if path.exists() else None
                good = bool(counted) and (not whole or file.count in (None, counted["records"] if counted else 0))
                good = good and not (every and file.complete and counted and counted["missing"])
                records[file.path] = (counted or {"records": 0}) | {"expected": file.count, "complete": good}
        images = {}
        for folder, expected in self._folders(job).items():
            found = count_pictures(inside(job.out, folder))
            images[folder] = {"found": found, "expected": expected}
            images[folder]["complete"] = not whole or found >= (expected or 1)
        entries = [*records.values(), *images.values()]
        missing = sum(entry.get("missing", 0) for entry in records.values())
        complete = all(entry["complete"] for entry in entries)
        return {"name": self.name, "records": records, "images": images, "missing": missing, "complete": complete}

    def _sources(self, job: Job) -> list[Remote | Archive]:
        sources = [source for name, part in self.parts.items() if name in job.parts for source in part]
        return sources[: job.limit] if self.limit_files else sources

    def _folders(self, job: Job) -> dict[str, int | None]:
        """The folders that archives fill, with the number of pictures each must have."""
        archives = [source for source in self._sources(job) if isinstance(source, Archive)]
        return {archive.holds: archive.count for archive in archives}

    def _parser(self) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        name = f"data_prep.{self.name}"
        parser = argparse.ArgumentParser(name, description=self.document, epilog=EPILOG, formatter_class=raw)
        add = parser.add_argument
        add("--out", type=Path, default=Path(self.out), metavar="DIR", help=f"default: {self.out}")
        add("--check", action="store_true", help="only the final check")
        add("--only", type=self._chosen, default=tuple(self.parts), metavar="PART,..", help=self._choices())
        if self.limit:
            add("--limit", type=positive, metavar="N", help=f"at most N {self.limit}")
        add("--keep-archives", action="store_true", help="do not delete an archive once it is unpacked")
        add("--workers", type=positive, default=4, metavar="N", help="downloads at a time (default: 4)")
        add("--mirror", type=_mirror, action="append", default=[], metavar="URL=URL",
            help="take what begins with the first URL from the second")  # fmt: skip
        return parser

    def _choices(self) -> str:
        return f"of {', '.join(self.parts)} (default: all)" if self.parts else "there are no parts"

    def _chosen(self, text: str) -> tuple[str, ...]:
        names = text.replace(" ", "").split(",")
        if wrong := [name for name in names if name not in self.parts]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(self.parts)}")
        return tuple(name for name in self.parts if name in names)


def _mirror(text: str) -> tuple[str, str]:
    match = re.fullmatch("(.+?)=(https?://.+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not URL=URL")
    return match[1], match[2]


def positive(text: str) -> int:
    """Parse an argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def guarded(work: Callable[[], int]) -> int:
    """Run a command's work; what goes wrong is one line on stderr."""
    try:
        return work()
    except (LlavaTrainError, OSError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("stopped; what is there is kept: the same command goes on where it stopped")
        return 130


def say(text: str) -> None:
    """Tell the user something; stdout is for the report."""
    print(text, file=sys.stderr, flush=True)


def say_built(folder: Path, built: bool) -> None:
    """Tell what became of a folder that is made whole or not at all."""
    say(f"{folder}: {'made' if built else 'already there (delete the folder to make it again)'}")


def count_pictures(folder: Path) -> int:
    """The pictures in a folder and below."""
    return sum(path.suffix.lower() in PICTURES for path in folder.rglob("*")) if folder.is_dir() else 0


def needed(path: Path) -> Path:
    """A file that a conversion reads; DataError if it is not there."""
    if not path.is_file():
        raise DataError(f"{path}: not there; run without --only, or with the part that has it")
    return path
