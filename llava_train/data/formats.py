"""Record formats: a function a format, from one parsed record to a Sample.

A new format is a function with `@format_row(name, title, matches)`; `detect` takes the first row that matches.
Whatever a picture is in the record (a path, a URL, a cell of a table, bytes), here it becomes an ImageRef.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llava_train.data.sample import IMAGE_MARKER, ImageRef, Role, Sample, Turn
from llava_train.errors import DataError, RecordError
from llava_train.registry import Registry

Parse = Callable[[dict[str, Any], str], Sample]


@dataclass(frozen=True)
class Format:
    """A row: what it is called in messages, how a record shows that it is one, and how it is read."""

    title: str
    matches: Callable[[dict[str, Any]], bool]
    parse: Parse


FORMATS: Registry[Format] = Registry("data format")
VIDEO_MARKER = "<video>"
_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
_MARKER = re.compile(f"{IMAGE_MARKER}|{VIDEO_MARKER}")
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


def format_row(name: str, title: str, matches: Callable[[dict[str, Any]], bool]) -> Callable[[Parse], Parse]:
    """Decorator that makes a parse function a row of FORMATS."""

    def add(parse: Parse) -> Parse:
        FORMATS.register(name)(Format(title, matches, parse))
        return parse

    return add


def detect(record: Any, place: str) -> str:
    """The format of a file by its first record; DataError lists what is known."""
    if isinstance(record, dict):
        for name in FORMATS:
            if FORMATS[name].matches(record):
                return name
    keys = ", ".join(sorted(map(str, record))) if isinstance(record, dict) else type(record).__name__
    raise DataError(f"{place}: format not recognised (found {keys}); known formats: {', '.join(FORMATS)}")


def parse_record(name: str, record: Any, place: str) -> Sample:
    """The Sample of a record; RecordError says what is wrong with it, whatever it is."""
    if isinstance(record, RecordError):
        raise record
    if not isinstance(record, dict):
        raise RecordError(f"{place}: a record must be an object, not {type(record).__name__}", "not_an_object")
    for value in record.values():
        if isinstance(value, RecordError):
            raise value
    try:
        return FORMATS[name].parse(record, place)
    except RecordError:
        raise
    except Exception as error:  # a record may hold anything anywhere; none of it may end the run
        raise RecordError(
            f"{place}: cannot be read as {name} ({type(error).__name__}: {error})", "malformed"
        ) from error


def _has_list(record: dict[str, Any], key: str) -> bool:
    return isinstance(record.get(key), list)


def _first(record: dict[str, Any], key: str) -> dict[str, Any]:
    turns = record.get(key)
    return turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}


@format_row(
    "preference",
    "preference pairs (chosen/rejected)",
    lambda record: "chosen" in record and "rejected" in record,
)
def parse_preference(record: dict[str, Any], place: str) -> Sample:
    """`{"chosen", "rejected"}` as two answers or two conversations that differ in the last answer.

    The question stands in `prompt`, `question` or `conversations`, or in both conversations alike
    (the layouts of RLAIF-V, LLaVA-Hound, LLaMA-Factory and TRL).
    """
    where, identity = _where(record, place)
    chosen, rejected = _answer(record["chosen"], where), _answer(record["rejected"], where)
    before: list[Any] = []
    for key in ("conversations", "messages", "prompt", "question"):
        if record.get(key):
            value = record[key]
            before = value if isinstance(value, list) else [{"role": "user", "content": value}]
            break
    else:
        if isinstance(record["chosen"], list):
            before = record["chosen"][:-1]
            if before != record["rejected"][:-1]:
                raise RecordError(f"{where}: chosen and rejected differ before the last answer", "malformed")
    turns = [*before, {"role": "assistant", "content": chosen}]
    sample = _conversation(record, place, turns, loose_marker=True)
    return Sample(identity, sample.turns, place, rejected)


def _answer(value: Any, where: str) -> str:
    last = value[-1] if isinstance(value, list) and value else value
    if isinstance(last, dict):
        last = last.get("content", last.get("value"))
    if isinstance(last, list) and len(last) == 1 and isinstance(last[0], dict):
        last = last[0].get("text")
    if not isinstance(last, str):
        raise RecordError(f"{where}: an answer must be text", "not_text")
    return last


@format_row(
    "llava",
    "LLaVA conversations (from/value)",
    lambda record: _has_list(record, "conversations") and "role" not in _first(record, "conversations"),
)
def parse_llava(record: dict[str, Any], place: str) -> Sample:
    """LLaVA JSON: `{"id", "image": "a.png" | [..], "conversations": [{"from", "value"}, ..]}`; `video` alike.

    As the original does (`llava/train/train.py`, preprocess_multimodal): an opening answer without a
    question is dropped, and the `<image>` of a turn is moved to its front, followed by a newline.
    Several images in one turn stay where they stand.
    """
    return _conversation(record, place, record.get("conversations"))


@format_row(
    "sharegpt",
    "ShareGPT conversations (role/content)",
    lambda record: (
        "role" in _first(record, "conversations")
        or ("role" in _first(record, "messages") and not any(map(_has_parts, record["messages"])))
    ),
)
def parse_sharegpt(record: dict[str, Any], place: str) -> Sample:
    """`conversations` or `messages` of `{"role", "content"}`, `system` as a turn or a key, `images`, `videos`."""
    return _conversation(record, place, record.get("conversations", record.get("messages")))


def _has_parts(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("content"), list)


@format_row("openai", "OpenAI messages (content parts)", lambda record: "role" in _first(record, "messages"))
def parse_openai(record: dict[str, Any], place: str) -> Sample:
    """`messages` whose content is text or parts: `text`, `image_url` (a path, file://, data: or http(s)), `image`.

    A part `{"type": "image"}` without a place takes the next of the record's `images` (TRL's layout).
    """
    where, identity = _where(record, place)
    waiting = iter(_pictures(record, where))
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RecordError(f"{where}: has no turns ('messages' must be a list with at least one)", "no_turns")
    turns = []
    for index, message in enumerate(messages):
        role, content = _turn(message, index, where)
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        turns.append(Turn(role, tuple(_part(part, waiting, where) for part in parts)))
    if next(waiting, None) is not None:
        raise RecordError(f"{where}: holds more images than its messages show", "marker_count")
    return Sample(identity, tuple(turns), place)


def _part(part: Any, waiting: Iterator[ImageRef], where: str) -> str | ImageRef:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text") and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in ("image_url", "image", "input_image"):
        value = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key)), None)
        value = value.get("url") if isinstance(value, dict) and "url" in value else value
        if value is None:
            value = next(waiting, None)
            if value is None:
                raise RecordError(f"{where}: its messages show more images than it holds", "marker_count")
        return _reference(value, where, web=True)
    raise RecordError(f"{where}: a content part of type {kind!r}; expected text or image_url", "malformed")


@format_row(
    "cauldron",
    "question and answer turns (texts: user/assistant)",
    lambda record: "user" in _first(record, "texts"),
)
def parse_cauldron(record: dict[str, Any], place: str) -> Sample:
    """`{"images", "texts": [{"user", "assistant"}, ..]}` (The Cauldron, FineVision): pictures open the first turn."""
    where, identity = _where(record, place)
    pairs = [(_text(pair.get("user"), where), _text(pair.get("assistant"), where)) for pair in record["texts"]]
    return _asked(identity, place, _pictures(record, where), pairs)


@format_row(
    "video_chatgpt",
    "Video-ChatGPT (q/a/video_id)",
    lambda record: {"q", "a", "video_id"} <= set(record),
)
def parse_video_chatgpt(record: dict[str, Any], place: str) -> Sample:
    """`{"q", "a", "video_id"}` of VideoInstruct-100K; the file is `video_id` with the suffix that is there."""
    where, identity = _where(record, place)
    video = ImageRef(_text(record["video_id"], where), "frame")
    return _asked(identity, place, [video], [(_text(record["q"], where), _text(record["a"], where))])


@format_row(
    "vqa",
    "question and answer",
    lambda record: "question" in record and ("answer" in record or "answers" in record),
)
def parse_vqa(record: dict[str, Any], place: str) -> Sample:
    """`{"image", "question", "answer"}`, e.g. VQA-RAD; of several `answers` the first."""
    where, identity = _where(record, place)
    answer = record.get("answer", record.get("answers"))
    answer = answer[0] if isinstance(answer, list) and answer else answer
    return _asked(identity, place, _pictures(record, where), [(_text(record["question"], where), _text(answer, where))])


_CAPTION_KEYS = ("caption", "text", "txt", "blip_caption")


@format_row(
    "caption",
    "pictures with captions",
    lambda record: any(key in record for key in _CAPTION_KEYS) or isinstance(record.get("json"), dict),
)
def parse_caption(record: dict[str, Any], place: str) -> Sample:
    """One picture and its caption: a row with `caption` or `text`, or a WebDataset sample (`txt`, or `json`).

    A `json` member that holds a conversation is read as that. A caption needs a picture.
    """
    inner = record.get("json")
    if isinstance(inner, dict) and "txt" not in record:
        if not any(key in inner for key in _CAPTION_KEYS) or "conversations" in inner or "messages" in inner:
            merged = {**inner, "id": inner.get("id", record.get("__key__")), "images": record.get("__images__", [])}
            merged.pop("image", None)
            return parse_record(detect(merged, place), merged, place)
        record = {**record, **{key: inner[key] for key in _CAPTION_KEYS if key in inner}}
    where, identity = _where(record, place)
    caption = next((record[key] for key in ("txt", *_CAPTION_KEYS) if record.get(key) is not None), None)
    pictures = _pictures(record, where)
    if len(pictures) != 1:
        raise RecordError(f"{where}: a caption needs one picture, found {len(pictures)}", "marker_count")
    return _asked(identity, place, pictures, [("", _text(caption, where).strip())])


def _asked(identity: str, place: str, pictures: list[ImageRef], pairs: list[tuple[str, str]]) -> Sample:
    """A sample of questions and answers: pictures stand before the first question, each followed by a newline."""
    turns = []
    for index, (question, answer) in enumerate(pairs):
        front: list[str | ImageRef] = []
        for picture in pictures if index == 0 else []:
            front += [picture, "\n"]
        turns += [Turn("user", (*front, question)), Turn("assistant", (answer,))]
    return Sample(identity, tuple(turns), place)


def _conversation(record: dict[str, Any], place: str, turns: Any, loose_marker: bool = False) -> Sample:
    """A conversation with markers in its text. `loose_marker`: pictures without any marker open the first turn."""
    where, identity = _where(record, place)
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"{where}: has no turns ('conversations' must be a list with at least one turn)", "no_turns")
    pictures, videos = _pictures(record, where), _videos(record, where)
    read = [(role, _text(content, where, index)) for index, (role, content) in enumerate(_turns(turns, where))]
    if isinstance(record.get("system"), str) and record["system"] and read[0][0] != "system":
        read.insert(0, ("system", record["system"]))
    if read[0][0] == "assistant":
        read = read[1:]
    text = "".join(content for _, content in read)
    marks = text.count(IMAGE_MARKER), text.count(VIDEO_MARKER)
    if loose_marker and marks == (0, 0) and read and pictures:
        read[0] = (read[0][0], IMAGE_MARKER * len(pictures) + "\n" + read[0][1])
    elif videos and marks[1] == 0 and marks[0] == len(videos) + len(pictures):
        pictures, videos = [*pictures, *videos], []  # older video sets write <image> for their video
    elif marks != (len(pictures), len(videos)):
        for mark, count, held, name in (
            (IMAGE_MARKER, marks[0], pictures, "images"),
            (VIDEO_MARKER, marks[1], videos, "videos"),
        ):
            if count != len(held):
                message = f"{where}: {count} {mark} markers in the text but {len(held)} {name}"
                raise RecordError(message, "marker_count")
    shown = {IMAGE_MARKER: iter(pictures), VIDEO_MARKER: iter(videos)}
    return Sample(identity, tuple(Turn(role, _split(content, shown)) for role, content in read), place)


def _turns(turns: list[Any], where: str) -> Iterator[tuple[Role, Any]]:
    for index, turn in enumerate(turns):
        yield _turn(turn, index, where)


def _turn(turn: Any, index: int, where: str) -> tuple[Role, Any]:
    if not isinstance(turn, dict):
        raise RecordError(f"{where}: turn {index} must be an object, not {type(turn).__name__}", "malformed")
    said = turn.get("from", turn.get("role"))
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise RecordError(f"{where}: turn {index} is from {said!r}; expected human or gpt, user or assistant", "role")
    content = turn.get("value", turn.get("content"))
    if content is None:
        raise RecordError(f"{where}: turn {index} must be an object with a text 'value' or 'content'", "missing_key")
    return role, content


def _split(text: str, shown: dict[str, Iterator[ImageRef]]) -> tuple[str | ImageRef, ...]:
    """Text with markers -> parts. A single picture or video goes to the front, followed by a newline."""
    marks = _MARKER.findall(text)
    if not marks:
        return (text,)
    pieces = _MARKER.split(text)
    if len(marks) == 1:
        return (next(shown[marks[0]]), "\n" + "".join(pieces).strip())
    parts: list[str | ImageRef] = [pieces[0]] if pieces[0] else []
    for mark, piece in zip(marks, pieces[1:]):
        parts += [next(shown[mark]), *([piece] if piece else [])]
    return tuple(parts)


def _where(record: dict[str, Any], place: str) -> tuple[str, str]:
    """`place (id ..)` and the id, which is the place where a record has none."""
    identity = next((record[key] for key in ("id", "__key__") if record.get(key) is not None), place)
    if not isinstance(identity, (str, int)):
        raise RecordError(f"{place}: an id must be text or a number, not {type(identity).__name__}", "malformed")
    return f"{place} (id {identity})", str(identity)


def _text(value: Any, where: str, turn: int | None = None) -> str:
    if isinstance(value, str):
        return value
    told = "an answer or question" if turn is None else f"turn {turn}"
    raise RecordError(f"{where}: {told} must be an object with a text 'value', not {type(value).__name__}", "not_text")


def _pictures(record: dict[str, Any], where: str) -> list[ImageRef]:
    key = next((key for key in ("__images__", "image", "images", "jpg", "png") if record.get(key) is not None), None)
    return [] if key is None else [_reference(value, where) for value in _several(record[key])]


def _videos(record: dict[str, Any], where: str) -> list[ImageRef]:
    value = record.get("video", record.get("videos"))
    paths = [] if value is None else _several(value)
    if not all(isinstance(path, str) and path for path in paths):
        raise RecordError(f"{where}: 'video' must be a path or a list of paths", "malformed")
    return [ImageRef(path, "frame") for path in paths]


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _reference(value: Any, where: str, web: bool = False) -> ImageRef:
    """Any way a record names a picture. `web`: the format may hold URLs (OpenAI messages)."""
    if isinstance(value, ImageRef):
        return value
    if isinstance(value, dict) and (value.get("bytes") is not None or value.get("path")):
        held = value.get("bytes")
        if isinstance(held, bytes):
            return ImageRef("", "bytes", data=held)
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise RecordError(f"{where}: 'image' must be a path or a list of paths", "malformed")
    data = _DATA_URL.match(value)
    if data:
        try:
            return ImageRef("", "bytes", data=base64.b64decode(value[data.end() :], validate=True))
        except (binascii.Error, ValueError) as error:
            raise RecordError(f"{where}: a data URL is not base64: {error}", "image_unreadable") from error
    if web and value.startswith(("file://", "http://", "https://")):
        return ImageRef(value, "url")
    return ImageRef(value)
