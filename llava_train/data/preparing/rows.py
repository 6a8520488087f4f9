"""Records -> rows: parsed, their pictures looked at, tokenised; what cannot be used becomes a fault."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from llava_train.data.encode import Encoded, Encoder, encode_many, with_rejected
from llava_train.data.pictures.images import Header
from llava_train.data.pictures.media import Media, check_picture, located, picture_bytes, settle
from llava_train.data.records.formats import parse_record
from llava_train.data.sample import ImageRef, Sample
from llava_train.errors import RecordError

_PICTURE = pa.struct(
    [("path", pa.string()), ("kind", pa.string()), ("at", pa.int64()), ("size", pa.int64()), ("column", pa.string())]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("at", pa.string()),
        ("images", pa.list_(_PICTURE)),
        ("image_sizes", pa.list_(pa.int32())),
        ("image_tokens", pa.list_(pa.int32())),
        ("input_ids", pa.list_(pa.int32())),
        ("spans", pa.list_(pa.int32())),
        ("rejected_input_ids", pa.list_(pa.int32())),
        ("rejected_spans", pa.list_(pa.int32())),
        ("length", pa.int32()),
        ("supervised", pa.int32()),
        ("truncated", pa.int32()),
        ("prefix", pa.int32()),
        ("prefix_images", pa.int32()),
        ("prefix_key", pa.uint64()),
        ("identity", pa.uint64()),
        ("content", pa.uint64()),
    ]
)
"""A row: `at` is the record's place behind the file's name; `image_sizes` are width and height in turn; `spans` are
start and end in turn; `prefix` is the number of tokens up to the last of the `prefix_images` before the first answer,
`prefix_key` a hash of both; `identity` and `content` are hashes of the id and of the conversation, to find doubles."""


@dataclass(frozen=True)
class Job:
    """What a worker must know of a source besides the piece."""

    format: str
    encoder: Encoder
    media: Media
    verify: str
    compare: bool = False
    """Whether records are compared by what they show, so that pictures inside containers must be read whole."""

    @property
    def level(self) -> str:
        """How far pictures are looked at: at their size, if their tokens depend on it."""
        return "header" if self.encoder.sized and self.verify in ("none", "exists") else self.verify


@dataclass(frozen=True)
class Fault:
    """A record that cannot be used; `id` is empty where it has none that can be read."""

    at: str
    id: str
    cause: str
    message: str
    hostile: bool = False
    outside: str = ""
    """The file beside the record that is to blame: the record may be good the next time."""


class Keeper:
    """Appends pictures that came inside records to the piece's blob file; the same picture is kept once.

    A blob is named by the digest of its bytes, so that two records with the same picture look alike.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self._kept = stream, dict[str, ImageRef]()

    def __call__(self, ref: ImageRef) -> ImageRef:
        """Bytes as a blob; any other reference as it is."""
        if ref.kind != "bytes":
            return ref
        digest = hashlib.blake2b(ref.data, digest_size=16).hexdigest()
        if digest not in self._kept:
            self._kept[digest] = ImageRef(digest, "blob", self.stream.tell(), len(ref.data))
            self.stream.write(ref.data)
        return self._kept[digest]

    def bytes_of(self, ref: ImageRef) -> ImageRef:
        """A blob of this keeper as bytes again; any other reference as it is."""
        if ref.kind != "blob":
            return ref
        self.stream.seek(ref.at)
        content = self.stream.read(ref.size)
        self.stream.seek(0, os.SEEK_END)
        return ImageRef("", "bytes", data=content)


@dataclass
class Made:
    """What became of some records: each is a row or a fault; `notes` counts what is odd about their pictures."""

    rows: list[dict[str, Any]]
    faults: list[Fault]
    notes: Counter[str]


def rows_of(entries: Sequence[tuple[Any, str]], path: str, job: Job, keep: Keeper) -> Made:
    """Rows of the records of `path` that can be used, and the faults of the others, both in their order."""
    made = Made([], [], Counter())
    order = {at: index for index, (_, at) in enumerate(entries)}
    samples: list[tuple[str, Sample, list[int]]] = []
    for record, at in entries:
        try:
            samples.append((at, *_sample(record, f"{path}{at}", path, job, made.notes, keep)))
        except RecordError as error:
            made.faults.append(Fault(at, _id_of(record), error.cause, str(error), error.hostile, error.outside))
    encoded = _encoded([sample for _, sample, _ in samples], job.encoder, [sizes for *_, sizes in samples])
    for (at, sample, picture_sizes), result in zip(samples, encoded):
        if isinstance(result, RecordError):
            made.faults.append(Fault(at, sample.id, result.cause, str(result)))
        else:
            hashes = {"content": _content(sample, path, job), **_prefix(sample, path, job, result[0])}
            made.rows.append(_row(at, sample, picture_sizes, hashes, *result))
    made.faults.sort(key=lambda fault: order[fault.at])
    return made


def _id_of(record: Any) -> str:
    identity = record.get("id", record.get("__key__")) if isinstance(record, dict) else None
    return str(identity) if isinstance(identity, (str, int)) else ""


