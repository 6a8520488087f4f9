"""One piece of a source, made and found again: this is what a worker process does.

A piece's rows lie in `<key>.arrow`, where the key is a hash of its records and of every setting that shapes them: an
interrupted `prepare` goes on with the pieces it has, and a changed source rebuilds the pieces that changed.
"""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow as pa

from llava_train.data.pictures.media import check_picture, settle
from llava_train.data.preparing.rows import SCHEMA, Fault, Job, Keeper, rows_of
from llava_train.data.records.containers import CONTAINERS, Piece
from llava_train.data.sample import ImageRef
from llava_train.errors import DataError, RecordError, StorageError
from llava_train.files import flush, read_json, temporary_beside, write_json

_CHUNK = 256


@dataclass
class Outcome:
    """What became of a piece's records: `kept` rows and the faults; the bytes of its two files; notes on pictures."""

    key: str
    kept: int = 0
    faults: list[Fault] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    size: int = 0
    blob_size: int = 0


def is_whole(folder: Path, key: str, size: int, blob_size: int) -> bool:
    """Whether a piece's files are there, as long as they were when they were written."""
    for suffix, wanted in ((".arrow", size), (".bin", blob_size)):
        path = folder / f"{key}{suffix}"
        if wanted and not (path.is_file() and path.stat().st_size == wanted):
            return False
    return True


def known_outcome(folder: Path, key: str, job: Job) -> Outcome | None:
    """The outcome of a piece that was made before; None if it is damaged, or a picture it blames was mended."""
    path = folder / f"{key}.json"
    try:
        values = read_json(path)
        outcome = Outcome(**{**values, "faults": [Fault(**fault) for fault in values["faults"]]})
    except (DataError, TypeError, KeyError):
        return None
    if not is_whole(folder, key, outcome.size, outcome.blob_size):
        return None
    return outcome if all(_still_wrong(fault, job) for fault in outcome.faults if fault.outside) else None


def _still_wrong(fault: Fault, job: Job) -> bool:
    frame = fault.cause.startswith("video")
    try:
        ref = settle(ImageRef(fault.outside, "frame" if frame else "file"), job.media)[0]
        check_picture(ref, job.media, job.verify)
    except RecordError as error:
        return error.cause == fault.cause
    return False


def make_piece(piece: Piece, job: Job, folder: Path, key: str) -> Outcome:
    """Write `<key>.arrow`, `<key>.bin` (pictures from inside records) and `<key>.json`, each whole or not at all.

    Raises StorageError when the disk is full.
    """
    rows, blobs = (temporary_beside(folder / f"{key}{suffix}") for suffix in (".arrow", ".bin"))
    try:
        outcome = _write(piece, job, key, rows, blobs)
        for path, suffix in ((rows, ".arrow"), (blobs, ".bin")):
            flush(path)
            if path.stat().st_size:
                path.replace(folder / f"{key}{suffix}")
        write_json(folder / f"{key}.json", asdict(outcome))
        return outcome
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise StorageError(
            f"{folder}: the disk is full ({free:,} bytes free); free some space or set data.cache_dir to another disk; "
            "what is done is kept: the same command goes on"
        ) from error
    finally:
        rows.unlink(missing_ok=True)
        blobs.unlink(missing_ok=True)


def _write(piece: Piece, job: Job, key: str, rows: Path, blobs: Path) -> Outcome:
    outcome, notes = Outcome(key), Counter[str]()
    entries = CONTAINERS[piece.container].read(piece)
    with rows.open("wb") as stream, blobs.open("wb") as pictures:
        keep = Keeper(pictures)
        with pa.ipc.new_stream(stream, SCHEMA) as writer:
            while chunk := list(islice(entries, _CHUNK)):
                made = rows_of(chunk, piece.path, job, keep)
                writer.write_batch(pa.RecordBatch.from_pylist(made.rows, schema=SCHEMA))
                outcome.kept += len(made.rows)
                outcome.faults += made.faults
                notes += made.notes
        outcome.size, outcome.blob_size = stream.tell(), pictures.tell()
    outcome.notes = dict(notes)
    return outcome
