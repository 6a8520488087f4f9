"""JSON text in flat memory: a file of any size is cut into slices of whole records, without unpacking them.

A JSON list is walked by the decoder itself, so what a slice holds is what `json.loads` would have found. What is
wrong inside one record is left to that record: bytes that are not UTF-8 become lone surrogates, and numbers and
nesting beyond what `json` reads are stepped over.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from llava_train.errors import DataError, RecordError
from llava_train.storage import open_binary

PIECE_RECORDS = 2048
PIECE_CHARACTERS = 16_000_000
MAX_RECORD = 64_000_000
_CHUNK = 4 << 20
_LONGEST_TOKEN = 16
"""An error nearer to the end of a window than this may be a token that goes on behind it ("tru", "\\u12")."""
_SPACE = re.compile(r"[ \t\r\n]*")
_CUT_TOKEN = re.compile(r"(-?\w{0,8}|\\u?\w{0,4})\s*")
_NESTING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]', re.DOTALL)
_BAD_BYTE = re.compile("[\udc80-\udcff]")
_EXTENT = json.JSONDecoder(parse_int=lambda _: 0, parse_float=lambda _: 0, strict=False)
"""Finds where a value ends, also where it holds what `json.loads` refuses (long numbers, control characters)."""

Slice = tuple[int, int, str, str]
"""Index of the first record, number of records, their text joined by commas, what is wrong behind them."""


def value_end(text: str, at: int) -> int:
    """Where the JSON value that begins at `at` ends; JSONDecodeError where none does."""
    try:
        return _EXTENT.raw_decode(text, at)[1]
    except RecursionError:
        return _nested_end(text, at)


def _nested_end(text: str, at: int) -> int:
    """The same by counting brackets, for what is nested deeper than the decoder goes."""
    depth = 0
    for token in _NESTING.finditer(text, at):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token.group(), 0)
        if not depth:
            return token.end()
    raise json.JSONDecodeError("Unterminated string or list", text, at)


def parse_value(text: str, place: str, with_column: bool = False) -> Any:
    """A record from its text, or the RecordError that names what is wrong with it: "not_json" or "not_utf8"."""
    bad = None if text.isascii() else _BAD_BYTE.search(text)
    if bad:
        return RecordError(f"{place}: not UTF-8 (character {bad.start() + 1} of the record)", "not_utf8")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if with_column:
            return RecordError(f"{place}:{error.colno}: not JSON: {error.msg}", "not_json")
        return RecordError(f"{place}: not JSON: {error.msg} (character {error.pos + 1} of the record)", "not_json")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        return RecordError(f"{place}: not JSON that can be read: {error}", "not_json")


def parse_values(text: str, place: str, first: int, count: int) -> Iterator[Any]:
    """The records of a slice of a list, or the RecordError in a record's place (`place[index]`)."""
    if text.isascii() or not _BAD_BYTE.search(text):
        with suppress(ValueError, RecursionError):  # of one record; which one is found below
            yield from json.loads(f"[{text}]")
            return
    at = 0
    for index in range(first, first + count):
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        end = value_end(text, at)
        yield parse_value(text[at:end], f"{place}[{index}]")
        at = end + 1


class _Reader:
    """A window on the text of a file, which knows the line and column it begins at."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.stream = open_binary(path)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self.text, self.at, self.line, self.column, self.ended = "", 0, 1, 1, False
        self.more()
        self.text = self.text.removeprefix("\ufeff")

    def more(self) -> bool:
        """Drop what was read and append at least as much as is left, so that a long record is read in few steps.

        False at the end of the file.
        """
        if self.ended:
            return False
        self.line, self.column = self.position(self.at)
        self.text, self.at = self.text[self.at :], 0
        chunk = self.stream.read(max(_CHUNK, len(self.text)))
        self.ended = not chunk
        self.text += self.decoder.decode(chunk, final=self.ended)
        return True

    def peek(self) -> str:
        """The next character that is not space, or "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def position(self, at: int) -> tuple[int, int]:
        """Line and column of a character of the window."""
        lines = self.text.count("\n", 0, at)
        return self.line + lines, at - self.text.rfind("\n", 0, at) if lines else self.column + at

    def fault(self, message: str, at: int | None = None) -> DataError:
        """An error that names file, line and column."""
        line, column = self.position(self.at if at is None else at)
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
                first, texts, size, tail = first + len(texts), [], 0, ""
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
    if not reader.peek():
        return None
    while True:
        error: json.JSONDecodeError | None = None
        try:
            end = value_end(reader.text, reader.at)
            if end < len(reader.text) or reader.ended:
                text = reader.text[reader.at : end]
                reader.at = end
                return text
        except json.JSONDecodeError as caught:
            error = caught
        unfinished = error is None or error.msg.startswith("Unterminated")
        if error and not unfinished and error.pos < len(reader.text) - _LONGEST_TOKEN:
            raise reader.fault(f"not JSON: {error.msg}", error.pos) from error
        if len(reader.text) - reader.at > MAX_RECORD:
            raise reader.fault(f"a record of more than {MAX_RECORD:,} characters, or text that is not JSON")
        if not reader.more():
            assert error is not None
            if unfinished or _CUT_TOKEN.fullmatch(reader.text, error.pos):
                return None
            raise reader.fault(f"not JSON: {error.msg}", error.pos) from error


def cut_jsonl(path: str) -> Iterator[tuple[int, int, str]]:
    """Slices of a file with a record a line: number of the first line, lines, text.

    Raises DataError for a line of more than MAX_RECORD bytes.
    """
    first, lines, size = 1, list[str](), 0
    with open_binary(path) as stream:
        while raw := stream.readline(MAX_RECORD + 1):
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
