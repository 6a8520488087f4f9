"""Conversations of any spelling -> Sample: roles, texts with markers, content parts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from llava_train.data.records.references import pictures_of, reference, video_reference, videos_of
from llava_train.data.sample import IMAGE_MARKER, ImageRef, Role, Sample, Turn, shown
from llava_train.errors import RecordError

VIDEO_MARKER = "<video>"
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
_MARKER = re.compile(f"{IMAGE_MARKER}|{VIDEO_MARKER}")
_SPOKEN = list[tuple[Role, Any]]


def held(record: dict[str, Any], *keys: str) -> Any:
    """The first of the keys' values that is not null; a table gives every row every key."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def turn_list(value: Any) -> Any:
    """A list of turns; `datasets` stores some of them turned round, as a dict of lists."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, row)) for row in zip(*value.values())]
    return value


def where_of(record: dict[str, Any], place: str) -> tuple[str, str]:
    """`place (id ..)` and the id, which is the place where a record has none."""
    identity = next((record[key] for key in ("id", "__key__") if record.get(key) not in (None, "")), place)
    if not isinstance(identity, (str, int, float)):
        raise RecordError(f"{place}: an id must be text or a number, not {type(identity).__name__}", "malformed")
    try:
        str(identity).encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{place} (id {identity!a}): the id is not valid Unicode", "not_utf8") from error
    return f"{place} (id {shown(str(identity))})", str(identity)


def text_of(value: Any, where: str, turn: int | None = None) -> str:
    """A text; RecordError "not_text" for anything else."""
    if isinstance(value, str):
        return value
    told = "a question or answer must be text" if turn is None else f"turn {turn} must have a text 'value' or 'content'"
    raise RecordError(f"{where}: {told}, not {type(value).__name__}", "not_text")


def asked(identity: str, place: str, pictures: list[ImageRef], pairs: list[tuple[str, str]]) -> Sample:
    """A sample of questions and answers: pictures stand before the first question, each followed by a newline."""
    turns = []
    for index, (question, answer) in enumerate(pairs):
        front = [part for picture in pictures for part in (picture, "\n")] if index == 0 else []
        if front and not question:
            front = list(pictures)
        turns += [Turn("user", (*front, *([question] if question else []))), Turn("assistant", (answer,))]
    return Sample(identity, tuple(turns), place)


def conversation(record: dict[str, Any], place: str, turns: Any, loose_marker: bool = False) -> Sample:
    """A conversation; its contents are texts with markers, or lists of parts.

    `loose_marker`: pictures without any marker open the first turn.
    """
    where, identity = where_of(record, place)
    turns = turn_list(turns)
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"{where}: has no turns (they must be a list with at least one)", "no_turns")
    spoken: _SPOKEN = [_turn(turn, index, where) for index, turn in enumerate(turns)]
    system = record.get("system")
    if system and spoken[0][0] != "system":
        spoken.insert(0, ("system", text_of(system, where)))
    if spoken[0][0] == "assistant":
        spoken = spoken[1:]
    if any(isinstance(content, list) for _, content in spoken):
        return Sample(identity, _from_parts(record, spoken, where), place)
    return Sample(identity, _from_markers(record, spoken, where, loose_marker), place)


def _turn(turn: Any, index: int, where: str) -> tuple[Role, Any]:
    if not isinstance(turn, dict):
        raise RecordError(f"{where}: turn {index} must be an object, not {type(turn).__name__}", "malformed")
    said = held(turn, "from", "role")
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        told = shown(repr(said))
        raise RecordError(f"{where}: turn {index} is from {told}; expected human or gpt, user or assistant", "role")
    content = held(turn, "value", "content")
    if content is None:
        raise RecordError(f"{where}: turn {index} must have a text 'value' or 'content'", "missing_key")
    return role, content


_TEXT_PARTS = ("text", "input_text", "output_text")
_FILE_PARTS = {
    "image": ("image", "url", "path"),
    "image_url": ("image_url", "url"),
    "input_image": ("image_url",),
    "video": ("video", "url", "path"),
    "video_url": ("video_url", "url"),
}
"""Types of content parts and the keys that may name their file."""


def _from_parts(record: dict[str, Any], spoken: _SPOKEN, where: str) -> tuple[Turn, ...]:
    """OpenAI messages. A part `{"type": "image"}` without a place takes the next of the record's pictures (TRL)."""
    pictures, videos = pictures_of(record, where), videos_of(record, where)
    waiting = {"images": iter(pictures), "videos": iter(videos)}
    turns = []
    for role, content in spoken:
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        turns.append(Turn(role, _fronted([_part(part, waiting, where) for part in parts])))
    for name, files in waiting.items():
        left = len(list(files))
        if left:
            held_in_all = len({"images": pictures, "videos": videos}[name])
            message = f"{where}: {held_in_all - left} {name} in the messages but {held_in_all} {name}"
            raise RecordError(message, "marker_count")
    return tuple(turns)


