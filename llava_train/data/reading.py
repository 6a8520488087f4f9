"""Records of a source without preparing it: for evaluation, `inspect`, and finding out what a file holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_train.data.pictures.media import Media, located, settle
from llava_train.data.records.containers import CONTAINERS, detect_container
from llava_train.data.records.formats import FORMATS, detect, parse_record
from llava_train.data.sample import ImageRef, Sample, Turn
from llava_train.errors import DataError, RecordError

_LOOKED_AT = 100


def read_entries(path: str) -> Iterator[tuple[Any, str]]:
    """Each record of a file, or the RecordError in its place, and where it is ("[3]", ":4")."""
    container = CONTAINERS[detect_container(path)]
    for piece in container.cut(path):
        yield from container.read(piece)


def find_format(path: str, name: str = "auto") -> str:
    """The format of a file by the first of its records that shows one; a `name` that is not "auto" is kept.

    Raises DataError where none does, with what was found.
    """
    if name != "auto":
        FORMATS[name]
        return name
    fault: DataError | None = None
    for record, at in itertools.islice(read_entries(path), _LOOKED_AT):
        try:
            if isinstance(record, RecordError):
                raise record
            return detect(record, f"{path}{at}")
        except DataError as error:
            fault = fault or error
    raise fault or DataError(f"{path}: holds no record")


def read_samples(path: str, media: Media, name: str = "auto") -> Iterator[Sample | RecordError]:
    """Each record of a file as a Sample whose pictures can be opened, or the RecordError that says what is wrong."""
    name = find_format(path, name)
    for record, at in read_entries(path):
        try:
            sample = parse_record(name, record, f"{path}{at}")
            yield replace(sample, turns=tuple(_opened(turn, sample, path, media) for turn in sample.turns))
        except RecordError as error:
            yield error


def _opened(turn: Turn, sample: Sample, path: str, media: Media) -> Turn:
    parts: list[str | ImageRef] = []
    for part in turn.parts:
        if isinstance(part, str):
            parts.append(part)
            continue
        try:
            parts += [located(ref, path, Path()) for ref in settle(part, media)]
        except RecordError as error:
            raise error.of(sample.where) from error
    return replace(turn, parts=tuple(parts))
