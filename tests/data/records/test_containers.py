"""Containers: every example becomes what it must, wherever it lies; what is damaged is named with its place."""

import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_train.data.pictures.media import Media, open_picture
from llava_train.data.reading import find_format, read_entries, read_samples
from llava_train.data.records.containers import CONTAINERS, detect_container
from llava_train.data.records.formats import FORMATS, parse_record
from llava_train.data.sample import ImageRef, Sample
from llava_train.errors import RecordError
from llava_train.storage import open_binary

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = {
    f"{folder.parent.name}/{name}": expected
    for folder in sorted(EXAMPLES.glob("*/expected.json"))
    for name, expected in json.loads(folder.read_text(encoding="utf-8")).items()
}
BINARY = [name for name, expected in FILES.items() if CONTAINERS[expected["container"]].binary]


def told(part: str | ImageRef) -> Any:
    if isinstance(part, str):
        return part
    values = {"kind": part.kind, "path": part.path, "at": part.at, "size": part.size, "column": part.column}
    return {key: value for key, value in {**values, "bytes": len(part.data)}.items() if value}


def described(sample: Sample, at: str) -> dict[str, Any]:
    turns = [[turn.role, *map(told, turn.parts)] for turn in sample.turns]
    values = {"at": at, "id": sample.id, "turns": turns, "rejected": sample.rejected}
    return {key: value for key, value in values.items() if value is not None}


def samples_of(path: str, name: str) -> list[dict[str, Any]]:
    return [described(parse_record(name, record, at), at) for record, at in read_entries(path)]


def entries(path: Path | str) -> list[tuple[Any, str]]:
    return list(read_entries(str(path)))


def faults(path: Path | str) -> list[str]:
    return [str(record) for record, _ in entries(path) if isinstance(record, RecordError)]


