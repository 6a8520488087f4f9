"""Record formats: a function a format, from one parsed record to a Sample; and the reading of the files.

A new format is a function with `@FORMATS.register("name")`; `detect` says which one a file holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llava_train.data.sample import ImageRef, Role, Sample, Turn
from llava_train.errors import DataError
from llava_train.files import read_json
from llava_train.registry import Registry

Parse = Callable[[Any, str], Sample]
FORMATS: Registry[Parse] = Registry("data format")

IMAGE_MARKER = "<image>"
_LLAVA_ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_LLAVA_ROLES["system"] = "system"


@FORMATS.register("llava")
def parse_llava(record: Any, place: str) -> Sample:
    """LLaVA JSON: `{"id", "image": "a.png" | [..], "conversations": [{"from", "value"}, ..]}`.

    As the original does (`llava/train/train.py`, preprocess_multimodal): an opening answer without a
    question is dropped, and the `<image>` of a turn is moved to its front, followed by a newline.
    Several images in one turn stay where they stand.

    Raises DataError naming `place` for missing keys, unknown roles, or markers that do not match images.
    """
    if not isinstance(record, dict):
        raise DataError(f"{place}: a record must be an object, not {type(record).__name__}")
    identity = str(record.get("id", place))
    where = f"{place} (id {identity})"
    conversations = record.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise DataError(f"{where}: has no turns ('conversations' must be a list with at least one turn)")
    paths = _image_paths(record, where)
    turns = [_llava_turn(turn, index, where) for index, turn in enumerate(conversations)]
    if turns[0][0] == "assistant":
        turns = turns[1:]
    marks = sum(text.count(IMAGE_MARKER) for _, text in turns)
    if marks != len(paths):
        raise DataError(f"{where}: {marks} {IMAGE_MARKER} markers in the text but {len(paths)} images")
    images = iter(paths)
    return Sample(identity, tuple(Turn(role, _split(text, images)) for role, text in turns), place)


def _image_paths(record: dict[str, Any], where: str) -> list[str]:
    image = record.get("image")
    paths = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(path, str) and path for path in paths):
        raise DataError(f"{where}: 'image' must be a path or a list of paths")
    return paths


def _llava_turn(turn: Any, index: int, where: str) -> tuple[Role, str]:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise DataError(f"{where}: turn {index} must be an object with a text 'value'")
    role = _LLAVA_ROLES.get(str(turn.get("from")))
    if role is None:
        raise DataError(f"{where}: turn {index} is from {turn.get('from')!r}; expected human or gpt")
    return role, turn["value"]


def _split(text: str, images: Iterator[str]) -> tuple[str | ImageRef, ...]:
    """Text with markers -> parts. A single image goes to the front, followed by a newline."""
    pieces = text.split(IMAGE_MARKER)
    if len(pieces) == 1:
        return (text,)
    if len(pieces) == 2:
        return (ImageRef(next(images)), "\n" + "".join(pieces).strip())
    parts: list[str | ImageRef] = []
    for index, piece in enumerate(pieces):
        if index:
            parts.append(ImageRef(next(images)))
        if piece:
            parts.append(piece)
    return tuple(parts)


def read_records(path: Path) -> Iterator[tuple[Any, str]]:
    """Each record of a JSON list or JSONL file with its place ("file.json[3]", "file.jsonl:4")."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".jsonl":
        yield from _read_lines(path)
        return
    records = read_json(path)
    if not isinstance(records, list):
        raise DataError(f"{path}: must hold a list of records, not {type(records).__name__}")
    if not records:
        raise DataError(f"{path}: holds no record")
    for index, record in enumerate(records):
        yield record, f"{path}[{index}]"


def _read_lines(path: Path) -> Iterator[tuple[Any, str]]:
    empty = True
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if not raw.strip():
                continue
            empty = False
            try:
                yield json.loads(raw.decode("utf-8-sig")), f"{path}:{number}"
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 (byte {error.start} of the line)") from error
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}:{error.colno}: not JSON: {error.msg}") from error
    if empty:
        raise DataError(f"{path}: holds no record")


def detect(record: Any, place: str) -> str:
    """The format of a file by its first record; DataError lists what is known."""
    if isinstance(record, dict) and "conversations" in record:
        return "llava"
    keys = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
    raise DataError(f"{place}: format not recognised (found {keys}); known formats: {', '.join(FORMATS)}")


def read_samples(path: Path, name: str = "auto") -> Iterator[Sample | DataError]:
    """Each record of a file as a Sample, or as the DataError that says what is wrong with it."""
    parse: Parse | None = None if name == "auto" else FORMATS[name]
    for record, place in read_records(path):
        parse = parse or FORMATS[detect(record, place)]
        try:
            yield parse(record, place)
        except DataError as error:
            yield error