def _fronted(parts: list[str | ImageRef]) -> tuple[str | ImageRef, ...]:
    """A single picture goes to the front, followed by a newline; several stay where they stand."""
    files = [part for part in parts if isinstance(part, ImageRef)]
    if len(files) != 1:
        return tuple(part for part in parts if part)
    words = "".join(part for part in parts if isinstance(part, str)).strip()
    return (files[0], *([f"\n{words}"] if words else []))


def _part(part: Any, waiting: dict[str, Iterator[ImageRef]], where: str) -> str | ImageRef:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXT_PARTS:
        return text_of(part.get("text"), where)
    if not isinstance(kind, str) or kind not in _FILE_PARTS:
        told = shown(repr(kind))
        raise RecordError(f"{where}: a content part of type {told}; expected text or image_url", "malformed")
    name = "videos" if kind.startswith("video") else "images"
    value = held(part, *_FILE_PARTS[kind])
    value = value["url"] if isinstance(value, dict) and "url" in value else value
    value = next(waiting[name], None) if value is None else value
    if value is None:
        raise RecordError(f"{where}: more {name} in the messages than the record's {name}", "marker_count")
    return reference(value, where, web=True) if name == "images" else video_reference(value, where)


def _from_markers(record: dict[str, Any], spoken: _SPOKEN, where: str, loose_marker: bool) -> tuple[Turn, ...]:
    read = [(role, text_of(content, where, index)) for index, (role, content) in enumerate(spoken)]
    pictures, videos = pictures_of(record, where), videos_of(record, where)
    text = "".join(content for _, content in read)
    marks = text.count(IMAGE_MARKER), text.count(VIDEO_MARKER)
    if loose_marker and marks == (0, 0) and read and not videos:
        user = next((index for index, (role, _) in enumerate(read) if role == "user"), 0)
        read[user] = (read[user][0], (IMAGE_MARKER + "\n") * len(pictures) + read[user][1])
    elif videos and marks[1] == 0 and marks[0] == len(videos) + len(pictures):
        pictures, videos = [*pictures, *videos], []  # older video sets write <image> for their video
    else:
        _count(IMAGE_MARKER, marks[0], len(pictures), "images", where)
        _count(VIDEO_MARKER, marks[1], len(videos), "videos", where)
    files = {IMAGE_MARKER: iter(pictures), VIDEO_MARKER: iter(videos)}
    return tuple(Turn(role, _split(content, files)) for role, content in read)


def _count(marker: str, marks: int, files: int, name: str, where: str) -> None:
    if marks != files:
        raise RecordError(f"{where}: {marks} {marker} markers in the text but {files} {name}", "marker_count")


def _split(text: str, files: dict[str, Iterator[ImageRef]]) -> tuple[str | ImageRef, ...]:
    """Text with markers -> parts."""
    marks = _MARKER.findall(text)
    if not marks:
        return (text,)
    pieces = _MARKER.split(text)
    parts: list[str | ImageRef] = [pieces[0]]
    for mark, piece in zip(marks, pieces[1:]):
        parts += [next(files[mark]), piece]
    return _fronted(parts)
