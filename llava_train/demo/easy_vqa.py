"""The `easy-vqa` package (MIT) as LLaVA-JSON records.

`easy-vqa` ships 4,000 + 1,000 pictures of one coloured shape and 48,248 questions about them, so the demo needs no
download. Its official train split gives captions and question-answer turns, its official test split gives the
questions that are scored. Everything said about a training picture is derived from its *training* questions.

    records = caption_records()          # [{"id", "image", "conversations": [...]}, ...]
    folder = image_folder("train")       # what `image` is relative to
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "test"]
Record = dict[str, Any]

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

CAPTION_PROMPTS = (
    "Describe the image.",
    "Describe the image briefly.",
    "What does the image show?",
    "What is in the image?",
)
CAPTION_FORMS = (
    "a {} {}",
    "There is a {} {}.",
    "The image shows a {} {}.",
    "A {} {} on a light background.",
)


@dataclass(frozen=True)
class Question:
    """One question of the package about one picture."""

    image_id: int
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """What the questions about one picture reveal; `None` is unknown."""

    shape: str | None
    color: str | None

    @property
    def complete(self) -> bool:
        """Both are known."""
        return self.shape is not None and self.color is not None

    @property
    def empty(self) -> bool:
        """Neither is known."""
        return self.shape is None and self.color is None

    def caption(self, form: str = CAPTION_FORMS[0]) -> str:
        """The scene in words: "a blue circle", "a red shape" (shape unknown), "a circle" (colour unknown)."""
        if self.empty:
            raise ValueError("nothing is known about this scene, so there is no caption for it")
        return form.format(self.color or "", self.shape or "shape").replace("  ", " ")


def image_folder(split: Split) -> Path:
    """The folder of the installed package that holds the pictures of `split` as `<image_id>.png`."""
    paths = _package().get_train_image_paths() if split == "train" else _package().get_test_image_paths()
    return Path(next(iter(paths.values()))).parent


def questions(split: Split) -> list[Question]:
    """All questions of `split`, in the package's order: 38,575 (train) or 9,673 (test)."""
    columns = _package().get_train_questions() if split == "train" else _package().get_test_questions()
    return [Question(image_id, text, answer) for text, answer, image_id in zip(*columns)]


def by_image(items: Iterable[Question]) -> dict[int, list[Question]]:
    """Questions grouped by picture, both in order of first appearance."""
    groups: dict[int, list[Question]] = {}
    for item in items:
        groups.setdefault(item.image_id, []).append(item)
    return groups


def scene_of(items: Iterable[Question]) -> Scene:
    """What the questions and answers about one picture say of its shape and colour."""
    shapes, colors = set(SHAPES), set(COLORS)
    for item in items:
        _narrow(shapes, item)
        _narrow(colors, item)
    return Scene(*(next(iter(left)) if len(left) == 1 else None for left in (shapes, colors)))


def caption_records(seed: int = 0) -> list[Record]:
    """One caption per training picture of which something is known, in seeded random wording (stage 1)."""
    rng = random.Random(seed)
    records = []
    for image_id, items in by_image(questions("train")).items():
        scene = scene_of(items)
        prompt, form = rng.choice(CAPTION_PROMPTS), rng.choice(CAPTION_FORMS)
        if not scene.empty:
            records.append(_record(f"train-{image_id}-caption", image_id, [(prompt, scene.caption(form))]))
    return records


def train_records(turns: int = 1, limit: int | None = None, seed: int = 0) -> list[Record]:
    """The training questions in seeded random order, `turns` per record, at most `limit` per picture (stage 2).

    Later turns of one record can be answered from earlier ones without looking, so `turns=1` teaches the most
    about the picture per turn; several turns share the cost of encoding it.
    """
    rng = random.Random(seed)
    records = []
    for image_id, items in by_image(questions("train")).items():
        chosen = rng.sample(items, min(limit or len(items), len(items)))
        for start in range(0, len(chosen), turns):
            pairs = [(item.text, item.answer) for item in chosen[start : start + turns]]
            records.append(_record(f"train-{image_id}-{start}", image_id, pairs))
    rng.shuffle(records)
    return records


def test_records() -> list[Record]:
    """The official test split, one question per record, in the package's order."""
    return [
        _record(f"test-{item.image_id}-{number}", item.image_id, [(item.text, item.answer)])
        for number, item in enumerate(questions("test"))
    ]


def _record(name: str, image_id: int, pairs: list[tuple[str, str]]) -> Record:
    turns = []
    for number, (prompt, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": prompt if number else f"<image>\n{prompt}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": f"easy-vqa-{name}", "image": f"{image_id}.png", "conversations": turns}


def _narrow(left: set[str], item: Question) -> None:
    """Drop from `left` (the shapes or the colours still possible) what this question and its answer exclude."""
    words = re.findall(r"[a-z]+", item.text)
    named = left.intersection([item.answer] if item.answer in left else words)
    if not named:
        return
    negated = "no" in words or "not" in words
    if item.answer in ("yes", "no") and (item.answer == "yes") == negated:
        left.difference_update(named)
    else:
        left.intersection_update(named)


def _package() -> Any:
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError(
            "the demo's pictures and questions come from the package easy-vqa: pip install easy-vqa"
        ) from error
    return easy_vqa
