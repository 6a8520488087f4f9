"""Source files -> prepared set: every record parsed, checked and tokenised by a pool of processes.

A cache folder holds `<fingerprint>/` (a set: `prepared.json`, `skipped.jsonl`) and `pieces/` (see `pieces.py`). The
same inputs find the same set; a changed input rebuilds the pieces that it touches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_train.data.preparing.composition import statistics
from llava_train.data.preparing.faults import FaultLog, find_doubles
from llava_train.data.preparing.pieces import Outcome, is_whole, known_outcome
from llava_train.data.preparing.pool import PieceTask, run_pieces
from llava_train.data.preparing.prepared import PIECES, PreparedSet
from llava_train.data.preparing.rows import Job
from llava_train.data.preparing.source import Source
from llava_train.data.reading import find_format
from llava_train.data.records.containers import CONTAINERS, Piece, detect_container
from llava_train.errors import DataError
from llava_train.files import atomic_folder, ensure_space, read_json, sha256_json, sweep, write_json
from llava_train.storage import Identities, is_remote

_VERSION = 4


def prepare_set(
    sources: Sequence[Source], cache_dir: Path, name: str, workers: int = 0, rebuild: bool = False
) -> PreparedSet:
    """The prepared set of `sources`, from the cache if it was made before (unless `rebuild`).

    `workers` processes share the work (0: one a core). Raises DataError that lists the faults by cause: those
    that no policy may skip, all of a source whose policy is "error", or more than `max_skipped` of one.
    """
    for source in sources:
        _check_places(source)
    ensure_space(cache_dir, 1_000_000, "the prepared set (data.cache_dir)")
    digests = _digests(sources, cache_dir)
    inputs = {"version": _VERSION, "sources": [_described(source, digests) for source in sources]}
    fingerprint = sha256_json(inputs)[:16]
    folder = cache_dir / fingerprint
    found = None if rebuild else _found(folder, sources)
    if found is not None:
        return found
    size = sum(Path(file).stat().st_size for s in sources for file in s.files if not is_remote(file) and _is_text(file))
    ensure_space(cache_dir, size, "the prepared set (data.cache_dir; about as large as its JSON)")
    sweep(cache_dir)
    sources = [replace(source, format=find_format(source.files[0], source.format)) for source in sources]
    tasks = _tasks(sources, digests)
    with atomic_folder(folder) as temporary:
        log = FaultLog(sources, temporary / "skipped.jsonl")
        made = _make(tasks, sources, cache_dir, log, name, workers, rebuild)
        info = {
            "fingerprint": fingerprint,
            "image_token_id": sources[0].encoder.image_token_id,
            "dropped": [],
            "sources": [_source_info(source, outcomes) for source, outcomes in zip(sources, made)],
            "inputs": inputs,
        }
        if sum(log.kept):
            info["dropped"] = find_doubles(PreparedSet(folder, info), sources, log)
        log.judge(cache_dir / "faults.jsonl")
        if not sum(log.kept):
            raise DataError(f"{', '.join(source.name for source in sources)}: holds no record")
        _complete(folder, info, log)
        write_json(temporary / "prepared.json", info)
    return PreparedSet(folder, info)


def _digests(sources: Sequence[Source], cache_dir: Path) -> dict[str, str]:
    identities = Identities(cache_dir / "files.json")
    digests = {file: identities.of(file) for source in sources for file in source.files}
    identities.save()
    return digests


def _found(folder: Path, sources: Sequence[Source]) -> PreparedSet | None:
    """The set in `folder`, if it is there with all its pieces."""
    try:
        info = read_json(folder / "prepared.json")
    except DataError:
        return None
    pieces = folder.parent / PIECES
    for source, stored in zip(sources, info["sources"]):
        stored["name"] = source.name  # a name is for people: another one makes no other set
        if not all(is_whole(pieces, each["key"], each["size"], each["blob_size"]) for each in stored["pieces"]):
            return None
    return PreparedSet(folder, info)


def _complete(folder: Path, info: dict[str, Any], log: FaultLog) -> None:
    """Add to `info` what is known when every record was read: counts, composition, lengths."""
    found = statistics(PreparedSet(folder, info))
    for number, (source, counted) in enumerate(zip(info["sources"], found.pop("by_source"))):
        source.update({**log.counts(number), **counted})
    info.update({"samples": sum(log.kept), "read": log.read, "skipped": log.faulty, **found})


def _check_places(source: Source) -> None:
    for file in source.files:
        if not is_remote(file) and not Path(file).is_file():
            raise DataError(f"{file}: no such file")
    if not source.media.root.is_dir():
        raise DataError(f"{source.media.root}: no such image root (of {source.name})")


def _is_text(file: str) -> bool:
    return not CONTAINERS[detect_container(file)].binary


def _described(source: Source, digests: dict[str, str]) -> dict[str, Any]:
    """Everything of a source that the set depends on, for the fingerprint."""
    return {
        "files": [[file, digests[file]] for file in source.files],
        "policy": [source.policy, source.max_skipped, source.duplicates],
        "aspect_ratio": source.aspect_ratio,
        **_shaping(source),
    }


def _shaping(source: Source) -> dict[str, Any]:
    """What a row of a source depends on besides its record."""
    encoder = source.encoder
    return {
        "version": _VERSION,
        "format": source.format,
        "verify": source.verify,
        "compare": source.duplicates == "content",
        "media": {**asdict(source.media), "root": str(source.media.root.absolute())},
        "tokenizer": encoder.tokenizer_digest,
        "template": sha256_json(encoder.template),
        "image_tokens": encoder.shaping,
        "marker": encoder.marker + encoder.line_end,
        "max_length": encoder.max_length,
    }


def _tasks(sources: Sequence[Source], digests: dict[str, str]) -> Iterator[PieceTask]:
    for number, source in enumerate(sources):
        shaping = sha256_json(_shaping(source))
        for file in source.files:
            container = CONTAINERS[detect_container(file)]
            for piece in container.cut(file):
                yield PieceTask(number, piece, _key(piece, shaping, digests[file] if container.binary else ""))


def _key(piece: Piece, shaping: str, digest: str) -> str:
    return sha256_json([shaping, digest, piece.path, piece.first, piece.count, piece.tail, piece.text])[:32]


def _make(
    tasks: Iterator[PieceTask],
    sources: Sequence[Source],
    cache_dir: Path,
    log: FaultLog,
    name: str,
    workers: int,
    rebuild: bool,
) -> list[list[tuple[Piece, Outcome]]]:
    """Run all pieces; the outcomes of each source in the order of its records."""
    pieces = cache_dir / PIECES
    pieces.mkdir(parents=True, exist_ok=True)
    jobs = [Job(s.format, s.encoder, s.media, s.verify, s.duplicates == "content") for s in sources]
    made: list[list[tuple[Piece, Outcome]]] = [[] for _ in sources]
    total = sum(Path(file).stat().st_size for s in sources for file in s.files if not is_remote(file))
    with tqdm(desc=f"prepare {name}", total=total or None, unit="B", unit_scale=True, delay=2) as bar:

        def known(task: PieceTask) -> Outcome | None:
            return None if rebuild else known_outcome(pieces, task.key, jobs[task.source])

        for task, outcome in run_pieces(tasks, jobs, pieces, known, workers):
            log.add(task.source, task.piece.path, outcome)
            made[task.source].append((replace(task.piece, text=""), replace(outcome, faults=[])))
            bar.update(task.piece.size)
            bar.set_postfix_str(f"{log.read:,} records, {log.faulty:,} faults", refresh=False)
    return made


def _source_info(source: Source, outcomes: list[tuple[Piece, Outcome]]) -> dict[str, Any]:
    notes: Counter[str] = sum((Counter(outcome.notes) for _, outcome in outcomes), start=Counter())
    return {
        "name": source.name,
        "format": source.format,
        "media": {**asdict(source.media), "root": str(source.media.root.absolute())},
        "aspect_ratio": source.aspect_ratio,
        "notes": dict(notes),
        "pieces": [
            {"path": piece.path, **{key: getattr(made, key) for key in ("key", "kept", "size", "blob_size")}}
            for piece, made in outcomes
        ],
    }
