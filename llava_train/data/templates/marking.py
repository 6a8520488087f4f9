"""Generation marks for a chat template that has none: answers are traced to its source, marked there, and proved.

The pieces of a template that write text (`{{ .. }}` and plain text) are numbered, a few conversations are
rendered, and the pieces that write an answer or its stop are found. Each is cut where the answer's part begins
and ends, for the assistant's messages only:

    {{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {{ (..)[:22] }}{% generation %}{{ (..)[22:-1] }}{% endgeneration %}{{ (..)[-1:] }}

The result counts only if it is proved on all of `PROBES`: it renders the same text, and what is marked is each
answer, from where its prompt ends to its stop. `template.strip_marks` gives back the source as it was.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from llava_train.data.templates.template import has_marks, marked_region, strip_marks
from llava_train.errors import DataError

Message = dict[str, str]
Span = tuple[int, int]
"""Begin and end in characters."""


def _probe(answers: Sequence[str], system: str | None = None) -> list[Message]:
    """A conversation with these answers."""
    turns = [{"role": "system", "content": system}] if system else []
    for number, answer in enumerate(answers):
        turns += [{"role": "user", "content": f"<image>\nWhat is number {number}?"}]
        turns += [{"role": "assistant", "content": answer}]
    return turns


PROBES: tuple[list[Message], ...] = (
    _probe(["It is a cat."]),
    _probe(["Yes.", "It is one,\n\nof two.", "No"]),
    _probe(["0", " 'quoted' and \"quoted\" \n", "{{ braces }} {% set x %} <b>&amp;</b> \\n é", "What is number 3?"]),
    _probe(["A dog.", "Two dogs."], system="Answer in one line."),
)
"""Conversations every claim about a template is tried on; only the last has a system text."""


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Texts that are one token wherever they stand: added and special tokens."""
    return {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)


