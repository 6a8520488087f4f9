"""A conversation with a model about pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from llava_train.data.pictures.images import open_image
from llava_train.files import write_json
from llava_train.inference import Message, Prompt, message, read_pictures, stream
from llava_train.model.assemble import Assembly


@dataclass
class Chat:
    """Turns so far, and the pictures that wait for the next question.

    >>> chat = Chat(load_model("runs/demo/stage2"))  # doctest: +SKIP
    >>> chat.show("cat.png"); "".join(chat.ask("What is it?"))  # doctest: +SKIP
    'a cat'
    """

    assembly: Assembly
    max_new_tokens: int = 512
    temperature: float = 0.0
    messages: list[Message] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    _shown: list[Image.Image] = field(default_factory=list)
    _waiting: int = 0

    def show(self, path: str | Path) -> None:
        """Add a picture to the next question. Raises DataError if it cannot be read."""
        file = Path(path).expanduser().resolve()
        self._shown.append(open_image(file.parent, file.name))
        self.images.append(str(path))
        self._waiting += 1

    def ask(self, text: str) -> Iterator[str]:
        """The answer to a question, piece by piece. An answer that is cut off leaves the conversation as it was."""
        question = message("user", text, self._waiting)
        prompt = Prompt((*self.messages, question), read_pictures(self.assembly, self._shown))
        pieces: list[str] = []
        for piece in stream(self.assembly, prompt, self.max_new_tokens, self.temperature):
            pieces.append(piece)
            yield piece
        self.messages += [question, message("assistant", "".join(pieces).strip())]
        self._waiting = 0

    def clear(self) -> None:
        """Forget turns and pictures."""
        self.messages.clear()
        self.images.clear()
        self._shown.clear()
        self._waiting = 0

    def transcript(self) -> list[dict[str, str | int]]:
        """The turns as `{"role", "text", "images"}`."""
        return [
            {
                "role": each["role"],
                "text": "".join(part.get("text", "") for part in each["content"]),
                "images": sum(part["type"] == "image" for part in each["content"]),
            }
            for each in self.messages
        ]

    def save(self, path: str | Path) -> None:
        """Write the transcript and the pictures' paths as JSON."""
        write_json(Path(path), {"images": self.images, "turns": self.transcript()})