def written(folder: Path, content: str | bytes, name: str = "a.json") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (number % 7 + 1, 3), (number % 256, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("registry", [FORMATS, CONTAINERS], ids=["FORMATS", "CONTAINERS"])
def test_every_row_has_an_example(registry: Any) -> None:
    key = "format" if registry is FORMATS else "container"
    assert {expected[key] for expected in FILES.values()} == set(registry)


@pytest.mark.parametrize("name", FILES)
def test_examples_become_what_is_expected(name: str) -> None:
    path = str(EXAMPLES / name)
    assert detect_container(path) == FILES[name]["container"]
    assert find_format(path) == FILES[name]["format"]
    assert samples_of(path, FILES[name]["format"]) == FILES[name]["samples"]


@pytest.mark.parametrize("name", FILES)
def test_all_pictures_of_the_examples_open(name: str) -> None:
    read = list(read_samples(str(EXAMPLES / name), Media(EXAMPLES, video_frames=2)))
    web = [sample for sample in read if isinstance(sample, RecordError)]
    assert [error.cause for error in web] == (["image_url"] if "openai" in name else [])
    for sample in read:
        for ref in sample.images if isinstance(sample, Sample) else ():
            assert min(open_picture(ref, Media(EXAMPLES)).size) >= 12


def test_the_examples_are_small() -> None:
    assert sum(path.stat().st_size for path in EXAMPLES.rglob("*") if path.is_file()) < 60_000


# Tar shards


def make_shard(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def spans(path: Path, record: dict[str, Any]) -> list[bytes]:
    return [path.read_bytes()[ref.at : ref.at + ref.size] for ref in record["__images__"]]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_of_a_shard(tmp_path: Path, form: int) -> None:
    long = "folder-" + "x" * 90 + "/" + "y" * 60
    members = [
        (f"{long}.jpg", png(1)), (f"{long}.txt", b"one"), ("README", b"no sample"), ("._a.jpg", b"of a desktop"),
        ("a/é.1.png", png(2)), ("a/é.2.PNG", png(3)), ("a/é.json", b'\xef\xbb\xbf{"caption": "two"}'),
        ("a/é.npy", b"not read"), ("b.txt", b"\xff"), ("c.json", b"{"), ("c.txt", b"three"),
    ]  # fmt: skip
    path = make_shard(tmp_path / "a.tar", members, form)
    found = entries(path)
    assert [place for _, place in found] == [f":{long}", ":a/é", ":b", ":c"]
    records = [record for record, _ in found]
    assert records[0]["txt"] == "one" and spans(path, records[0]) == [png(1)]
    assert records[1]["json"] == {"caption": "two"} and spans(path, records[1]) == [png(2), png(3)]
    assert str(records[2]["txt"]) == f"{path}:b.txt: not UTF-8 (byte 0)"
    assert str(records[3]["json"]).startswith(f"{path}:c.json: not JSON")
    with pytest.raises(RecordError, match="not UTF-8"):
        parse_record("caption", records[2], "x")


def test_what_is_no_regular_file_in_a_shard_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("d", tarfile.DIRTYPE), ("a.jpg", tarfile.SYMTYPE), ("a.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        for name in (b"a.txt", b"\xff.txt"):
            member = tarfile.TarInfo(os.fsdecode(name))
            member.size = 3
            archive.addfile(member, io.BytesIO(b"one"))
    records = [record for record, _ in entries(path)]
    assert records == [{"__key__": "a", "txt": "one"}, {"__key__": "\\xff", "txt": "one"}]


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    path = make_shard(tmp_path / "a.tar", [("a.jpg", png(1)), ("a.txt", b"one")])
    content = bytearray(path.read_bytes())
    member = tarfile.TarInfo("a.jpg")
    member.size, member.type = len(png(1)), tarfile.GNUTYPE_SPARSE
    content[:512] = member.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(content)
    (record, _), *_ = entries(path)
    assert "sparse" in str(record["jpg"])


def test_a_shard_that_breaks_off_is_a_fault_wherever_it_does(tmp_path: Path) -> None:
    whole = make_shard(
        tmp_path / "a.tar", [(f"{n}.{s}", c) for n in range(4) for s, c in (("png", png(n)), ("txt", b"x"))]
    )
    content, cut = whole.read_bytes(), tmp_path / "cut.tar"
    last = content.rindex(b"3.txt") + 1024  # header and text of the last member end here
    for end in [*range(1, last, 97), last]:
        cut.write_bytes(content[:end])
        *good, (fault, place) = entries(cut)
        assert isinstance(fault, RecordError) and fault.cause == "file_truncated" and place == ":end"
        assert str(fault).startswith(str(cut))
        assert [at for _, at in good] == [f":{n}" for n in range(len(good))]
        assert len(good) >= end // 2048 - 1
    cut.write_bytes(content[: last + 512])
    assert len(entries(cut)) == 4
    cut.write_bytes(content + content)
    assert "joined by cat" in faults(cut)[0]


def test_damaged_shards_never_end_the_reader(tmp_path: Path) -> None:
    content = make_shard(tmp_path / "a.tar", [(f"{n}.txt", b"x" * 600) for n in range(6)]).read_bytes()
    negative = bytearray(content)
    negative[1536 + 124 : 1536 + 136] = (
        b"\xff" * 10 + b"\xfe\x00"
    )  # a size below zero makes tarfile go round in circles
    negative[1536 + 148 : 1536 + 156] = b" " * 8
    checksum = sum(negative[1536:2048])
    negative[1536 + 148 : 1536 + 156] = b"%06o\0 " % checksum
    generator = random.Random(0)
    bodies = [bytes(negative)]
    for _ in range(60):
        body = bytearray(content)
        for _ in range(3):
            body[generator.randrange(len(body))] = generator.randrange(256)
        bodies.append(bytes(body))
    for number, body in enumerate(bodies):
        path = written(tmp_path, body, f"{number}.tar")
        found = entries(path)
        assert all(isinstance(record, dict | RecordError) for record, _ in found)
        assert len(found) <= 7
    assert "negative" in faults(tmp_path / "0.tar")[0]


def test_a_shard_of_conversations(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    inner = {"image": "elsewhere/a.png", "conversations": turns}
    path = make_shard(tmp_path / "a.tar", [("0.png", png(1)), ("0.json", json.dumps(inner).encode())])
    (sample,) = read_samples(str(path), Media(tmp_path))
    assert isinstance(sample, Sample) and sample.id == "0"
    assert open_picture(sample.images[0], Media(tmp_path)).size == Image.open(io.BytesIO(png(1))).size


@pytest.fixture
def memory() -> Iterator[Any]:
    import fsspec

    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


@pytest.mark.parametrize("name", FILES)
def test_examples_in_a_store_are_the_same(memory: Any, name: str) -> None:
    memory.pipe(f"/shards/{name}", (EXAMPLES / name).read_bytes())
    url = f"memory://shards/{name}"
    assert samples_of(url, find_format(url)) == FILES[name]["samples"]
    local = [s for s in read_samples(str(EXAMPLES / name), Media(EXAMPLES)) if isinstance(s, Sample)]
    remote = [s for s in read_samples(url, Media(EXAMPLES)) if isinstance(s, Sample)]
    for one, other in zip(local, remote, strict=True):
        for ours, theirs in zip(one.images, other.images, strict=True):
            assert open_picture(ours, Media(EXAMPLES)).tobytes() == open_picture(theirs, Media(EXAMPLES)).tobytes()


def test_copies_are_closed(tmp_path: Path) -> None:
    """Every reader closes its file: a copy can be removed and put there again while samples are read."""
    for name in BINARY:
        copy = tmp_path / Path(name).name
        shutil.copy(EXAMPLES / name, copy)
        with open_binary(str(copy)) as stream:
            assert stream.read(1)
        before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0  # noqa: PTH208
        entries(copy)
        after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0  # noqa: PTH208
        assert after <= before + 1  # a mapped Arrow file stays open
