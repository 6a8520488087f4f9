"""What one visitor says to one model: a conversation, and how a page shows it."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any

from PIL import Image

from llava_train.chat.saved import Turn, View
from llava_train.chat.session import Conversation
from llava_train.inference import read_pictures
from llava_train.model.assemble import Assembly
from llava_train.web.boxes import THOUSANDTHS, Frame, boxes_in, draw

Shown = list[dict[str, Any]]
"""Messages as Gradio's Chatbot takes them: text is HTML there, also where it shows no Markdown."""
Keep = Callable[[Image.Image], str]
"""Puts a picture where the page can show it; the path."""


@dataclass(frozen=True)
class Question:
    """What a visitor asks: text, and pictures with the paths under which the page shows them."""

    text: str
    images: tuple[Image.Image, ...] = ()
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """A question, or None for the last one again; `stopped` once nobody wants the answer."""

    question: Question | None = None
    stopped: Event = field(default_factory=Event)


@dataclass(frozen=True)
class Settings:
    """How an answer is made; see `Conversation`."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float | None = None


DEFAULTS = Settings()


def frame_of(assembly: Assembly, image: Image.Image) -> Frame:
    """What the numbers in this model's answers about a picture refer to."""
    spec, scale = assembly.spec, THOUSANDTHS
    if spec.architecture == "qwen2_5_vl":  # pixels of the picture as the model read it
        _, rows, columns = read_pictures(assembly, [image])[0].facts["image_grid_thw"].tolist()
        side = assembly.image_processor.patch_size
        scale = (columns * side, rows * side)
    qwen = spec.architecture.startswith("qwen2")
    return Frame(image.width, image.height, spec.image_aspect_ratio == "pad", scale, marked=not qwen)


class Talk:
    """A conversation, and the messages that show it.

    The page shows what the model remembers: an answer that is stopped stays as far as it was said, one that fails
    leaves no trace. One answer is made at a time; whose turn it is, the page knows.
    """

    def __init__(self, assembly: Assembly, keep: Keep) -> None:
        self._conversation = Conversation(assembly)
        self._keep = keep
        self._exchanges: list[tuple[Shown, Shown]] = []

    @property
    def shown(self) -> Shown:
        """All messages."""
        return [message for asked, answered in self._exchanges for message in (*asked, *answered)]

    @property
    def length(self) -> int:
        """Questions that were answered."""
        return len(self._exchanges)

    def answer(self, request: Request, settings: Settings) -> Iterator[Shown]:
        """All messages, each time with more of the answer. DataError for what cannot be asked, before anything else."""
        self._conversation = replace(self._conversation, **vars(settings))
        before, last, asked, pieces = self._begin(request.question)
        kept = self._exchanges
        earlier, said, ended = kept[: len(before)], "", False
        try:
            with closing(pieces):
                for piece in pieces:
                    said += piece
                    self._exchanges = [*earlier, (asked, [_text("assistant", said)])]
                    yield self.shown
                    if request.stopped.is_set():
                        break
                else:
                    ended = True
            if not ended and said.strip():
                self._conversation.turns = [*before, replace(last, answer=said.strip())]
            if ended or said.strip():
                kept = [*earlier, (asked, self._answered())]
        finally:
            self._exchanges = kept
        yield self.shown

    def clear(self) -> None:
        """Forget everything."""
        self._conversation = Conversation(self._conversation.assembly)
        self._exchanges = []

    def _begin(self, question: Question | None) -> tuple[list[Turn], Turn, Shown, Any]:
        """The turns before, the one that begins, the messages that ask, and the pieces of the answer."""
        conversation = self._conversation
        if question is None:
            pieces = conversation.regenerate()
            *before, last = conversation.turns
            return before, last, self._exchanges[-1][0], pieces
        turn = Turn(question.text, "", tuple(map(View, question.images)))
        asked = [_file("user", path) for path in question.paths] + [_text("user", question.text)]
        return list(conversation.turns), turn, asked, conversation.ask(question.text, question.images)

    def _answered(self) -> Shown:
        """The last answer, and the last picture with the boxes that it names."""
        turns = self._conversation.turns
        answer = turns[-1].answer
        messages = [_text("assistant", answer or "(an empty answer)")]
        images = [view.image for turn in turns for view in turn.views]
        boxes = boxes_in(answer, frame_of(self._conversation.assembly, images[-1])) if images else []
        if boxes:
            messages.append(_file("assistant", self._keep(draw(images[-1], boxes))))
        return messages


def _text(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": html.escape(text, quote=False)}]}


def _file(role: str, path: str) -> dict[str, Any]:
    return {"role": role, "content": [{"path": path}]}
