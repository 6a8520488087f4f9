"""Conversations as files: turns as JSON, pictures by where they came from, or as PNG files beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava_train.chat.pictures import PictureLimits, Source, is_url, read_picture
from llava_train.errors import DataError
from llava_train.files import inside, read_json, temporary_beside, write_json


@dataclass(frozen=True)
class View:
    """A picture of a conversation, RGB, and the path or URL it came from ("" for none that lasts)."""

    image: Image.Image
    path: str = ""
    url: str = ""


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and the pictures that were shown with the question."""

    question: str
    answer: str
    views: tuple[View, ...] = ()


def view(source: Source, limits: PictureLimits) -> View:
    """A picture with where it came from. Raises DataError."""
    image = read_picture(source, limits)
    if is_url(source):
        return View(image, url=str(source))
    if isinstance(source, Image.Image) or str(source)[:5].lower() == "data:":
        return View(image)
    return View(image, path=str(Path(source).expanduser().resolve()))


def write_conversation(path: Path, turns: Iterable[Turn], waiting: Iterable[View]) -> None:
    """Write `path`, and `<its stem>-<number>.png` beside it for pictures that came from memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: dict[str, View] = {}

    def entries(views: Iterable[View]) -> list[dict[str, str]]:
        return [_entry(each, path.stem, kept) for each in views]

    rows: list[dict[str, Any]] = []
    for turn in turns:
        rows.append({"role": "user", "text": turn.question, "images": entries(turn.views)})
        rows.append({"role": "assistant", "text": turn.answer})
    content = {"turns": rows, "waiting": entries(waiting)}
    for name, each in kept.items():
        _write_png(path.with_name(name), each.image)
    write_json(path, content)


def _entry(view: View, stem: str, kept: dict[str, View]) -> dict[str, str]:
    """A picture as the JSON has it; one from memory gets a name in `kept`."""
    where = {"url": view.url} if view.url else {"path": view.path}
    if not (view.url or view.path):
        where = {"file": f"{stem}-{len(kept) + 1}.png"}
        kept[where["file"]] = view
    return {**where, "sha256": _digest(view.image)}


def _write_png(path: Path, image: Image.Image) -> None:
    temporary = temporary_beside(path)
    try:
        image.save(temporary, "PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_conversation(path: Path, limits: PictureLimits) -> tuple[list[Turn], list[View]]:
    """Turns, and pictures that wait for the next question.

    Raises DataError for a file that is no conversation, and for a picture that is gone or has changed since.
    """
    content = read_json(path)
    try:
        rows, waiting = content["turns"], content["waiting"]
        asked, answered = rows[::2], rows[1::2]
        if [row["role"] for row in rows] != ["user", "assistant"] * len(answered):
            raise ValueError("questions and answers do not take turns")
        texts = [(_text(question, "text"), _text(answer, "text")) for question, answer in zip(asked, answered)]
        turns = [
            Turn(*each, tuple(_view(entry, path, limits) for entry in question["images"]))
            for each, question in zip(texts, asked)
        ]
        return turns, [_view(entry, path, limits) for entry in waiting]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: is no conversation that was saved here ({type(error).__name__}: {error})") from error


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise TypeError(f"{key} is no text")
    return str(row[key])


def _view(entry: dict[str, Any], path: Path, limits: PictureLimits) -> View:
    """The picture of an entry, as it was."""
    if "file" in entry:
        found = View(read_picture(inside(path.absolute().parent, _text(entry, "file")), limits))
    else:
        source: Source = _text(entry, "url") if "url" in entry else Path(_text(entry, "path"))
        if "url" in entry and not is_url(source):
            raise ValueError("a url is none")
        found = view(source, limits)
    if _digest(found.image) != entry["sha256"]:
        name = next(entry[key] for key in ("file", "url", "path") if key in entry)
        raise DataError(f"{name}: is another picture than when {path} was saved; put the old one back there")
    return found


def _digest(image: Image.Image) -> str:
    """Hex sha256 of what is seen, whatever file format it came in."""
    return hashlib.sha256(f"{image.width}x{image.height}\n".encode() + image.tobytes()).hexdigest()
