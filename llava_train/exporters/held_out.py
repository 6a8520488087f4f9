"""What an export costs on records that the model was not trained on: loss and exact match, before and after.

The loss is the mean negative log-likelihood of the last answer's tokens (nats), which says something of answers of any
length. Exact match is that of `llava-train evaluate`; it is measured where the answers are short enough for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from llava_train.data.batch import ImageReader, batch_of
from llava_train.data.collate import pad
from llava_train.data.encode import expand, with_markers
from llava_train.data.pictures.media import Media
from llava_train.data.pictures.shapes import Picture
from llava_train.data.reading import read_samples
from llava_train.data.sample import Sample
from llava_train.data.templates.template import portable
from llava_train.errors import LlavaTrainError, RecordError
from llava_train.evaluation.metrics import exact_match
from llava_train.evaluation.run import answers_to, messages_of, samples_of
from llava_train.exporters.quantize import to_precision
from llava_train.inference import Message, render, shape_of, stop_ids
from llava_train.model.assemble import Assembly
from llava_train.model.families.table import family_of
from llava_train.recipe import Recipe, load_recipe
from llava_train.training.material import Prepared, prepare, sources_of
from llava_train.training.objective import token_losses

LIMIT = 500
SHORT_WORDS = 5
"""Answers of more words on average are hardly ever matched exactly."""
_BATCH = 16


@dataclass(frozen=True)
class HeldOut:
    """Records to measure on: what they are called, and the samples of each source with how it reads its pictures."""

    data: str
    sources: tuple[tuple[Media, tuple[Sample, ...]], ...]

    @property
    def samples(self) -> list[Sample]:
        """All of them."""
        return [sample for _, samples in self.sources for sample in samples]


def find(
    model: str | Path, data: str | Path | None = None, image_root: str | Path | None = None, limit: int = LIMIT
) -> HeldOut | str:
    """The records to measure on, or why there are none.

    Args:
        model: what is exported; a run brings its own held-out records.
        data: a file of records, taken before the run's own.
        image_root: folder that its image paths start from; the file's own by default.
        limit: records at most: the first of `data`; of a run's own as many from all over them.

    Raises DataError: a record of `data` that cannot be used, named.
    """
    if data is not None:
        media = Media(Path(image_root) if image_root is not None else Path(data).parent)
        return HeldOut(Path(data).name, ((media, tuple(samples_of(str(data), media, limit))),))
    file = Path(model) / "recipe.yaml"
    if not file.is_file():
        return "no held-out records: give --held-out FILE"
    try:
        recipe = load_recipe(file)
        if not recipe.data.validation and not recipe.data.validation_fraction:
            return "the run held no records out: give --held-out FILE"
        return HeldOut(f"held out by {file.parent.name}", _own(recipe, prepare(recipe), limit))
    except LlavaTrainError as error:
        return f"the run's held-out records cannot be read ({error}): give --held-out FILE"


def _own(recipe: Recipe, prepared: Prepared, limit: int) -> tuple[tuple[Media, tuple[Sample, ...]], ...]:
    """A run's own, read again from their files: a prepared set holds ids, not words."""
    assert prepared.validation is not None
    rows = prepared.validation_rows
    taken = rows[np.linspace(0, len(rows) - 1, min(limit, len(rows))).astype(int)]
    places = {prepared.validation.place(row) for row in taken}
    found = []
    for source in sources_of(recipe, recipe.data.validation or recipe.data.train):
        records = (each for file in source.files for each in read_samples(file, source.media, source.format))
        bar = tqdm(records, desc="find what was held out", unit=" records", delay=2)
        samples = tuple(each for each in bar if isinstance(each, Sample) and each.place in places)
        found.append((source.media, samples))
    return tuple(found)


def measure(assembly: Assembly, held: HeldOut) -> dict[str, Any]:
    """Loss and, where answers are short, exact match of a model, wherever it lies and however it was loaded."""
    started = time.perf_counter()
    truths = [sample.turns[-1].text for sample in held.samples]
    result: dict[str, Any] = {"records": len(truths), "loss": _loss(assembly, held)}
    if sum(len(truth.split()) for truth in truths) <= SHORT_WORDS * len(truths):
        answers: list[str] = []
        for media, samples in held.sources:
            answers += answers_to(assembly, samples, [each.images for each in samples], media, _BATCH, 32)
        result["exact_match"] = exact_match(answers, truths)
    return {**result, "seconds": round(time.perf_counter() - started, 2)}


