"""Unpacking: whole, resumable, and never out of its folder."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from data_prep.common.archives import unpack
from llava_train.errors import DataError, StorageError

FILES = {"a/1.jpg": b"one", "a/b/2.jpg": b"two" * 1000, "3.txt": b""}


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, files: dict[str, bytes], **fields: object) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return path


MAKERS = {"x.zip": make_zip, "x.tar": make_tar, "x.tar.gz": make_tar}


@pytest.fixture(params=MAKERS)
def maker(request: pytest.FixtureRequest, tmp_path: Path):
    return lambda files: MAKERS[request.param](tmp_path / request.param, files)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_everything_is_unpacked_and_marked(maker, tmp_path: Path) -> None:
    archive = maker({**FILES, "__MACOSX/a/._1.jpg": b"junk", "a/.DS_Store": b"junk"})
    assert unpack(archive, tmp_path / "to", tmp_path / "marker") == 3
    assert content(tmp_path / "to") == FILES
    assert '"files": 3' in (tmp_path / "marker").read_text()


def test_what_is_there_is_not_written_again(maker, tmp_path: Path) -> None:
    archive, target = maker(FILES), tmp_path / "to"
    (target / "a").mkdir(parents=True)
    (target / "a" / "1.jpg").write_bytes(b"eno")  # of the right size: it is taken for done
    (target / "a" / ".2.jpg.part").write_bytes(b"tw")
    (target / "3.txt").write_bytes(b"wrong size")
    unpack(archive, target, tmp_path / "marker")
    assert (target / "a" / "1.jpg").read_bytes() == b"eno"
    assert (target / "3.txt").read_bytes() == b""
    assert (target / "a" / "b" / "2.jpg").read_bytes() == FILES["a/b/2.jpg"]


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:/evil"])
def test_a_name_that_leads_out_stops_all(maker, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="would leave the folder"):
        unpack(maker({**FILES, name: b"x"}), tmp_path / "to" / "x", tmp_path / "marker")
    assert content(tmp_path / "to") == {}
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_stop_all(tmp_path: Path, kind: bytes) -> None:
    archive = make_tar(tmp_path / "x.tar", {"x": b""}, type=kind, linkname="/etc/passwd")
    with pytest.raises(DataError, match="a link or a device"):
        unpack(archive, tmp_path / "to", tmp_path / "marker")


def test_a_link_in_a_zip_stops_all(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("x")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="a link or a device"):
        unpack(tmp_path / "x.zip", tmp_path / "to", tmp_path / "marker")


def test_a_link_that_is_there_already_is_not_followed_out(maker, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "to" / "a").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="leads outside"):
        unpack(maker(FILES), tmp_path / "to", tmp_path / "marker")
    assert content(tmp_path / "outside") == {}


def test_a_damaged_archive_is_named(maker, tmp_path: Path) -> None:
    archive = maker({"a": bytes(range(256)) * 400})
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"x\..*: a damaged archive .*; delete it and run again"):
        unpack(archive, tmp_path / "to", tmp_path / "marker")
    assert not (tmp_path / "marker").exists()


def test_a_bomb_is_refused_for_want_of_room(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "x.zip", {"x": b"x"})
    raw = bytearray(archive.read_bytes())
    at = raw.index(b"PK\x01\x02")  # the central directory says how large the member is
    raw[at + 24 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little")
    archive.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1_000_000})())
        with pytest.raises(StorageError, match=r"unpacking x\.zip needs 4,294,967,280 bytes, 1,000,000 are free"):
            unpack(archive, tmp_path / "to", tmp_path / "marker")
