"""A conversation with a model about pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_train.chat.pictures import PictureLimits, Source
from llava_train.chat.saved import Turn, View, read_conversation, view, write_conversation
from llava_train.errors import DataError
from llava_train.inference import Message, Prompt, message, read_pictures, stream
from llava_train.model.assemble import Assembly


@dataclass
class Conversation:
    """Turns so far, and the pictures that wait for the next question.

    >>> conversation = Conversation(load_model("runs/demo/stage2"))  # doctest: +SKIP
    >>> "".join(conversation.start("cat.png", "What is it?"))  # doctest: +SKIP
    'a cat'
    >>> "".join(conversation.ask("What colour has it?"))  # doctest: +SKIP
    'black'

    Answers come in pieces. A picture that cannot be read is a DataError and changes nothing, nor does an answer that is
    cut off (an error of the model, Ctrl-C, a reader who closes the generator): ask again.

    Attributes:
        assembly: the model, and what belongs to it.
        max_new_tokens: of one answer.
        temperature: 0 is greedy.
        top_p: tokens are drawn from the likeliest that have this probability together; None: as the model says.
        seed: makes what is drawn the same each time.
        limits: what may be read as a picture.
        turns: what was asked and answered.
        waiting: pictures that are shown with the next question.
    """

    assembly: Assembly
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    limits: PictureLimits = field(default_factory=PictureLimits)
    turns: list[Turn] = field(default_factory=list)
    waiting: list[View] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raises DataError for settings that no answer can have."""
        for name, fits, must in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not fits:
                raise DataError(f"{name}: {getattr(self, name)}: must be {must}")

    def start(self, image: Source | Sequence[Source], prompt: str) -> Iterator[str]:
        """Forget what was, show a picture, or several, and ask: the answer, piece by piece."""
        views = self._views([image] if isinstance(image, Source) else image)
        return self._answer([], prompt, views, waiting=len(self.waiting))

    def ask(self, prompt: str, images: Sequence[Source] = ()) -> Iterator[str]:
        """The answer, piece by piece, to a question about all so far, the pictures that wait, and these."""
        waiting = len(self.waiting)
        return self._answer(self.turns, prompt, (*self.waiting, *self._views(images)), waiting)

    def show(self, image: Source) -> None:
        """Add a picture to the next question."""
        self.waiting += self._views([image])

    def regenerate(self) -> Iterator[str]:
        """Another answer to the last question, which takes the place of the last one."""
        if not self.turns:
            raise DataError("there is no question yet that could be answered again; ask one")
        *before, last = self.turns
        return self._answer(before, last.question, last.views, waiting=0)

    def clear(self) -> None:
        """Forget turns and pictures."""
        self.turns.clear()
        self.waiting.clear()

    def prompt(self, question: str, images: Sequence[Source] = ()) -> Prompt:
        """What the model would read if this were asked now."""
        return self._prompt(self.turns, question, (*self.waiting, *self._views(images)))

    def transcript(self) -> list[dict[str, str | int]]:
        """The turns as `{"role", "text", "images"}`; `images` is how many are shown with it."""
        rows: list[dict[str, str | int]] = []
        for turn in self.turns:
            rows.append({"role": "user", "text": turn.question, "images": len(turn.views)})
            rows.append({"role": "assistant", "text": turn.answer, "images": 0})
        return rows

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON; pictures from files and the web by name, others as PNG files beside it."""
        write_conversation(Path(path), self.turns, self.waiting)

    @classmethod
    def load(cls, path: str | Path, assembly: Assembly, **settings: Any) -> Conversation:
        """What `save` wrote, to go on with; `settings` are those of the class.

        Raises DataError for a file that is none, and for a picture that is gone or has changed since.
        """
        conversation = cls(assembly, **settings)
        conversation.turns, conversation.waiting = read_conversation(Path(path), conversation.limits)
        return conversation

    def _views(self, images: Sequence[Source]) -> tuple[View, ...]:
        return tuple(view(image, self.limits) for image in images)

    def _prompt(self, turns: Sequence[Turn], question: str, views: Sequence[View]) -> Prompt:
        messages: list[Message] = []
        for turn in turns:
            messages += message("user", turn.question, len(turn.views)), message("assistant", turn.answer)
        images = [each.image for turn in turns for each in turn.views] + [each.image for each in views]
        return Prompt((*messages, message("user", question, len(views))), read_pictures(self.assembly, images))

    def _answer(self, before: list[Turn], question: str, views: tuple[View, ...], waiting: int) -> Iterator[str]:
        """Ask behind the turns `before`; when all is said, that is the conversation, and so many wait no longer."""
        prompt = self._prompt(before, question, views)
        said: list[str] = []
        options = (self.max_new_tokens, self.temperature, self.top_p, self.seed)
        with closing(stream(self.assembly, prompt, *options)) as pieces:
            for piece in pieces:
                said.append(piece)
                yield piece
        self.turns = [*before, Turn(question, "".join(said).strip(), views)]
        del self.waiting[:waiting]
