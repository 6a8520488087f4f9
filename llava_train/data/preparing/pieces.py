"""One piece of a source -> rows: parsed, checked, tokenised, written as Arrow. This is what a worker process does.

A piece's rows lie in `<key>.arrow`, where the key is a hash of its records and of every setting that shapes them: an
interrupted `prepare` goes on with the pieces it has, and a changed source rebuilds the pieces that changed.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from llava_train.data.encode import Encoded, Encoder, encode_many, with_rejected
from llava_train.data.pictures.images import Header
from llava_train.data.pictures.media import Media, check_picture, located, settle
from llava_train.data.records.containers import CONTAINERS, Piece
from llava_train.data.records.formats import parse_record
from llava_train.data.sample import ImageRef, Sample
from llava_train.errors import RecordError
from llava_train.files import read_json, write_json

_CHUNK = 256
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
        ("identity", pa.uint64()),
        ("content", pa.uint64()),
    ]
)
"""A row: `at` is the record's place behind the file's name; `image_sizes` are width and height in turn; `spans` are
start and end in turn; `identity` and `content` are hashes of the id and of the conversation, to find doubles."""


@dataclass(frozen=True)
class Job:
    """What a worker must know of a source besides the piece."""

    format: str
    encoder: Encoder
    media: Media
    verify: str


@dataclass(frozen=True)
class Fault:
    """A record that cannot be used."""

    at: str
    cause: str
    message: str
    hostile: bool = False
    outside: str = ""
    """The file beside the record that is to blame: the record may be good the next time."""


@dataclass
class Outcome:
    """What became of a piece's records; `read` = kept + faulty."""

    key: str
    kept: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)

    @property
    def read(self) -> int:
        """Records that were read."""
        return self.kept + len(self.faults)


def known_outcome(folder: Path, key: str, job: Job) -> Outcome | None:
    """The outcome of a piece that was made before; None if what was wrong with a picture no longer is."""
    path = folder / f"{key}.json"
    if not path.is_file() or not (folder / f"{key}.arrow").is_file():
        return None
    values = read_json(path)
    outcome = Outcome(key, values["kept"], Counter(values["notes"]), [Fault(**fault) for fault in values["faults"]])
    return outcome if all(_still_wrong(fault, job) for fault in outcome.faults if fault.outside) else None


def _still_wrong(fault: Fault, job: Job) -> bool:
    frame = fault.cause.startswith("video")
    ref = ImageRef(fault.outside, "frame", 0, job.media.video_frames) if frame else ImageRef(fault.outside)
    try:
        check_picture(ref, job.media, job.verify)
    except RecordError as error:
        return error.cause == fault.cause
    return False


def make_piece(piece: Piece, job: Job, folder: Path, key: str) -> Outcome:
    """Write `<key>.arrow`, `<key>.bin` (pictures from inside records) and `<key>.json`, each whole or not at all."""
    outcome = Outcome(key)
    rows, blobs = (folder / f".{key}.{os.getpid()}.{kind}" for kind in ("arrow", "bin"))
    try:
        with rows.open("wb") as stream, blobs.open("wb") as pictures, pa.ipc.new_stream(stream, SCHEMA) as writer:
            for made in _rows(piece, job, outcome, Keeper(pictures)):
                writer.write_batch(pa.RecordBatch.from_pylist(made, schema=SCHEMA))
                outcome.kept += len(made)
        if blobs.stat().st_size:
            blobs.replace(folder / f"{key}.bin")
        rows.replace(folder / f"{key}.arrow")
        write_json(folder / f"{key}.json", asdict(outcome))
    finally:
        rows.unlink(missing_ok=True)
        blobs.unlink(missing_ok=True)
    return outcome


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


def _rows(piece: Piece, job: Job, outcome: Outcome, keep: Keeper) -> Iterator[list[dict[str, Any]]]:
    entries = CONTAINERS[piece.container].read(piece)
    while chunk := list(islice(entries, _CHUNK)):
        yield rows_of(chunk, piece.path, job, outcome, keep)


def rows_of(
    entries: Sequence[tuple[Any, str]], path: str, job: Job, outcome: Outcome, keep: Keeper
) -> list[dict[str, Any]]:
    """Rows of the records that can be used; the others are added to `outcome`."""
    samples: list[tuple[str, Sample, list[int]]] = []
    before, order = len(outcome.faults), {at: index for index, (_, at) in enumerate(entries)}
    for record, at in entries:
        try:
            samples.append((at, *_sample(record, f"{path}{at}", path, job, outcome.notes, keep)))
        except RecordError as error:
            outcome.faults.append(Fault(at, error.cause, str(error), error.hostile, error.outside))
    encoded = _encoded([sample for _, sample, _ in samples], job.encoder)
    rows = []
    for (at, sample, picture_sizes), result in zip(samples, encoded):
        if isinstance(result, RecordError):
            outcome.faults.append(Fault(at, result.cause, str(result)))
        else:
            rows.append(_row(at, sample, picture_sizes, *result))
    outcome.faults[before:] = sorted(outcome.faults[before:], key=lambda fault: order[fault.at])
    return rows


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
        header = check_picture(located(settled[0], path, Path()), job.media, job.verify)
    except RecordError as error:
        outside = ref.path if ref.kind in ("file", "frame", "url") else ""
        raise RecordError(f"{sample.where}: {error}", error.cause, error.hostile, outside) from error
    return settled, header


def _encoded(samples: list[Sample], encoder: Encoder) -> list[tuple[Encoded, Encoded | None] | RecordError]:
    chosen = _encode_safely(samples, encoder)
    pairs = [index for index, sample in enumerate(samples) if sample.rejected is not None]
    rejected = dict(zip(pairs, _encode_safely([with_rejected(samples[index]) for index in pairs], encoder)))
    results: list[tuple[Encoded, Encoded | None] | RecordError] = []
    for index, first in enumerate(chosen):
        second = rejected.get(index)
        fault = next((side for side in (first, second) if isinstance(side, RecordError)), None)
        results.append(fault or (first, second))  # type: ignore[arg-type]
    return results


def _encode_safely(samples: list[Sample], encoder: Encoder) -> list[Encoded | RecordError]:
    """`encode_many`; where a text brings tokenizer or template down, that sample alone is the fault."""
    try:
        return encode_many(samples, encoder) if samples else []
    except Exception as error:
        if len(samples) == 1:
            message = f"cannot be rendered or tokenised ({type(error).__name__}: {error})"
            return [samples[0].fault(message, "malformed")]
        return [result for sample in samples for result in _encode_safely([sample], encoder)]


def _row(
    at: str, sample: Sample, picture_sizes: list[int], chosen: Encoded, rejected: Encoded | None
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
        "content": _hash(repr((sample.turns, sample.rejected))),
    }


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
