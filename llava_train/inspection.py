"""See what a recipe trains on: each record's tokens, which of them are supervised, where its images stand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_train.data.encode import IGNORE, Encoder, encode
from llava_train.data.formats import read_samples
from llava_train.errors import DataError
from llava_train.recipe import Recipe
from llava_train.training.material import encoder_of

_GREEN, _DIM, _PLAIN = "\033[32m", "\033[2m", "\033[0m"


def inspect(recipe: Recipe, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """For each training record in order: `id, input_ids, labels, image_token_id, image_tokens`.

    Labels are unshifted, -100 where unsupervised. Raises DataError at the first record that cannot be used.
    """
    encoder, _ = encoder_of(recipe)
    for number, sample in enumerate(
        s for source in recipe.data.train for s in read_samples(Path(source.path), source.format)
    ):
        if limit is not None and number == limit:
            return
        if isinstance(sample, DataError):
            raise sample
        encoded = encode(sample, encoder)
        yield {
            "id": sample.id,
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "image_token_id": encoder.image_token_id,
            "image_tokens": encoder.image_tokens,
        }


def coloured(row: dict[str, Any], encoder: Encoder) -> str:
    """A record for the terminal: supervised text green, the rest dim, each image as one block."""
    pieces = [f"{row['id']}: {len(row['input_ids'])} tokens, {sum(x != IGNORE for x in row['labels'])} supervised\n"]
    for supervised, ids in _runs(row):
        text = encoder.tokenizer.decode(_without_images(ids, row["image_token_id"]), skip_special_tokens=False)
        images = ids.count(row["image_token_id"]) // max(1, row["image_tokens"])
        block = f"[image x{images}: {row['image_tokens']} tokens each]" if images else ""
        pieces.append(f"{_GREEN if supervised else _DIM}{block}{text}{_PLAIN}")
    return "".join(pieces)


def _runs(row: dict[str, Any]) -> Iterator[tuple[bool, list[int]]]:
    start = 0
    labels, ids = row["labels"], row["input_ids"]
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == IGNORE) != (labels[start] == IGNORE) or _border(ids, end, row):
            yield labels[start] != IGNORE, ids[start:end]
            start = end


def _border(ids: list[int], at: int, row: dict[str, Any]) -> bool:
    image = row["image_token_id"]
    return (ids[at] == image) != (ids[at - 1] == image)


def _without_images(ids: list[int], image_token_id: int) -> list[int]:
    return [token for token in ids if token != image_token_id]
