"""Tensor files: what safetensors itself reads from them, and what a full disk makes of them."""

import errno
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import llava_train.tensorfile
from llava_train.errors import StorageError
from llava_train.tensorfile import Entry, in_file_order, write_tensors

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
NAMES = st.text('aB.@ é"\\', min_size=1, max_size=8)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
KINDS = st.dictionaries(NAMES, st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=8)


def filled(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random values, every bit of them for whole numbers."""
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 256, shape).to(dtype)


def entries_of(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]


def check(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """What was written is what safetensors reads, by both of its readers, and has the sha256 that was told."""
    assert write_tensors(path, entries_of(tensors)) == hashlib.sha256(path.read_bytes()).hexdigest()
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.itemsize == 0
    read = load_file(path)
    with safe_open(str(path), framework="pt") as file:
        assert {*file.keys()} == {*read} == {*tensors}
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            for found in (read[name], file.get_tensor(name)):
                assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
                assert torch.equal(found, tensor)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(kinds=KINDS)
def test_safetensors_reads_what_was_written(tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    check(path, {name: filled(*kind) for name, kind in kinds.items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_as_a_scalar_as_nothing_and_beside_a_narrow_one(tmp_path: Path, dtype: torch.dtype) -> None:
    shapes = {"scalar": (), "none": (0,), "no rows": (0, 3), "odd": (3, 5)}
    tensors = {name: filled(dtype, shape) for name, shape in shapes.items()}
    check(tmp_path / "a", {"a byte": filled(torch.uint8, (1,)), **tensors, "two": filled(torch.int16, (3,))})


def test_tensors_of_several_chunks_and_views_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava_train.tensorfile, "_CHUNK", 64)
    whole = torch.randn(20, 30)
    check(tmp_path / "a", {"turned": whole.t(), "part": whole[3:9, ::2], "bias": torch.nn.Parameter(whole[0])})


def test_each_tensor_is_asked_for_once_in_file_order(tmp_path: Path) -> None:
    asked = []

    def entry(name: str, dtype: torch.dtype) -> Entry:
        return Entry(name, dtype, (2,), lambda: asked.append(name) or torch.zeros(2, dtype=dtype))

    entries = [entry("c", torch.uint8), entry("b", torch.float32), entry("a", torch.float32), entry("d", torch.int64)]
    write_tensors(tmp_path / "a", entries)
    assert asked == ["d", "a", "b", "c"] == [e.name for e in in_file_order(entries)]


@pytest.mark.parametrize("found", [torch.zeros(3, 2), torch.zeros(6), torch.zeros(2, 3, dtype=torch.float64)])
def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path: Path, found: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"w: is .*, was announced as torch.float32 \(2, 3\)"):
        write_tensors(tmp_path / "a", [Entry("w", torch.float32, (2, 3), lambda: found)])


def test_source_tensors_stay_resizable(tmp_path: Path) -> None:
    tensor = torch.randn(100)
    write_tensors(tmp_path / "a", entries_of({"w": tensor}))
    tensor.untyped_storage().resize_(0)  # as FSDP2 does with a weight it has gathered


class Full:
    """A file on a disk that is full from the `room`-th operation on: each write, the flush or the fsync."""

    def __init__(self, stream: Any, count: Callable[[], None]) -> None:
        self.stream, self.count = stream, count

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def write(self, data: Any) -> int:
        self.count()
        return self.stream.write(data)

    def flush(self) -> None:
        self.count()
        self.stream.flush()

    def fileno(self) -> int:
        self.count()
        return self.stream.fileno()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_at_any_write_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    tensors = {"a": torch.randn(100), "b": torch.randn(30).to(torch.bfloat16), "c": torch.zeros(0)}
    path = tmp_path / "a.safetensors"
    write_tensors(path, entries_of(tensors))
    size = path.stat().st_size
    monkeypatch.setattr(llava_train.tensorfile, "_CHUNK", 64)
    done, room, plain = 0, 0, Path.open

    def count() -> None:
        nonlocal done
        done += 1
        if done > room:
            raise OSError(number, "it fails")

    monkeypatch.setattr(Path, "open", lambda self, mode: Full(plain(self, mode), count))
    numbers = rf"; {size:,} bytes are needed, [\d,]+ are free" if number != errno.EIO else ""
    while True:
        done = 0
        try:
            write_tensors(path, entries_of(tensors))
            break
        except StorageError as error:
            assert re.fullmatch(rf"{re.escape(str(path))}: cannot be written: it fails{numbers}", str(error))
        room += 1
    assert room == 1 + 7 + 1 + 1 + 2  # header, chunks of a, b and c, flush and fsync
