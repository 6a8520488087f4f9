"""Datasets of the Hugging Face hub: `datasets` fetches and caches them, we read the cache in place."""

from __future__ import annotations

from llava_train.errors import DataError


def hub_files(name: str, subset: str | None, split: str) -> list[str]:
    """Arrow files of a split of a dataset (a hub id, or a folder that `load_dataset` understands).

    Code that a dataset repository may carry is never run. Raises DataError with the library's message.
    """
    from datasets import Dataset, load_dataset

    try:
        found = load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises many types: not found, no such split, no network, bad files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"hub: {name} (subset {subset}, split {split}): cannot be loaded: {reason}") from error
    assert isinstance(found, Dataset)
    files = [entry["filename"] for entry in found.cache_files]
    if not files:
        raise DataError(f"hub: {name}: split {split} is empty")
    return files
