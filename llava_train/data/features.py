"""Features of pictures, made once and read from a memory map: training decodes no picture and runs no tower.

A folder holds for each fingerprint `<fingerprint>.bin` (bf16, a row a picture) and `<fingerprint>.json`: what it was
made from, and which rows are done. While it is made, each rank notes its own in `<fingerprint>.rank-<r>.done`. Only
rows that are on the disk are noted, so whatever ends the work, the next start goes on with those that are missing.

Shapes: N distinct pictures, P positions, V vision width times feature layers.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset

from llava_train.data.batch import Gives, ImageReader
from llava_train.data.pictures.shapes import Picture
from llava_train.data.preparing.prepared import PreparedSet, Row, joined, numbered
from llava_train.errors import DataError, RecordError
from llava_train.files import ensure_space, flush, read_json, sha256_json, storage_faults, sweep, write_json

FEATURES = "features"
"""Folder of a cache that holds them."""
FORMAT = "llava_train/features"
VERSION = 1
SYNC_S = 5.0
"""What a process that is killed has made in vain, at most."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """The distinct pictures of some samples of a set, numbered in the order in which they first come.

    Attributes:
        starts: first place of each sample of the set in `numbers`, and the end, (samples + 1,).
        numbers: the picture in each place, (places,); -1 where its sample is left out.
        firsts: sample, and place within it, where each picture first comes, (N, 2).
    """

    starts: np.ndarray
    numbers: np.ndarray
    firsts: np.ndarray

    @classmethod
    def of(cls, prepared: PreparedSet, samples: np.ndarray) -> Pictures:
        """The pictures of the samples that are named."""
        counts = prepared.counts("images")
        starts = np.concatenate([[0], np.cumsum(counts)])
        named = np.zeros(len(counts), dtype=bool)
        named[samples] = True
        places = np.flatnonzero(np.repeat(named, counts))
        _, first, codes = np.unique(_codes(prepared)[places], return_index=True, return_inverse=True)
        order = np.argsort(first)
        numbers = np.full(starts[-1], -1)
        numbers[places] = np.argsort(order)[codes]
        come = places[first[order]]
        sample = np.searchsorted(starts, come, side="right") - 1
        return cls(starts, numbers, np.stack([sample, come - starts[sample]], axis=1))

    def __len__(self) -> int:
        return len(self.firsts)


def _codes(prepared: PreparedSet) -> np.ndarray:
    """A number for the picture in each place of a set, (places,): equal where the same is read in the same way."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column, sources = prepared.table.data.column("images"), prepared.info["sources"]
    flat = pc.list_flatten(column)
    rows = np.repeat(np.arange(len(column)), pc.list_value_length(column).to_numpy())
    kept = np.isin(rows, prepared.kept_rows)
    pieces = [piece for source in sources for piece in source["pieces"] if piece["kept"]]
    piece = np.repeat(np.arange(len(pieces)), [each["kept"] for each in pieces])[rows[kept]]
    file = numbered([each["path"] for each in pieces])[piece]
    inside = pc.is_in(pc.struct_field(flat, "kind"), value_set=pa.array(["span", "cell"])).to_numpy()[kept]
    # A reference into a container leaves its file out; one to a blob has the digest of the picture. Of what kind it is
    # shows in the other values.
    codes = joined(np.where(inside, file + 1, 0), np.repeat(prepared.read_alike, prepared.counts("images")))
    for name in ("path", "column"):
        words = pc.struct_field(flat, name).dictionary_encode().chunks
        codes = joined(codes, np.concatenate([chunk.indices.to_numpy() for chunk in words])[kept])
    for name in ("at", "size"):
        codes = joined(codes, pc.struct_field(flat, name).to_numpy()[kept])
    return codes


