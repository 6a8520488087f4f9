"""Evaluate a model folder on records: each record's last answer is the truth, what stands before it the question."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_train.data.batch import ImageReader
from llava_train.data.pictures.media import Media, name_of
from llava_train.data.reading import read_samples
from llava_train.data.sample import ImageRef, Sample, Turn
from llava_train.errors import RecordError
from llava_train.evaluation.metrics import constant_accuracy, exact_match, normalize
from llava_train.inference import Prompt, answer, message, shape_of
from llava_train.model.assemble import Assembly
from llava_train.model.checkpoint import load_model


@dataclass(frozen=True)
class Evaluation:
    """Figures and the answers behind them, one row a record: `id, question, answer, truth, correct, image`."""

    figures: dict[str, Any]
    rows: list[dict[str, Any]]


def evaluate(
    model: str | Path | Assembly,
    data: str | Path,
    image_root: str | Path | None = None,
    *,
    shuffle_images: bool = False,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    limit: int | None = None,
) -> Evaluation:
    """Greedy answers to every record of a file, counted by exact match.

    Args:
        model: a model folder, or one that `load_model` gave.
        data: records of any known format.
        image_root: folder that image paths start from; the file's own by default.
        shuffle_images: give every question the picture of another, drawn with a fixed seed: what is left of
            the accuracy needs no picture.
        limit: only the first records.

    Raises:
        DataError: a record or image that cannot be used, named.
    """
    assembly = model if isinstance(model, Assembly) else load_model(model)
    media = Media(Path(image_root) if image_root is not None else Path(data).parent)
    samples = samples_of(str(data), media, limit)
    images = [sample.images for sample in samples]
    if shuffle_images:
        images = _shuffled(images)
    started = time.perf_counter()
    answers = answers_to(assembly, samples, images, media, batch_size, max_new_tokens)
    truths = [sample.turns[-1].text for sample in samples]
    questions = [_question(sample) for sample in samples]
    figures = {
        "records": len(samples),
        "exact_match": exact_match(answers, truths),
        "constant_accuracy": constant_accuracy(questions, truths),
        "shuffled_images": shuffle_images,
        "seconds": round(time.perf_counter() - started, 2),
    }
    rows = [
        {
            "id": sample.id,
            "question": question.strip(),
            "answer": given,
            "truth": truth,
            "correct": normalize(given) == normalize(truth),
            "image": name_of(shown[0], media) if shown else None,
        }
        for sample, question, given, truth, shown in zip(samples, questions, answers, truths, images)
    ]
    return Evaluation(figures, rows)


def samples_of(path: str, media: Media, limit: int | None) -> list[Sample]:
    """The first records of a file, all of them without a limit. Raises DataError for one that cannot be used."""
    samples: list[Sample] = []
    for sample in read_samples(path, media):
        if isinstance(sample, RecordError):
            raise sample
        samples.append(sample)
        if limit is not None and len(samples) == limit:
            break
    return samples


def _shuffled(images: list[tuple[ImageRef, ...]]) -> list[tuple[ImageRef, ...]]:
    """Pictures dealt anew among the records that have as many."""
    shuffled = list(images)
    for count in {len(shown) for shown in images}:
        places = [index for index, shown in enumerate(images) if len(shown) == count]
        dealt = places.copy()
        random.Random(0).shuffle(dealt)
        for place, source in zip(places, dealt):
            shuffled[place] = images[source]
    return shuffled


def _question(sample: Sample) -> str:
    return "\n".join(turn.text for turn in sample.turns[:-1])


def answers_to(
    assembly: Assembly,
    samples: Sequence[Sample],
    images: Sequence[Sequence[ImageRef]],
    media: Media,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to what stands before the last answer of each sample, with these pictures."""
    reader = ImageReader(shape_of(assembly.spec, assembly.image_processor))
    answers = [""] * len(samples)
    # Prompts of like length share a batch, so little is padded.
    order = sorted(range(len(samples)), key=lambda index: sum(len(turn.text) for turn in samples[index].turns[:-1]))
    with tqdm(total=len(samples), desc="evaluate", unit=" records", delay=2) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            prompts = [Prompt(messages_of(samples[i])[:-1], tuple(reader.read(images[i], media))) for i in chosen]
            for index, text in zip(chosen, answer(assembly, prompts, max_new_tokens)):
                answers[index] = text
            bar.update(len(chosen))
    return answers


def messages_of(sample: Sample) -> tuple[dict[str, Any], ...]:
    """A sample as chat messages."""
    return tuple(message(turn.role, *_asked(turn)) for turn in sample.turns)


def _asked(turn: Turn) -> tuple[str, int]:
    """The words of a turn without the newline behind each picture, which the template writes, and its pictures."""
    said, pictures = "", 0
    for before, part in zip(("", *turn.parts), turn.parts):
        if isinstance(part, str):
            said += part if isinstance(before, str) else part.removeprefix("\n")
        else:
            pictures += 1
    return said, pictures