def _sample(
    record: Any, place: str, path: str, job: Job, notes: Counter[str], keep: Keeper
) -> tuple[Sample, list[int]]:
    """The sample with its pictures looked at and settled, and their sizes (width, height, width, ...)."""
    sample = parse_record(job.format, record, place)
    turns, picture_sizes = [], list[int]()
    for turn in sample.turns:
        parts: list[str | ImageRef] = []
        for part in turn.parts:
            if isinstance(part, str):
                parts.append(part)
                continue
            settled, header = _settled(part, path, sample, job)
            parts += map(keep, settled)
            picture_sizes += [header.width, header.height] * len(settled) if header else [0, 0] * len(settled)
            notes.update(header.notes if header else ())
        turns.append(replace(turn, parts=tuple(parts)))
    return replace(sample, turns=tuple(turns)), picture_sizes


def _settled(ref: ImageRef, path: str, sample: Sample, job: Job) -> tuple[list[ImageRef], Header | None]:
    try:
        settled = settle(ref, job.media)
        # Inside a container a reference leaves its file out, in the row as well: the file may move.
        header = check_picture(located(settled[0], path, Path()), job.media, job.level)
    except RecordError as error:
        outside = ref.path if ref.kind in ("file", "frame", "url") else ""
        raise error.of(sample.where, outside) from error
    return settled, header


def _encoded(
    samples: list[Sample], encoder: Encoder, sizes: list[list[int]]
) -> list[tuple[Encoded, Encoded | None] | RecordError]:
    chosen = _encode_safely(samples, encoder, sizes)
    pairs = [index for index, sample in enumerate(samples) if sample.rejected is not None]
    others = [with_rejected(samples[index]) for index in pairs]
    rejected = dict(zip(pairs, _encode_safely(others, encoder, [sizes[index] for index in pairs])))
    results: list[tuple[Encoded, Encoded | None] | RecordError] = []
    for index, first in enumerate(chosen):
        second = rejected.get(index)
        fault = next((side for side in (first, second) if isinstance(side, RecordError)), None)
        results.append(fault or (first, second))  # type: ignore[arg-type]
    return results


def _encode_safely(samples: list[Sample], encoder: Encoder, sizes: list[list[int]]) -> list[Encoded | RecordError]:
    """`encode_many`; where a text brings tokenizer or template down, that sample alone is the fault."""
    try:
        return encode_many(samples, encoder, sizes) if samples else []
    except Exception as error:
        if len(samples) == 1:
            message = f"cannot be rendered or tokenised ({type(error).__name__}: {error})"
            return [samples[0].fault(message, "malformed")]
        return [result for one, own in zip(samples, sizes) for result in _encode_safely([one], encoder, [own])]


def _row(
    at: str,
    sample: Sample,
    picture_sizes: list[int],
    hashes: dict[str, int],
    chosen: Encoded,
    rejected: Encoded | None,
) -> dict[str, Any]:
    return {
        "id": sample.id,
        "at": at,
        "images": [
            {"path": ref.path, "kind": ref.kind, "at": ref.at, "size": ref.size, "column": ref.column}
            for ref in sample.images
        ],
        "image_sizes": picture_sizes,
        "image_tokens": chosen.image_tokens,
        "input_ids": chosen.input_ids,
        "spans": chosen.spans.reshape(-1),
        "rejected_input_ids": rejected.input_ids if rejected else [],
        "rejected_spans": rejected.spans.reshape(-1) if rejected else [],
        "length": chosen.length,
        "supervised": chosen.supervised,
        "truncated": chosen.truncated,
        "identity": _hash(sample.id),
        **hashes,
    }


def _prefix(sample: Sample, path: str, job: Job, encoded: Encoded) -> dict[str, int]:
    """What other samples may begin with, too: all up to the last picture before the first answer."""
    pictures = np.flatnonzero(encoded.input_ids[: encoded.spans[0, 0]] == job.encoder.image_token_id)
    if not len(pictures):
        return {"prefix": 0, "prefix_images": 0, "prefix_key": 0}
    ids, count = encoded.input_ids[: pictures[-1] + 1], len(pictures)
    shown = [_shown(ref, path, job) for ref in sample.images[:count]]
    widths = encoded.image_tokens[:count]
    tokens = len(ids) - count + sum(widths)
    return {"prefix": tokens, "prefix_images": count, "prefix_key": _hash(repr((ids.tolist(), shown, widths)))}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def _content(sample: Sample, path: str, job: Job) -> int:
    """A hash of what the record says and shows. Pictures inside containers count by their bytes if `job.compare`."""
    said = [
        [turn.role, *(part if isinstance(part, str) else _shown(part, path, job) for part in turn.parts)]
        for turn in sample.turns
    ]
    return _hash(repr((said, sample.rejected)))


def _shown(ref: ImageRef, path: str, job: Job) -> tuple[Any, ...]:
    if ref.kind == "blob":
        return (ref.path,)
    if ref.kind in ("file", "frame"):
        return ref.path, ref.at, ref.size
    if job.compare:
        content = picture_bytes(located(ref, path, Path()), job.media)
        return (hashlib.blake2b(content, digest_size=16).hexdigest(),)
    return path, ref.at, ref.size, ref.column
