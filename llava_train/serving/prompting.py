"""What is asked in a request -> the prompt that the model reads, within what it can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llava_train.chat.pictures import PictureLimits, read_picture
from llava_train.data.pictures.shapes import Picture, Shown
from llava_train.data.templates.template import has_marks
from llava_train.errors import DataError
from llava_train.inference import Message, Prompt, message, prompt_ids, shape_of
from llava_train.model.assemble import Assembly
from llava_train.serving.protocol import Asked, RefusedError, Sent, Turn


@dataclass(frozen=True)
class Bounds:
    """What one request may take.

    Attributes:
        answer: tokens of an answer where the request does not say.
        length: tokens of prompt and answer together; None where the model knows no end.
        images: pictures of one request.
        pictures: what may be read as a picture.
    """

    answer: int = 512
    length: int | None = None
    images: int = 8
    pictures: PictureLimits = field(default_factory=lambda: PictureLimits(files=False))


def context_of(assembly: Assembly) -> int | None:
    """Positions that the model's LLM was made for, None where its configuration does not say."""
    found = getattr(assembly.model.config.get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)


def check_count(asked: Asked, bounds: Bounds) -> None:
    """Raises RefusedError for too many pictures, before any is read."""
    if len(asked.images) > bounds.images:
        raise RefusedError(f"{len(asked.images)} pictures; up to {bounds.images} are read here", param="messages")


def picture(assembly: Assembly, sent: Sent, alone: bool, bounds: Bounds) -> Picture:
    """A picture as the model reads it, fetched and decoded; only the model's pixels are kept. Raises RefusedError."""
    try:
        image = read_picture(sent.url, bounds.pictures)
        shape = shape_of(assembly.spec, assembly.image_processor)
        return shape.picture(image, Shown(image.width, image.height, alone=alone))
    except DataError as error:
        raise RefusedError(f"{sent.place}: {error}", param=sent.place, code="invalid_image") from error


def prepare(assembly: Assembly, asked: Asked, pictures: Sequence[Picture], bounds: Bounds) -> tuple[Prompt, int, int]:
    """The prompt, how many tokens it has, and how many its answer may have. Raises RefusedError."""
    messages = tuple(_message(turn, has_marks(assembly.template)) for turn in asked.turns)
    prompt = Prompt(messages, tuple(pictures))
    try:
        tokens = len(prompt_ids(assembly, prompt))
    except DataError as error:
        raise RefusedError(str(error), param="messages") from error
    return prompt, tokens, _limit(asked, tokens, bounds)


def _message(turn: Turn, pictures_first: bool) -> Message:
    """Texts of a message stand in lines of their own. Templates of ours write pictures first, as training data has
    them; a model's own writes them where they stand."""
    if pictures_first:
        texts = [part for part in turn.parts if isinstance(part, str)]
        return message(turn.role, "\n".join(texts), len(turn.parts) - len(texts))
    content: list[dict[str, str]] = []
    for part in turn.parts:
        if not isinstance(part, str):
            content.append({"type": "image"})
        elif content and content[-1]["type"] == "text":
            content[-1] = {"type": "text", "text": f"{content[-1]['text']}\n{part}"}
        else:
            content.append({"type": "text", "text": part})
    return {"role": turn.role, "content": content}


def _limit(asked: Asked, tokens: int, bounds: Bounds) -> int:
    left = None if bounds.length is None else bounds.length - tokens
    if left is not None and left < (asked.limit or 1):
        raise RefusedError(
            f"this model's context is {bounds.length} tokens; the messages with their pictures take {tokens}, and "
            f"{asked.limit or 1} more were asked for; shorten the messages or the answer",
            param="messages",
            code="context_length_exceeded",
        )
    return asked.limit or (bounds.answer if left is None else min(bounds.answer, left))