@dataclass(frozen=True, eq=False)
class FeatureStore:
    """A file of features in `folder`, for what `inputs` say (JSON values); `shape` is (N, P, V)."""

    folder: Path
    inputs: dict[str, Any]
    shape: tuple[int, int, int]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything the features depend on."""
        return sha256_json([VERSION, self.inputs, self.shape])[:16]

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"{self.fingerprint}.bin"

    @property
    def row_bytes(self) -> int:
        """Bytes of a picture's features."""
        return self.shape[1] * self.shape[2] * torch.bfloat16.itemsize

    def open(self) -> np.ndarray:
        """Make the file unless it is there, with room for all rows; whether each row is missing still, (N,).

        One process calls it, before any writes. A file of another size than it must have is taken for none. Raises
        StorageError.
        """
        size, notes = self.shape[0] * self.row_bytes, list(self.folder.glob(f"{self.fingerprint}.rank-*.done"))
        whole = self.path.is_file() and self.path.stat().st_size == size
        done = np.zeros(self.shape[0], dtype=bool)
        for path in [self._about, *notes] if whole else []:
            for start, end in _ranges_in(path):
                done[start:end] = True
        if whole and done.all() and self._about.is_file() and not notes:
            return ~done
        needed = int((~done).sum()) * self.row_bytes
        ensure_space(self.folder, needed + 1_000_000, f"the features of {int((~done).sum()):,} pictures")
        with storage_faults(self.path, needed):
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
            self.note(self._about, done)
            for path in notes:
                path.unlink()
            with self.path.open("ab") as stream:
                stream.truncate(size)
            flush(self.folder)
        return ~done

    def close(self) -> None:
        """Note that every row is done. One process calls it, when all have written. Raises StorageError."""
        with storage_faults(self.path, 0):
            self.note(self._about, np.ones(self.shape[0], dtype=bool))
            for path in self.folder.glob(f"{self.fingerprint}.rank-*.done"):
                path.unlink(missing_ok=True)

    def note(self, path: Path, done: np.ndarray) -> None:
        """Write down which rows are on the disk, (N,) bool."""
        edges = np.flatnonzero(np.diff(done, prepend=False, append=False)).reshape(-1, 2)
        about = {"format": FORMAT, "version": VERSION, "dtype": "bfloat16", "rows": self.shape[0]}
        about |= {"shape": list(self.shape[1:]), "inputs": self.inputs, "done": edges.tolist()}
        write_json(path, about)

    @property
    def _about(self) -> Path:
        return self.path.with_suffix(".json")

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Features of the pictures with these numbers, (rows, P, V) in bf16."""
        return torch.from_numpy(self._mapped[rows]).view(torch.bfloat16)

    @cached_property
    def _mapped(self) -> np.ndarray:
        return np.memmap(self.path, np.int16, "r", shape=self.shape)

    def __getstate__(self) -> dict[str, Any]:
        """Without the map: each process has its own."""
        return {name: value for name, value in vars(self).items() if name != "_mapped"}


def _ranges_in(path: Path) -> list[tuple[int, int]]:
    try:
        return [(int(start), int(end)) for start, end in read_json(path)["done"]]
    except (DataError, KeyError, TypeError, ValueError):
        return []


def forget_features(cache_dir: Path, prepared: PreparedSet) -> None:
    """Remove what was made of the pictures of a set: they may have changed."""
    for path in (cache_dir / FEATURES).glob("*.json"):
        try:
            contents = read_json(path)["inputs"]["set"]
        except (DataError, KeyError, TypeError):
            continue
        if contents == prepared.contents:
            path.unlink()
            path.with_suffix(".bin").unlink(missing_ok=True)


class FeatureReader:
    """The features of a set's pictures, as `BatchReader` asks for them."""

    gives: Gives = "features"

    def __init__(self, store: FeatureStore, pictures: Pictures) -> None:
        self.store, self.places = store, pictures

    def pictures(self, sample: int, row: Row, shared: int) -> list[Picture]:
        """Those of a sample without its first `shared` pictures, (1, P, V) each in bf16."""
        rows = self.places.numbers[self.places.starts[sample] + shared : self.places.starts[sample + 1]]
        if (rows < 0).any():
            raise ValueError(f"sample {sample} was left out when features were made")
        return [Picture(features[None]) for features in self.store.read(rows)] if len(rows) else []


class Writer:
    """Writes a rank's share of the rows; use it in a `with`, which notes at its end, too, what is done."""

    def __init__(self, store: FeatureStore, rows: np.ndarray, rank: int) -> None:
        self.store, self.rows = store, rows
        self._note = store.folder / f"{store.fingerprint}.rank-{rank}.done"
        self._count = 0
        self._synced = time.monotonic()

    def __enter__(self) -> Writer:
        with storage_faults(self.store.path, 0):
            self._stream: BinaryIO = self.store.path.open("r+b")
        return self

    def write(self, features: torch.Tensor) -> None:
        """The next rows of the share, (rows, P, V) in any precision. Raises StorageError."""
        rounded = features.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()
        if rounded.shape[1:] != self.store.shape[1:]:
            raise ValueError(f"features are {rounded.shape[1:]}, announced were {self.store.shape[1:]}")
        with storage_faults(self.store.path, rounded.nbytes):
            for row, values in zip(self.rows[self._count :], rounded):
                self._stream.seek(int(row) * self.store.row_bytes)
                self._stream.write(values.data)
                self._count += 1
            if time.monotonic() - self._synced > SYNC_S:
                self._sync()

    def _sync(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        done = np.zeros(self.store.shape[0], dtype=bool)
        done[self.rows[: self._count]] = True
        self.store.note(self._note, done)
        self._synced = time.monotonic()

    def __exit__(self, *_: object) -> None:
        with storage_faults(self.store.path, 0), self._stream:
            self._sync()


class PictureBatches(Dataset[torch.Tensor | RecordError]):
    """Pixels of pictures by their numbers, `size` at a time: item n is (size, 3, H, W), or what is wrong with it."""

    def __init__(
        self, prepared: PreparedSet, pictures: Pictures, numbers: np.ndarray, reader: ImageReader, size: int
    ) -> None:
        self.prepared, self.pictures, self.numbers = prepared, pictures, numbers
        self.reader, self.size = reader, size

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.size)

    def __getitem__(self, item: int) -> torch.Tensor | RecordError:
        chosen = self.numbers[item * self.size : (item + 1) * self.size]
        try:
            return torch.cat([self._pixels(*self.pictures.firsts[number].tolist()) for number in chosen])
        except RecordError as error:
            return error

    def _pixels(self, sample: int, place: int) -> torch.Tensor:
        row = self.prepared.row(sample)
        return self.reader.pictures(sample, replace(row, images=row.images[place : place + 1]), 0)[0].pixels
