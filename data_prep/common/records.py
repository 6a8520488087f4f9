"""Record files: read and written one record at a time (a gigabyte of JSON is usual), filtered and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.common.transfer import full_disk
from llava_train.errors import DataError, RecordError
from llava_train.files import flush

Record = dict[str, Any]


@dataclass(frozen=True)
class RecordFile:
    """A record file that the final check reads.

    Attributes:
        path: below the output folder; a folder stands for the tar shards in it.
        count: how many records it must have; None: not verified.
        root: what its pictures are relative to, below the output folder.
        key: where a record names its picture or video.
        complete: every picture must be there; False: the missing are counted and that is all.
        part: the part of the data set it belongs to; None: every one.
    """

    path: str
    count: int | None = None
    root: str = "."
    key: str = "image"
    complete: bool = True
    part: str | None = None


def read_array(path: Path) -> Iterator[Record]:
    """The records of a JSON list, of a .jsonl, or of the tar shards in a folder, in flat memory; DataError."""
    from llava_train.data.records.containers import CONTAINERS  # brings torch, which --help and downloads do without

    kind = "jsonl" if path.suffix == ".jsonl" else "json"
    files = [(path, kind)] if not path.is_dir() else [(shard, "tar") for shard in sorted(path.glob("*.tar"))]
    for file, kind in files:
        for piece in CONTAINERS[kind].cut(str(file)):
            for record, place in CONTAINERS[kind].read(piece):
                if isinstance(record, RecordError):
                    raise record
                if not isinstance(record, dict):
                    raise DataError(f"{file}{place}: a record must be an object, not {type(record).__name__}")
                yield record


def write_array(path: Path, records: Iterable[Any]) -> int:
    """Write a JSON list, a record a line, whole or not at all; the number of records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, count = path.with_name(f".{path.name}.{os.getpid()}.tmp"), 0
    try:
        with temporary.open("w", encoding="utf-8") as stream, full_disk(temporary):
            for count, record in enumerate(records, 1):
                stream.write(("[\n" if count == 1 else ",\n") + json.dumps(record, ensure_ascii=False))
            stream.write("\n]\n" if count else "[]\n")
            stream.flush()
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def pictures_of(record: Record, key: str = "image") -> list[str]:
    """The paths of a record's pictures."""
    named = record.get(key)
    return named if isinstance(named, list) else [named] if named else []


def presence(root: Path) -> Callable[[str], bool]:
    """Whether a picture is there, asked of the disk once a picture."""
    known: dict[str, bool] = {}

    def there(name: str) -> bool:
        if name not in known:
            known[name] = (root / name).is_file()
        return known[name]

    return there


def write_available(path: Path, root: Path, key: str = "image") -> int:
    """Write `NAME_available.json` with the records of NAME.json whose pictures are there; their number."""
    there = presence(root)
    kept = (record for record in read_array(path) if all(map(there, pictures_of(record, key))))
    return write_array(available(path), kept)


def available(path: Path) -> Path:
    """The name of the file `write_available` writes."""
    return path.with_name(f"{path.stem}_available.json")


def count_records(path: Path, root: Path, key: str = "image") -> dict[str, int]:
    """Records of a file, different pictures they name or hold, and how many of those are not there."""
    seen: dict[str, bool] = {}
    there, records, held, empty = presence(root), 0, 0, 0
    for record in tqdm(read_array(path), desc=f"checking {path.name}", unit="record", disable=None):
        records += 1
        for name in pictures_of(record, key):
            seen[name] = there(name)
        if "__key__" in record:  # a sample of a shard, which holds its picture
            held += len(record.get("__images__", []))
            empty += "__images__" not in record
    missing = sum(not found for found in seen.values()) + empty
    return {"records": records, "images": len(seen) + held, "missing": missing}


def question(identity: str, image: str, asked: str, answer: str, **more: Any) -> Record:
    """A LLaVA record with one question about one picture."""
    turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}]
    return {"id": identity, "image": image, **more, "conversations": turns}
