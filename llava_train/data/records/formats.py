"""Record formats: a function a format, from one parsed record to a Sample.

A new format is a function with `@format_row(name, title, matches)`; `detect` takes the first row that matches.
Whatever a picture is in the record (a path, a URL, a cell of a table, bytes), here it becomes an ImageRef.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from llava_train.data.records.references import IMAGE_KEYS, pictures_of, videos_of
from llava_train.data.records.turns import asked, conversation, held, text_of, turn_list, where_of
from llava_train.data.sample import ImageRef, Sample, shown
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


def format_row(name: str, title: str, matches: Callable[[dict[str, Any]], bool]) -> Callable[[Parse], Parse]:
    """Decorator that makes a parse function a row of FORMATS."""

    def add(parse: Parse) -> Parse:
        FORMATS.register(name)(Format(title, matches, parse))
        return parse

    return add


def _recognised(record: Any) -> str | None:
    if not isinstance(record, dict):
        return None
    return next((name for name in FORMATS if FORMATS[name].matches(record)), None)


def detect(record: Any, place: str) -> str:
    """The format of a file by its first record; DataError lists what is known."""
    name = _recognised(record)
    if name is None:
        keys = ", ".join(sorted(map(str, record))) if isinstance(record, dict) else type(record).__name__
        found = shown(keys) or "no keys"
        raise DataError(f"{place}: format not recognised (found {found}); known formats: {', '.join(FORMATS)}")
    return name


def parse_record(name: str, record: Any, place: str) -> Sample:
    """The Sample of a record; RecordError says what is wrong with it, whatever it is.

    A record that cannot be read as `name` and shows that it is of another format is "wrong_format".
    """
    if isinstance(record, RecordError):
        raise record
    if not isinstance(record, dict):
        raise RecordError(f"{place}: a record must be an object, not {type(record).__name__}", "not_an_object")
    for value in record.values():
        if isinstance(value, RecordError):
            raise value
    try:
        return FORMATS[name].parse(record, place)
    except Exception as error:  # a record may hold anything anywhere; none of it may end the run
        raise _fault(name, record, place, error) from error


def _fault(name: str, record: dict[str, Any], place: str, error: Exception) -> RecordError:
    where = place
    with suppress(RecordError):
        where, _ = where_of(record, place)
    other = None if FORMATS[name].matches(record) else _recognised(record)
    if other:
        message = f"{where}: cannot be read as {name}: it looks like {other}, {FORMATS[other].title}"
        return RecordError(message, "wrong_format")
    if isinstance(error, RecordError):
        return error
    if isinstance(error, KeyError):
        return RecordError(f"{where}: cannot be read as {name}: it has no {error}", "missing_key")
    told = shown(f"{type(error).__name__}: {error}")
    return RecordError(f"{where}: cannot be read as {name} ({told})", "malformed")


def _first(record: dict[str, Any], key: str) -> dict[str, Any]:
    turns = turn_list(record.get(key))
    return turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}


def _has_role(record: dict[str, Any], key: str) -> bool:
    return _first(record, key).get("role") is not None


def _has_parts(turns: Any) -> bool:
    turns = turn_list(turns)
    return isinstance(turns, list) and any(
        isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in turns
    )


@format_row(
    "preference",
    "preference pairs (chosen/rejected)",
    lambda record: "chosen" in record and "rejected" in record,
)
def parse_preference(record: dict[str, Any], place: str) -> Sample:
    """`{"chosen", "rejected"}` as two answers, or as two conversations that differ in the last answer.

    The question stands in `conversations`, `messages`, `prompt`, `question` or `instruction` (and `input`), or in
    both conversations alike: the layouts of LLaMA-Factory, TRL, LLaVA-Hound and RLAIF-V. Pictures without any
    marker open the first question.
    """
    where, _ = where_of(record, place)
    chosen, rejected = turn_list(record["chosen"]), turn_list(record["rejected"])
    if isinstance(chosen, list) and len(chosen) > 1:
        before = chosen[:-1]
        if not isinstance(rejected, list) or before != rejected[:-1]:
            raise RecordError(f"{where}: chosen and rejected differ before the last answer", "malformed")
    else:
        before = _question(record, where)
    answers = _answer(chosen, where), _answer(rejected, where)
    turns = [*before, {"role": "assistant", "content": answers[0]}]
    return replace(conversation(record, place, turns, loose_marker=True), rejected=answers[1])


def _question(record: dict[str, Any], where: str) -> list[Any]:
    value = turn_list(held(record, "conversations", "messages", "prompt", "question", "instruction"))
    if isinstance(value, str):
        more = record.get("input") if "instruction" in record else None
        return [{"role": "user", "content": f"{value}\n{more}" if isinstance(more, str) and more else value}]
    if not isinstance(value, list):
        raise RecordError(f"{where}: has no question (conversations, prompt, question or instruction)", "missing_key")
    return value


def _answer(value: Any, where: str) -> str:
    last = value[-1] if isinstance(value, list) and value else value
    if isinstance(last, dict):
        last = held(last, "content", "value")
    if isinstance(last, list) and len(last) == 1 and isinstance(last[0], dict):
        last = last[0].get("text")
    return text_of(last, where)


@format_row(
    "llava",
    "LLaVA conversations (from/value)",
    lambda record: isinstance(turn_list(record.get("conversations")), list) and not _has_role(record, "conversations"),
)
def parse_llava(record: dict[str, Any], place: str) -> Sample:
    """LLaVA JSON: `{"id", "image": "a.png" | [..], "conversations": [{"from", "value"}, ..]}`; `video` alike.

    As the original does (`llava/train/train.py`, preprocess_multimodal): an opening answer without a
    question is dropped, and the `<image>` of a turn is moved to its front, followed by a newline.
    Several images in one turn stay where they stand.
    """
    return conversation(record, place, record.get("conversations"))


@format_row(
    "sharegpt",
    "ShareGPT conversations (role/content)",
    lambda record: (
        _has_role(record, "conversations") or (_has_role(record, "messages") and not _has_parts(record["messages"]))
    ),
)
def parse_sharegpt(record: dict[str, Any], place: str) -> Sample:
    """`conversations` or `messages` of `{"role", "content"}`, `system` as a turn or a key, `images`, `videos`."""
    return conversation(record, place, held(record, "conversations", "messages"))


@format_row("openai", "OpenAI messages (content parts)", lambda record: _has_role(record, "messages"))
def parse_openai(record: dict[str, Any], place: str) -> Sample:
    """`messages` whose content is text or parts: `text`, `image_url` (a path, file://, data: or http(s)), `image`.

    A part `{"type": "image"}` without a place takes the next of the record's `images` (TRL's layout).
    """
    return conversation(record, place, record.get("messages"))


@format_row(
    "cauldron",
    "question and answer turns (texts: user/assistant)",
    lambda record: "user" in _first(record, "texts"),
)
def parse_cauldron(record: dict[str, Any], place: str) -> Sample:
    """`{"images", "texts": [{"user", "assistant"}, ..]}` (The Cauldron, FineVision): pictures open the first turn."""
    where, identity = where_of(record, place)
    texts = turn_list(record["texts"])
    if not isinstance(texts, list) or not all(isinstance(pair, dict) for pair in texts):
        raise RecordError(f"{where}: 'texts' must be a list of objects", "malformed")
    pairs = [(text_of(pair.get("user"), where), text_of(pair.get("assistant"), where)) for pair in texts]
    return asked(identity, place, pictures_of(record, where), pairs)


@format_row(
    "video_chatgpt",
    "Video-ChatGPT (q/a/video_id)",
    lambda record: {"q", "a", "video_id"} <= set(record),
)
def parse_video_chatgpt(record: dict[str, Any], place: str) -> Sample:
    """`{"q", "a", "video_id"}` of VideoInstruct-100K; the file is `video_id` with the suffix that is there."""
    where, identity = where_of(record, place)
    video = ImageRef(text_of(record["video_id"], where), "frame")
    return asked(identity, place, [video], [(text_of(record["q"], where), text_of(record["a"], where))])


@format_row(
    "vqa",
    "question and answer",
    lambda record: "question" in record and ("answer" in record or "answers" in record),
)
def parse_vqa(record: dict[str, Any], place: str) -> Sample:
    """`{"image", "question", "answer"}`, e.g. VQA-RAD; of several `answers` the first. A `video` alike."""
    where, identity = where_of(record, place)
    question, answer = text_of(record["question"], where), held(record, "answer", "answers")
    answer = text_of(answer[0] if isinstance(answer, list) and answer else answer, where)
    return asked(identity, place, [*pictures_of(record, where), *videos_of(record, where)], [(question, answer)])


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
    if isinstance(inner, dict) and record.get("txt") is None:
        other = _recognised(inner)
        if other not in ("caption", None):
            beside = any(record.get(key) for key in IMAGE_KEYS)  # then a path inside names the same picture
            kept = {key: value for key, value in inner.items() if not (beside and key in IMAGE_KEYS)}
            return parse_record(str(other), {"id": record.get("__key__"), **record, **kept, "json": None}, place)
        record = {**record, **{key: inner[key] for key in _CAPTION_KEYS if key in inner}}
    where, identity = where_of(record, place)
    caption = held(record, "txt", *_CAPTION_KEYS)
    if caption is None:
        raise RecordError(f"{where}: has no caption (txt, or json with caption)", "missing_key")
    pictures = pictures_of(record, where)
    if len(pictures) != 1:
        raise RecordError(f"{where}: a caption needs one picture, found {len(pictures)}", "marker_count")
    return asked(identity, place, pictures, [("", text_of(caption, where).strip())])
