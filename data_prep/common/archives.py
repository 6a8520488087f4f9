"""Zip and tar archives, unpacked so that nothing leaves the target and an interrupted run goes on.

Every member is checked before the first is written: no absolute path, no "..", no link, no device. What is
there with the right size is not written again; a marker beside the files says that an archive is done.
"""

from __future__ import annotations

import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tqdm import tqdm

from data_prep.common.transfer import Remote, full_disk
from llava_train.errors import DataError
from llava_train.files import ensure_space, inside, write_json

CHUNK = 1 << 20
JUNK = ("__MACOSX/", ".DS_Store")  # what a Mac adds


@dataclass(frozen=True)
class Archive:
    """An archive of pictures.

    Attributes:
        remote: the file.
        into: the folder below DIR that it is unpacked in.
        holds: the folder below DIR that has its pictures then, and nothing else's.
        count: how many there must be; None: not verified.
    """

    remote: Remote
    into: str
    holds: str
    count: int | None = None

    def marker(self, out: Path) -> Path:
        """The file that says that the archive is unpacked."""
        return inside(out, self.into) / f".{Path(self.remote.path).name}.unpacked"


@dataclass(frozen=True)
class Member:
    """A file in an archive."""

    name: str
    size: int


def unpack(archive: Path, target: Path, marker: Path) -> int:
    """Unpack into `target`, write `marker` and return the number of files; DataError, StorageError."""
    with _damage(archive):
        kind = _Zip if archive.suffix == ".zip" else _Tar
        target.mkdir(parents=True, exist_ok=True)
        members = [member for member in kind(archive).members() if not _junk(member.name)]
        for member in members:
            check_name(archive, member.name)
        left = {member.name: member.size for member in members if not _done(target, member)}
        ensure_space(target, sum(left.values()), f"unpacking {archive.name}")
        with tqdm(total=len(left), desc=f"unpacking {archive.name}", unit="file", disable=None) as bar:
            for name, stream in kind(archive).read(left):
                write_stream(stream, target, name, left[name])
                bar.update()
    write_json(marker, {"files": len(members), "bytes": sum(member.size for member in members)})
    return len(members)


def check_name(archive: Path, name: str) -> None:
    """DataError if a member's name could lead out of the folder it is unpacked in."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0].startswith("/") or ".." in parts or "\\" in name or "\0" in name or ":" in parts[0]:
        raise DataError(f"{archive}: its member {name!r} would leave the folder it is unpacked in; nothing is unpacked")


def write_stream(stream: IO[bytes], target: Path, name: str, size: int) -> None:
    """Write a member whole or not at all; DataError if a link that is there already leads out of `target`."""
    path = inside(target, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as out:
        while chunk := stream.read(CHUNK):
            with full_disk(part, size):
                out.write(chunk)
                out.flush()
    part.replace(path)


def _done(target: Path, member: Member) -> bool:
    path = target / member.name
    return path.is_file() and path.stat().st_size == member.size


def _junk(name: str) -> bool:
    return name.startswith(JUNK[0]) or PurePosixPath(name).name == JUNK[1]


class _Zip:
    def __init__(self, path: Path) -> None:
        self.path = path

    def members(self) -> Iterator[Member]:
        with zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                mode = info.external_attr >> 16
                if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _not_a_file(self.path, info.filename)
                if not info.is_dir():
                    yield Member(info.filename, info.file_size)

    def read(self, wanted: dict[str, int]) -> Iterator[tuple[str, IO[bytes]]]:
        with zipfile.ZipFile(self.path) as archive:
            for name in wanted:
                with archive.open(name) as stream:
                    yield name, stream


class _Tar:
    def __init__(self, path: Path) -> None:
        self.path = path

    def members(self) -> Iterator[Member]:
        for info, _ in self._walk():
            yield Member(info.name, info.size)

    def read(self, wanted: dict[str, int]) -> Iterator[tuple[str, IO[bytes]]]:
        for info, archive in self._walk():
            if info.name in wanted and (stream := archive.extractfile(info)):
                yield info.name, stream

    def _walk(self) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
        with tarfile.open(self.path, "r|*") as archive:  # as a stream: its list is not kept in memory
            for info in archive:
                if not (info.isfile() or info.isdir()):
                    raise _not_a_file(self.path, info.name)
                if info.isfile():
                    yield info, archive


def tar_files(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of each plain file in a tar; links and devices are passed over, nothing is written."""
    with _damage(archive), tarfile.open(archive, "r|*") as stream:
        for info in stream:
            if info.isfile() and (content := stream.extractfile(info)):
                yield info.name, content


def _not_a_file(archive: Path, name: str) -> DataError:
    return DataError(f"{archive}: its member {name!r} is a link or a device, not a file; nothing is unpacked")


@contextmanager
def _damage(archive: Path) -> Iterator[Any]:
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        raise DataError(f"{archive}: a damaged archive ({error}); delete it and run again") from error
