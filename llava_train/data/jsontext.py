"""JSON text in flat memory: a file of any size is cut into slices of whole records, without unpacking them.

A JSON list is walked by the decoder itself, so what a slice holds is what `json.loads` would have found. Bytes that
are not UTF-8 become lone surrogates and are named with their record later.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

from llava_train.errors import DataError
from llava_train.storage import open_binary

PIECE_RECORDS = 2048
PIECE_CHARACTERS = 16_000_000
MAX_RECORD = 64_000_000
_CHUNK = 4 << 20
_SPACE = re.compile(r"[ \t\r\n]*")

Slice = tuple[int, int, str, str]
"""Index of the first record, number of records, their text joined by commas, what is wrong behind them."""


class _Reader:
    """A window on the text of a file, which knows the line it begins at."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.stream = open_binary(path)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self.more()
        self.text = self.text.removeprefix("\ufeff")

    def more(self) -> bool:
        """Drop what was read and append a chunk; False at the end of the file."""
        if self.ended:
            return False
        self.line += self.text.count("\n", 0, self.at)
        chunk = self.stream.read(_CHUNK)
        self.ended = not chunk
        self.text = self.text[self.at :] + self.decoder.decode(chunk, final=self.ended)
        self.at = 0
        return True

    def peek(self) -> str:
        """The next character that is not space, or "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def fault(self, message: str, at: int | None = None) -> DataError:
        """An error that names file, line and column."""
        at = self.at if at is None else at
        line = self.line + self.text.count("\n", 0, at)
        column = at - self.text.rfind("\n", 0, at)
        return DataError(f"{self.path}:{line}:{column}: {message}")


def cut_json(path: str) -> Iterator[Slice]:
    """Slices of a JSON list.

    Raises DataError with line and column where the text is no list of records. A file that merely breaks off
    gives its whole records, and the last slice says what is wrong.
    """
    reader = _Reader(path)
    with reader.stream:
        if reader.peek() != "[":
            raise reader.fault("must hold a list of records")
        reader.at += 1
        first, texts, size, tail = 0, list[str](), 0, ""
        for text, tail in _records(reader):
            if text:
                texts.append(text)
                size += len(text)
            if len(texts) == PIECE_RECORDS or size > PIECE_CHARACTERS:
                yield first, len(texts), ",".join(texts), tail
                first, texts, size = first + len(texts), [], 0
        if texts or tail:
            yield first, len(texts), ",".join(texts), tail


def _records(reader: _Reader) -> Iterator[tuple[str, str]]:
    """Each record's text; where the file breaks off, its whole records and then ("", what is wrong)."""
    if reader.peek() == "]":
        return _finish(reader)
    while True:
        text = _record(reader)
        if text is None:
            yield "", "the file breaks off inside this record"
            return
        yield text, ""
        following = reader.peek()
        if following == "]":
            return _finish(reader)
        if not following:
            yield "", "the file breaks off after the record before this one"
            return
        if following != ",":
            raise reader.fault("not JSON: a comma or the end of the list must follow a record")
        reader.at += 1


def _finish(reader: _Reader) -> None:
    reader.at += 1
    if reader.peek():
        raise reader.fault("not JSON: something follows the end of the list")


def _record(reader: _Reader) -> str | None:
    """The text of the record at hand, or None if the file ends inside it."""
    decoder = json.JSONDecoder()
    if not reader.peek():
        return None
    while True:
        error: json.JSONDecodeError | None = None
        try:
            _, end = decoder.raw_decode(reader.text, reader.at)
            if end < len(reader.text) or reader.ended:
                text = reader.text[reader.at : end]
                reader.at = end
                return text
        except json.JSONDecodeError as caught:
            error = caught
        except (ValueError, RecursionError) as caught:
            raise reader.fault(f"not JSON that can be read: {caught}") from caught
        if len(reader.text) - reader.at > MAX_RECORD:
            raise reader.fault(f"a record of more than {MAX_RECORD:,} characters, or text that is not JSON")
        if not reader.more():
            assert error is not None
            if error.msg.startswith("Unterminated string") or error.pos >= len(reader.text.rstrip()):
                return None
            raise reader.fault(f"not JSON: {error.msg}", error.pos) from error


def cut_jsonl(path: str) -> Iterator[tuple[int, int, str]]:
    """Slices of a file with a record a line: number of the first line, lines, text."""
    first, lines, size = 1, list[str](), 0
    with open_binary(path) as stream:
        for raw in stream:
            if first == 1 and not lines:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if len(raw) > MAX_RECORD:
                raise DataError(f"{path}:{first + len(lines)}: a line of more than {MAX_RECORD:,} bytes")
            lines.append(raw.decode("utf-8", errors="surrogateescape").rstrip("\n"))
            size += len(raw)
            if len(lines) == PIECE_RECORDS or size > PIECE_CHARACTERS:
                yield first, len(lines), "\n".join(lines)
                first, lines, size = first + len(lines), [], 0
    if lines:
        yield first, len(lines), "\n".join(lines)