def leading_control(text: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The control token `text` begins with."""
    return max(filter(text.startswith, control_tokens(tokenizer)), key=len, default=None)


def rendering(
    template: str, tokenizer: PreTrainedTokenizerBase, messages: list[Message], generate: bool = False
) -> tuple[str, list[Span]]:
    """What a template writes, and the spans in it that are marked; touching spans are one.

    Raises DataError when the template fails or refuses the messages.
    """
    try:
        texts, marks = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=has_marks(template),
            add_generation_prompt=generate,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # a template is a program, and can fail in any way
        raise DataError(f"it cannot be rendered: {error}") from error
    spans: list[Span] = []
    for start, end in marks[0] if marks else []:
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, end))
    return texts[0], spans


def answer_spans(template: str, tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[str, list[Span]]:
    """What a template writes, and where in it each answer stands: from the end of its prompt to its stop.

    Raises DataError when the prompt of an answer, as it is rendered for generation, is not what stands before
    the answer in the whole conversation, or when no control token follows the answer.
    """
    text, _ = rendering(template, tokenizer, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, _ = rendering(template, tokenizer, messages[:index], generate=True)
        if not text.startswith(prompt):
            raise DataError("the prompt of an answer is not how the whole conversation begins: earlier turns change")
        said, answer = text[len(prompt) :].lstrip(), message["content"].strip()
        if not said.startswith(answer):
            raise DataError(f"after the prompt it writes {said[:40]!r} where the answer {answer[:40]!r} should stand")
        tail = said[len(answer) :].lstrip()
        stop = leading_control(tail, tokenizer)
        if stop is None:
            raise DataError(f"no control token of the tokenizer follows the answer, but {tail[:40]!r}")
        spans.append((len(prompt), len(text) - len(tail) + len(stop)))
    return text, spans


def add_marks(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A template with marks around each answer and its stop; one that has marks is returned as it is.

    Raises:
        DataError: the marks cannot be placed, or what they do cannot be proved; the message says why.
    """
    if has_marks(template):
        return template
    probes = [each for each in PROBES if each[0]["role"] != "system" or _renders(template, tokenizer, each)]
    pieces = list(_pieces(template))
    cuts: dict[int, set[tuple[int, int]]] = defaultdict(set)
    for messages in probes:
        text, spans = answer_spans(template, tokenizer, messages)
        for number, start, end in _trace(template, pieces, tokenizer, messages, text):
            cuts[number] |= {(max(0, a - start), max(0, end - b)) for a, b in spans if start < b and a < end}
    marked = template
    for number in sorted(cuts, reverse=True):
        if len(cuts[number]) > 1:
            shown = pieces[number].code.strip()
            raise DataError(f"{shown!r} writes more than an answer, and not always as much before or after it")
        for front, back in cuts[number]:
            marked = pieces[number].marked(marked, front, back)
    for messages in probes:
        _prove(template, marked, tokenizer, messages)
    return marked


def _renders(template: str, tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> bool:
    """Whether a template takes a conversation: some refuse a system text, which is their right."""
    try:
        rendering(template, tokenizer, messages)
    except DataError:
        return False
    return True


def _prove(template: str, marked: str, tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> None:
    if strip_marks(marked) != strip_marks(template):
        raise DataError("its source cannot be marked in a way that can be undone")
    expected, found = answer_spans(template, tokenizer, messages), rendering(marked, tokenizer, messages)
    if found[0] != expected[0]:
        raise DataError("with marks it renders another text")
    if found[1] != expected[1]:
        shown = ["".join(text[a:b] for a, b in spans) for text, spans in (found, expected)]
        raise DataError(f"its source lets {shown[0]!r} be marked, where the answers are {shown[1]!r}")


@dataclass(frozen=True)
class _Piece:
    """A place in a template's source that writes text.

    Attributes:
        start, end: where in the source.
        left, right: its whitespace control, "-" or "".
        code: the Jinja expression that gives the text.
        loop: the variable of the loop around it, which holds the message.
    """

    start: int
    end: int
    left: str
    right: str
    code: str
    loop: str | None

    def marked(self, source: str, front: int, back: int) -> str:
        """`source` with this piece marked, but for `front` characters before and `back` after the mark."""
        whole = f"({self.code.strip()})"
        said = whole + (f"[{front or ''}:{-back if back else ''}]" if front or back else "")
        text = f"{{% generation %}}{{{{ {said} }}}}{{% endgeneration %}}"
        text = (f"{{{{ {whole}[:{front}] }}}}" if front else "") + text
        text += f"{{{{ {whole}[-{back}:] }}}}" if back else ""
        if self.loop:
            text = f"{{% if {self.loop}['role'] == 'assistant' %}}{text}{{% else %}}{{{{ {whole} }}}}{{% endif %}}"
        region = marked_region(source[self.start : self.end], text, self.left, self.right)
        return source[: self.start] + region + source[self.end :]


# Lazy, but a string literal is taken as a whole, so that a delimiter in it ends nothing.
_INSIDE = r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^"'])*?"""
_TAG = re.compile(
    rf"\{{#.*?#\}}|\{{%[-+]?\s*(?P<word>\w+)(?P<rest>{_INSIDE})[-+]?%\}}"
    rf"|\{{\{{(?P<left>-?)(?P<code>{_INSIDE})(?P<right>-?)\}}\}}",
    re.DOTALL,
)
_LOOP = re.compile(r"\s+(\w+)\s+in\b")


def _pieces(source: str) -> Iterator[_Piece]:
    """The pieces of a template in order, but for macros, whose text is written elsewhere."""
    loops: list[str | None] = []
    macros, before = 0, None
    for tag in [*_TAG.finditer(source), None]:
        loop = next(filter(None, reversed(loops)), None)
        if not macros:
            yield from _plain(source, before, tag, loop)
            if tag and tag["code"] is not None:
                yield _Piece(tag.start(), tag.end(), tag["left"], tag["right"], tag["code"], loop)
        if tag and tag["word"] == "for":
            variable = _LOOP.match(tag["rest"])
            loops.append(variable.group(1) if variable else None)
        elif tag and tag["word"] == "endfor" and loops:
            loops.pop()
        elif tag and tag["word"] in ("macro", "endmacro"):
            macros += 1 if tag["word"] == "macro" else -1
        before = tag


def _plain(
    source: str, before: re.Match[str] | None, after: re.Match[str] | None, loop: str | None
) -> Iterator[_Piece]:
    """Plain text between two tags; whitespace at its ends only where no tag can eat it."""
    start, end = before.end() if before else 0, after.start() if after else len(source)
    text = source[start:end]
    if not (before and before["code"] is not None and not before["right"]):
        start, text = start + len(text) - len(text.lstrip()), text.lstrip()
    if not (after and after["code"] is not None and not after["left"]):
        text = text.rstrip()
    if text:
        yield _Piece(start, start + len(text), "", "", repr(text), loop)


_OPEN, _NUMBERED, _CLOSE = "\ue000", "\ue001", "\ue002"
"""Private-use characters, which no template writes."""
_WRITTEN = re.compile(f"{_OPEN}(\\d+){_NUMBERED}(.*?){_CLOSE}", re.DOTALL)


def _trace(
    template: str, pieces: list[_Piece], tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str
) -> list[tuple[int, int, int]]:
    """(piece, start, end) of all that numbered pieces write into `text`."""
    source = template
    for number, piece in reversed(list(enumerate(pieces))):
        opening = f"{{{{{piece.left}'{_OPEN}{number}{_NUMBERED}'}}}}"
        closing = f"{{{{'{_CLOSE}'{piece.right}}}}}"
        source = f"{source[: piece.start]}{opening}{{{{ {piece.code} }}}}{closing}{source[piece.end :]}"
    numbered, _ = rendering(source, tokenizer, messages)
    written, plain, at = [], "", 0
    for match in _WRITTEN.finditer(numbered):
        plain += numbered[at : match.start()]
        written.append((int(match.group(1)), len(plain), len(plain) + len(match.group(2))))
        plain, at = plain + match.group(2), match.end()
    if plain + numbered[at:] != text:
        raise DataError("its source cannot be traced: it looks at text that it has written")
    return written
