"""A prepared set as training reads it: rows of many memory-mapped pieces, each row with its pictures located."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llava_train.data.encode import expand
from llava_train.data.micro_batches import Sizes
from llava_train.data.pictures.media import Media, located
from llava_train.data.pictures.processors import AspectRatio
from llava_train.data.sample import ImageRef
from llava_train.files import sha256_json

PIECES = "pieces"
"""Folder of a cache that holds the pieces of all its sets."""


@dataclass(frozen=True)
class Row:
    """One sample, ready for a batch.

    Attributes:
        input_ids, labels: expanded, (tokens,) int64; labels unshifted, -100 where unsupervised.
        images: its pictures in reading order; `media` says how the source lets them be read.
        image_tokens: tokens of each picture.
        prefix: tokens up to the last picture before the first answer; `prefix_images` pictures are in them.
        source: name of its source.
        aspect_ratio: how its pictures are brought to the encoder's shape, None: as the model's processor does.
    """

    id: str
    place: str
    source: str
    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[ImageRef, ...]
    image_tokens: tuple[int, ...]
    prefix: int
    prefix_images: int
    media: Media
    aspect_ratio: AspectRatio | None


@dataclass(frozen=True)
class Origin:
    """What a stored row leaves out: its source's name, its file, its piece's blobs, how its pictures are read."""

    source: str
    container: str
    blobs: Path
    media: Media
    aspect_ratio: AspectRatio | None


def as_row(values: dict[str, Any], origin: Origin, image_token_id: int) -> Row:
    """A stored row (`llava_train.data.preparing.rows.SCHEMA`), expanded."""
    ids, labels = expand(
        np.asarray(values["input_ids"], np.int32),
        np.asarray(values["spans"], np.int32),
        values["image_tokens"],
        image_token_id,
    )
    return Row(
        values["id"],
        f"{origin.container}{values['at']}",
        origin.source,
        ids,
        labels,
        tuple(located(ImageRef(**image), origin.container, origin.blobs) for image in values["images"]),
        tuple(values["image_tokens"]),
        values["prefix"],
        values["prefix_images"],
        origin.media,
        origin.aspect_ratio,
    )


def numbered(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Numbers from 0 that are equal where the values are."""
    return np.unique(values, return_inverse=True)[1]


def joined(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Numbers from 0 that are equal where both (of numbers from 0, and of any) are."""
    two = numbered(two)
    return numbered(one * (two.max(initial=0) + 1) + two)


@dataclass(frozen=True, eq=False)
class PreparedSet:
    """A prepared set on disk: `folder` has its `prepared.json`, the pieces lie beside it."""

    folder: Path
    info: dict[str, Any]

    def __len__(self) -> int:
        return len(self.kept_rows)

    @property
    def fingerprint(self) -> str:
        """Hash of everything this set was made from; its folder's name."""
        return str(self.info["fingerprint"])

    @property
    def contents(self) -> str:
        """Hash of its inputs and of which samples are in it: pictures that were mended bring more from the same."""
        return sha256_json([self.fingerprint, hashlib.sha256(self.column("identity").tobytes()).hexdigest()])

    @cached_property
    def table(self) -> Any:
        """The memory-mapped `datasets.Dataset` of all pieces; see `llava_train.data.preparing.rows.SCHEMA`."""
        from datasets import Dataset, concatenate_datasets

        folder = self.folder.parent / PIECES
        found = [Dataset.from_file(str(folder / f"{piece['key']}.arrow")) for piece in self._pieces]
        return concatenate_datasets(found).with_format("arrow")

    @cached_property
    def _pieces(self) -> list[dict[str, Any]]:
        """Pieces that hold rows, each with the number of its source."""
        return [
            {**piece, "source": number}
            for number, source in enumerate(self.info["sources"])
            for piece in source["pieces"]
            if piece["kept"]
        ]

    @cached_property
    def _starts(self) -> np.ndarray:
        """First row of each piece in the table, and the end."""
        return np.cumsum([0, *(piece["kept"] for piece in self._pieces)])

    @cached_property
    def kept_rows(self) -> np.ndarray:
        """Rows of the table that are samples of the set (without dropped doubles), (samples,)."""
        return np.delete(np.arange(self._starts[-1]), self.info["dropped"])

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, (samples,)."""
        return np.asarray(self.table.data.column(name).to_numpy()[self.kept_rows])

    def counts(self, name: str) -> np.ndarray:
        """Lengths of a column of lists, (samples,)."""
        import pyarrow.compute as pc

        return np.asarray(pc.list_value_length(self.table.data.column(name)).to_numpy()[self.kept_rows])

    @cached_property
    def sizes(self) -> Sizes:
        """What cutting steps into micro-batches knows of each sample."""
        prefixes, pictures = self.column("prefix"), self.column("prefix_images")
        return Sizes(self.lengths, self.supervised, self.counts("images"), prefixes, pictures, self.prefix_keys)

    @cached_property
    def prefix_keys(self) -> np.ndarray:
        """Equal where samples begin with the same tokens and pictures, 0 where there are none, (samples,) int64.

        A row's own hash says nothing of where its source's pictures lie and how they are read.
        """
        own = self.column("prefix_key")
        return np.where(own == 0, 0, joined(numbered(own), self.read_alike) + 1)

    @property
    def read_alike(self) -> np.ndarray:
        """Equal where pictures lie in the same place and are read in the same way, (samples,)."""
        sources = self.info["sources"]
        return numbered([sha256_json([source["media"], source["aspect_ratio"]]) for source in sources])[self.source_of]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, (samples,)."""
        return self.column("length")

    @cached_property
    def supervised(self) -> np.ndarray:
        """Positions that carry loss of each sample, (samples,)."""
        return self.column("supervised")

    @cached_property
    def source_of(self) -> np.ndarray:
        """Number of the source of each sample, (samples,)."""
        numbers = np.repeat([piece["source"] for piece in self._pieces], np.diff(self._starts))
        return np.asarray(numbers[self.kept_rows])

    def rows_of_source(self, number: int) -> np.ndarray:
        """The samples of one source, in their order."""
        return np.flatnonzero(self.source_of == number)

    def values(self, sample: int) -> dict[str, Any]:
        """The stored columns of a sample as Python values."""
        found: dict[str, Any] = self.table[int(self.kept_rows[sample])].to_pylist()[0]
        return found

    def row(self, sample: int) -> Row:
        """A sample, expanded and with its pictures located."""
        piece = self._piece_of(sample)
        source = self.info["sources"][piece["source"]]
        blobs = (self.folder.parent / PIECES / f"{piece['key']}.bin").absolute()
        media = Media(**{**source["media"], "root": Path(source["media"]["root"])})
        origin = Origin(source["name"], piece["path"], blobs, media, source["aspect_ratio"])
        return as_row(self.values(sample), origin, self.info["image_token_id"])

    def place(self, sample: int) -> str:
        """Where a sample came from ("train.json[17]")."""
        at = self.table.data.column("at")[int(self.kept_rows[sample])].as_py()
        return f"{self._piece_of(sample)['path']}{at}"

    def _piece_of(self, sample: int) -> dict[str, Any]:
        return self._pieces[int(np.searchsorted(self._starts, self.kept_rows[sample], side="right")) - 1]
