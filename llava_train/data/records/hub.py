"""Datasets of the Hugging Face hub: `datasets` fetches and caches them, we read the cache in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_train.errors import DataError

_SAVED = ("dataset_dict.json", "state.json")


def hub_files(name: str, subset: str | None, split: str) -> list[str]:
    """Arrow files of a split of a dataset: a hub id, or a folder that `load_dataset` or `load_from_disk` understands.

    Code that a dataset repository may carry is never run. Raises DataError with the library's message, and for a
    part of a split ("train[:10%]"), whose files hold the whole.
    """
    told = f"hub: {name} (subset {subset}, split {split})"
    if "[" in split:
        raise DataError(f"{told}: names a part of a split; name the whole one, and set cap for less of it")
    try:
        found = _load(name, subset, split)
    except Exception as error:  # the library raises many types: not found, no such split, no network, bad files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{told}: cannot be loaded: {reason}") from error
    files = [str(entry["filename"]) for entry in found.cache_files]
    if not files or not len(found):
        raise DataError(f"{told}: is empty")
    return files


def _load(name: str, subset: str | None, split: str) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk

    if not any((Path(name) / saved).is_file() for saved in _SAVED):
        return load_dataset(name, subset, split=split)
    found = load_from_disk(name)
    return found[split] if isinstance(found, DatasetDict) else found