def cost(assembly: Assembly, held: HeldOut | str, before: dict[str, Any] | None) -> dict[str, Any]:
    """What a report says of rounding a model: `held_out`, or None with the reason.

    Args:
        assembly: the model as it was written, in whatever precision; it is brought to float32, so that both figures
            are computed alike and only the weights differ.
        held: what `find` gave.
        before: what `measure` gave before it was rounded.
    """
    if isinstance(held, str) or before is None:
        return {"held_out": None, "held_out_reason": held}
    to_precision(assembly.model, torch.float32)
    after = measure(assembly, held)
    name = "exact_match" if "exact_match" in before else "loss"
    worse = after["loss"] - before["loss"]
    return {
        "held_out": {
            "data": held.data,
            "records": before["records"],
            "metric": name,
            "before": before[name],
            "after": after[name],
            "drop": before[name] - after[name] if name == "exact_match" else worse,  # positive: it got worse
            "loss": {"before": before["loss"], "after": after["loss"], "rise": worse},
            "seconds": round(before["seconds"] + after["seconds"], 2),
        }
    }


class _Row(NamedTuple):
    input_ids: np.ndarray
    labels: np.ndarray


def _loss(assembly: Assembly, held: HeldOut) -> float:
    reader = ImageReader(shape_of(assembly.spec, assembly.image_processor))
    pad_id = int(assembly.tokenizer.pad_token_id or 0)
    pairs = [(sample, media) for media, samples in held.sources for sample in samples]
    pairs.sort(key=lambda pair: sum(len(turn.text) for turn in pair[0].turns))  # so that little is padded
    total, tokens = 0.0, 0
    with tqdm(total=len(pairs), desc="held-out loss", unit=" records", delay=2) as bar:
        for start in range(0, len(pairs), _BATCH):
            chosen = pairs[start : start + _BATCH]
            pictures = [_pictures(reader, sample, media) for sample, media in chosen]
            rows = [_row(assembly, sample, own) for (sample, _), own in zip(chosen, pictures)]
            losses = _losses(assembly, rows, [picture for own in pictures for picture in own], pad_id)
            total, tokens = total + float(losses.sum()), tokens + len(losses)
            bar.update(len(chosen))
    return total / tokens


def _pictures(reader: ImageReader, sample: Sample, media: Media) -> list[Picture]:
    try:
        return reader.read(sample.images, media)
    except RecordError as error:
        raise error.of(sample.where) from error


def _losses(assembly: Assembly, rows: list[_Row], pictures: list[Picture], pad_id: int) -> torch.Tensor:
    model = assembly.model
    batch = batch_of(pad(rows, [1.0] * len(rows), pad_id), pictures, (), {}).to(model.device)
    if batch.pixel_values is not None:
        batch = replace(batch, pixel_values=batch.pixel_values.to(model.dtype))
    with torch.inference_mode():
        return token_losses(model, batch).float()


def _row(assembly: Assembly, sample: Sample, pictures: Sequence[Picture]) -> _Row:
    """Ids of the whole conversation; labels where its last answer stands, up to the token that ends it."""
    messages, family = messages_of(sample), family_of(assembly.model)
    prompt, whole = render(assembly, messages[:-1]), _whole(assembly, messages)
    begun = next((place for place, (one, two) in enumerate(zip(prompt, whole)) if one != two), len(prompt))
    encoded = assembly.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, stops = encoded["input_ids"], stop_ids(assembly)
    first = sum(end <= begun for _, end in encoded["offset_mapping"])
    # Some templates write a newline behind that token, which nobody learns.
    last = next((place for place in range(first, len(ids)) if ids[place] in stops), len(ids) - 1)
    marker = int(assembly.tokenizer.convert_tokens_to_ids(family.image_token))
    tokens = [picture.tokens for picture in pictures]
    return _Row(*expand(np.asarray(ids), np.array([[first, last + 1]]), tokens, marker))


def _whole(assembly: Assembly, messages: Sequence[Message]) -> str:
    template, family = portable(assembly.template), family_of(assembly.model)
    text = assembly.tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False)
    return with_markers(str(text), family.marker, family.line_end)
