"""A sample: what one record of any format means, before any tokenizer.

    Sample(id="1", turns=(Turn("user", (ImageRef("a.png"), "\\nWhat is it?")), Turn("assistant", ("A cat.",))))

An image stands in the turn where it is shown, so that markers and images cannot disagree later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llava_train.errors import RecordError

IMAGE_MARKER = "<image>"
"""How a picture is spelled in text: in records, in templates, in prompts."""
CAUSES = {
    "not_json": "the record is no JSON, or holds numbers or nesting that cannot be read",
    "not_utf8": "bytes that are not UTF-8, or half of a character",
    "file_truncated": "the file breaks off here; records behind it are not there",
    "not_an_object": "a record is a list, a text or a number",
    "wrong_format": "the record is of another format than its source",
    "missing_key": "a key that the format needs is not there",
    "malformed": "something else in the record is not as its format has it",
    "no_turns": "the conversation has no turn that asks and answers",
    "role": "a turn is of nobody known (tools are not)",
    "role_order": "the turns are not an optional system text, then user and assistant in turn",
    "not_text": "a question or answer is no text",
    "empty_turn": "a question or answer is empty",
    "marker_count": "the text shows more or fewer pictures or videos than the record holds",
    "marker_place": "a picture stands in an answer or in the system text",
    "control_token": "the text holds a control token of the tokenizer",
    "image_path": "a path leaves its root, or names what is no file (no policy may skip it)",
    "image_url": "a picture on the web that may not be fetched (no policy may skip it), or could not be",
    "image_missing": "there is no such picture",
    "image_empty": "the picture has 0 bytes",
    "image_unreadable": "the picture is damaged, or is none",
    "image_format": "a picture format that is not read",
    "image_too_large": "more pixels than are allowed",
    "image_strip": "a picture far longer than wide, or wider than long",
    "video_missing": "there is no such video",
    "video_empty": "the video has 0 bytes or no frames",
    "video_unreadable": "the video is damaged, or is none",
    "image_cut": "max_length would cut a picture",
    "nothing_supervised": "no answer is left within max_length",
    "duplicate_id": "an earlier record of the source has the same id",
    "duplicate_content": "an earlier record of the source says and shows the same",
}
"""What a record can be left out for: the words reports count by."""
_SHOWN = 200
Role = Literal["system", "user", "assistant"]
Kind = Literal["file", "span", "cell", "frame", "blob", "bytes", "url"]


def shown(text: str) -> str:
    """Text from a record as messages quote it: short, and without what would act on a terminal."""
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return text if text.isprintable() else ascii(text)


@dataclass(frozen=True)
class ImageRef:
    """Where the bytes of a picture are. Every format and container ends in one of these kinds.

    file   `path` below the image root
    span   `size` bytes from byte `at` of the container `path` (a tar shard, local or remote)
    cell   row `at` of `column` in the Arrow or Parquet file `path`; element `size` of it where it holds a list
    frame  frame `at` of `size` frames taken evenly from the video `path` below the image root
    blob   `size` bytes from byte `at` of the file `path` beside the prepared set
    bytes  `data` itself, as a record brought it (a data URL); becomes a blob when it is prepared
    url    `path` as a URL: file:// becomes a file; http(s) is fetched when it is prepared, where the recipe
           allows it, and becomes a blob

    Only `file`, `frame` and `url` take their path from a record; the others from the source itself. A `frame` of
    size 0 stands for the whole video until the number of frames is settled.
    """

    path: str
    kind: Kind = "file"
    at: int = 0
    size: int = 0
    column: str = ""
    data: bytes = b""


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
    """One conversation. `place` says where it came from ("train.json[17]") and opens every error about it.

    A preference pair has the chosen answer as its last turn and the other one in `rejected`.
    """

    id: str
    turns: tuple[Turn, ...]
    place: str = ""
    rejected: str | None = None

    def __post_init__(self) -> None:
        """Check the roles: an optional system turn, then user and assistant in turn, ending with an answer."""
        turns = self.turns[1:] if self.turns and self.turns[0].role == "system" else self.turns
        if not turns:
            raise self.fault("has no turns", "no_turns")
        for index, turn in enumerate(turns):
            expected = ("user", "assistant")[index % 2]
            if turn.role != expected:
                raise self.fault(f"turn {index} is of the {turn.role}, expected the {expected}", "role_order")
        if turns[-1].role != "assistant":
            raise self.fault("ends without an answer", "role_order")
        for index, turn in enumerate(self.turns):
            if turn.role != "user" and any(isinstance(part, ImageRef) for part in turn.parts):
                raise self.fault(f"an image stands in a turn of the {turn.role}", "marker_place")
            if turn.role == "assistant" and not turn.text.strip():
                raise self.fault("an answer is empty", "empty_turn")
            if turn.role == "user" and not any(isinstance(p, ImageRef) or p.strip() for p in turn.parts):
                raise self.fault(f"turn {index} of the user is empty", "empty_turn")
        if self.rejected is not None and not self.rejected.strip():
            raise self.fault("the rejected answer is empty", "empty_turn")

    def fault(self, message: str, cause: str) -> RecordError:
        """An error about this sample."""
        return RecordError(f"{self.where}: {message}", cause)

    @property
    def where(self) -> str:
        """`place (id ...)`, the head of every message about this sample."""
        return f"{self.place} (id {shown(self.id)})" if self.place else f"id {shown(self.id)}"

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """All images in reading order."""
        return tuple(part for turn in self.turns for part in turn.parts if isinstance(part, ImageRef))
