"""Source files -> prepared set: validated, tokenised, memory-mapped Arrow beside a fingerprint.

A prepared set lies in `<cache_dir>/<fingerprint>/`: `data.arrow` (one row a sample), `prepared.json` (the
fingerprint's inputs, counts and lengths). The same inputs find the same folder; anything else makes a new one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llava_train.data.encode import IGNORE, Encoded, Encoder, encode_many
from llava_train.data.formats import read_samples
from llava_train.data.images import check_image
from llava_train.data.sample import Sample
from llava_train.errors import DataError
from llava_train.files import atomic_folder, ensure_space, read_json, sha256_file, sha256_json, write_json

_VERSION = 1
_CHUNK = 512
_SHOWN_FAULTS = 20


@dataclass(frozen=True)
class Source:
    """A file of records and the folder its image paths start from."""

    path: Path
    image_root: Path
    format: str = "auto"


@dataclass(frozen=True)
class PreparedSet:
    """A prepared set on disk. Rows: `id, place, source, images, input_ids, labels, length, supervised`."""

    folder: Path
    info: dict[str, Any]

    @cached_property
    def table(self) -> Any:
        """The memory-mapped `datasets.Dataset`."""
        from datasets import Dataset

        return Dataset.from_file(str(self.folder / "data.arrow"))

    def __len__(self) -> int:
        return int(self.info["samples"])

    @property
    def fingerprint(self) -> str:
        """Hash of everything this set was made from."""
        return str(self.info["fingerprint"])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, (samples,)."""
        return self.table.data.column("length").to_numpy()

    @cached_property
    def supervised(self) -> np.ndarray:
        """Positions that carry loss of each sample, (samples,)."""
        return self.table.data.column("supervised").to_numpy()

    def image_root(self, source: int) -> Path:
        """The image root of a row's `source`."""
        return Path(self.info["sources"][source]["image_root"])


def prepare_set(
    sources: Sequence[Source], encoder: Encoder, image_settings: dict[str, Any], cache_dir: Path, name: str
) -> PreparedSet:
    """The prepared set of `sources`, from the cache if it was made before.

    Raises DataError that lists all faults of all records (the first 20 in full, the rest counted).
    """
    inputs = _fingerprint_inputs(sources, encoder, image_settings)
    fingerprint = sha256_json(inputs)[:16]
    folder = cache_dir / fingerprint
    if (folder / "prepared.json").exists():
        return PreparedSet(folder, read_json(folder / "prepared.json"))
    size = sum(source.path.stat().st_size for source in sources)
    ensure_space(cache_dir, 6 * size, "the prepared set (about 6 bytes a byte of JSON)")
    with atomic_folder(folder) as temporary:
        statistics = _write(temporary / "data.arrow", sources, encoder, name)
        info = {"fingerprint": fingerprint, **statistics, **inputs}
        write_json(temporary / "prepared.json", info)
    return PreparedSet(folder, info)


def _fingerprint_inputs(sources: Sequence[Source], encoder: Encoder, images: dict[str, Any]) -> dict[str, Any]:
    described = []
    for source in sources:
        if not source.path.is_file():
            raise DataError(f"{source.path}: no such file")
        if not source.image_root.is_dir():
            raise DataError(f"{source.image_root}: no such image root (of {source.path})")
        described.append(
            {
                "path": str(source.path.absolute()),
                "sha256": sha256_file(source.path),
                "image_root": str(source.image_root.absolute()),
                "format": source.format,
            }
        )
    backend = encoder.tokenizer.backend_tokenizer.to_str()
    return {
        "version": _VERSION,
        "sources": described,
        "tokenizer": sha256_json([backend, encoder.tokenizer.special_tokens_map]),
        "template": sha256_json(encoder.template),
        "image_tokens": encoder.image_tokens,
        "max_length": encoder.max_length,
        "images": images,
    }


def _write(path: Path, sources: Sequence[Source], encoder: Encoder, name: str) -> dict[str, Any]:
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features(
        {
            "id": Value("string"),
            "place": Value("string"),
            "source": Value("int32"),
            "images": List(Value("string")),
            "input_ids": List(Value("int32")),
            "labels": List(Value("int32")),
            "length": Value("int32"),
            "supervised": Value("int32"),
        }
    )
    faults: list[DataError] = []
    lengths: list[int] = []
    truncated = 0
    with ArrowWriter(path=str(path), features=features) as writer:
        progress = tqdm(_rows(sources, encoder), desc=f"prepare {name}", unit=" records", delay=2)
        for row in progress:
            if isinstance(row, DataError):
                faults.append(row)
                continue
            truncated += row.pop("truncated") > 0
            lengths.append(row["length"])
            writer.write(row)
        if lengths:
            writer.finalize()
    if faults:
        raise _fault_list(faults, len(faults) + len(lengths))
    return {
        "samples": len(lengths),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "mean_length": sum(lengths) / len(lengths),
        "truncated_samples": truncated,
    }


def _rows(sources: Sequence[Source], encoder: Encoder) -> Iterator[dict[str, Any] | DataError]:
    for number, source in enumerate(sources):
        checked: set[str] = set()
        samples = read_samples(source.path, source.format)
        while chunk := list(itertools.islice(samples, _CHUNK)):
            good: list[Sample] = []
            for sample in chunk:
                fault = sample if isinstance(sample, DataError) else _image_fault(sample, source, checked)
                if fault:
                    yield fault
                elif isinstance(sample, Sample):
                    good.append(sample)
            for sample, encoded in zip(good, encode_many(good, encoder)):
                yield encoded if isinstance(encoded, DataError) else _row(sample, encoded, number)


def _image_fault(sample: Sample, source: Source, checked: set[str]) -> DataError | None:
    for image in sample.images:
        if image.path in checked:
            continue
        try:
            check_image(source.image_root, image.path)
        except DataError as error:
            return DataError(f"{sample.where}: {error}")
        checked.add(image.path)
    return None


def _row(sample: Sample, encoded: Encoded, source: int) -> dict[str, Any]:
    return {
        "id": sample.id,
        "place": sample.place,
        "source": source,
        "images": [image.path for image in sample.images],
        "input_ids": encoded.input_ids,
        "labels": encoded.labels,
        "length": len(encoded.input_ids),
        "supervised": sum(label != IGNORE for label in encoded.labels[1:]),
        "truncated": encoded.truncated,
    }


def _fault_list(faults: list[DataError], records: int) -> DataError:
    shown = [f"  {fault}" for fault in faults[:_SHOWN_FAULTS]]
    if len(faults) > _SHOWN_FAULTS:
        shown.append(f"  ... and {len(faults) - _SHOWN_FAULTS} more")
    return DataError(f"{len(faults)} of {records} records cannot be used\n" + "\n".join(shown))
