"""A sample: what one record of any format means, before any tokenizer.

    Sample(id="1", turns=(Turn("user", (ImageRef("a.png"), "\\nWhat is it?")), Turn("assistant", ("A cat.",))))

An image stands in the turn where it is shown, so that markers and images cannot disagree later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llava_train.errors import DataError

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class ImageRef:
    """A picture by its path relative to the source's image root."""

    path: str


@dataclass(frozen=True)
class Turn:
    """One turn: pieces of text and images in the order they are read."""

    role: Role
    parts: tuple[str | ImageRef, ...]

    @property
    def text(self) -> str:
        """The turn's words without its images."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Sample:
    """One conversation. `place` says where it came from ("train.json[17]") and opens every error about it."""

    id: str
    turns: tuple[Turn, ...]
    place: str = ""

    def __post_init__(self) -> None:
        """Check the roles: an optional system turn, then user and assistant in turn, ending with an answer."""
        turns = self.turns[1:] if self.turns and self.turns[0].role == "system" else self.turns
        if not turns:
            raise DataError(f"{self.where}: has no turns")
        for index, turn in enumerate(turns):
            expected = ("user", "assistant")[index % 2]
            if turn.role != expected:
                raise DataError(f"{self.where}: turn {index} is of the {turn.role}, expected the {expected}")
        if turns[-1].role != "assistant":
            raise DataError(f"{self.where}: ends without an answer")
        for turn in self.turns:
            if turn.role != "user" and any(isinstance(part, ImageRef) for part in turn.parts):
                raise DataError(f"{self.where}: an image stands in a turn of the {turn.role}")
            if turn.role == "assistant" and not turn.text.strip():
                raise DataError(f"{self.where}: an answer is empty")

    @property
    def where(self) -> str:
        """`place (id ...)`, the head of every message about this sample."""
        return f"{self.place} (id {self.id})" if self.place else f"id {self.id}"

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """All images in reading order."""
        return tuple(part for turn in self.turns for part in turn.parts if isinstance(part, ImageRef))
