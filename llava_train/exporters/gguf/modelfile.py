"""Ollama's `Modelfile`: both files, a prompt template in Go's template language, and where an answer stops.

The template is derived from ours by rendering conversations of marker texts and looking at what stands between them;
what was derived is then compared with ours on other conversations. A template that is more than texts around messages
has no such equivalent, and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

Turns = Sequence[tuple[str, str]]
Render = Callable[[Turns], str]
"""(role, text) of each message -> the prompt, up to where the assistant is to speak"""

_SYSTEM, _ASK, _SAY, _THEN = "\x01s", "\x01a", "\x01b", "\x01c"
_CHECKS: tuple[Turns, ...] = (
    (("user", "Hi"),),
    (("user", "Hi"), ("assistant", "Ho."), ("user", "Why?")),
    (("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")),
    (("system", "Be brief."), ("user", "Hi")),
    (("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho."), ("user", "Why?")),
)


@dataclass(frozen=True)
class Pieces:
    """What a prompt is made of besides its messages.

    Attributes:
        opening: before the first question, where there is no system text.
        before_system: before a system text.
        after_system: between a system text and the first question.
        after_question: behind a question, up to where the answer begins in a prompt.
        before_answer: between that and an answer given before.
        after_answer: between an answer and the next question.
    """

    opening: str
    before_system: str
    after_system: str
    after_question: str
    before_answer: str
    after_answer: str

    def render(self, turns: Turns) -> str:
        """What Ollama makes of a conversation."""
        system = "".join(text for role, text in turns if role == "system")
        begin = self.before_system + system + self.after_system if system else self.opening
        around = {"user": ("", self.after_question), "assistant": (self.before_answer, self.after_answer)}
        said = [before + text + after for role, text in turns if role != "system" for before, after in [around[role]]]
        return begin + "".join(said)

    def without(self, bos: str) -> Pieces:
        """Without what Ollama writes at the beginning by itself."""
        begin = (self.opening.removeprefix(bos), self.before_system.removeprefix(bos))
        return Pieces(*begin, self.after_system, self.after_question, self.before_answer, self.after_answer)

    def go(self) -> str:
        """The same in Go's template language."""
        return (
            f"{{{{ if .System }}}}{self.before_system}{{{{ .System }}}}{self.after_system}"
            f"{{{{ else }}}}{self.opening}{{{{ end }}}}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{self.after_question}'
            f'{{{{ else if eq .Role "assistant" }}}}{self.before_answer}{{{{ .Content }}}}{self.after_answer}'
            "{{ end }}{{ end }}"
        )


def derive(render: Render) -> Pieces | None:
    """The pieces of a template, or None if it is not made of such."""
    try:
        opening, after_question = _between(render([("user", _ASK)]), _ASK)
        before_system, after_system, end = _between(render([("system", _SYSTEM), ("user", _ASK)]), _SYSTEM, _ASK)
        talk = render([("user", _ASK), ("assistant", _SAY), ("user", _THEN)])
        first, answer, after_answer, last = _between(talk, _ASK, _SAY, _THEN)
        if not (first == opening and last == after_question == end and answer.startswith(after_question)):
            return None
        before_answer = answer.removeprefix(after_question)
        pieces = Pieces(opening, before_system, after_system, after_question, before_answer, after_answer)
        same = all(pieces.render(turns) == render(turns) for turns in _CHECKS)
    except Exception:  # a template is a program, and can fail in any way
        return None
    text = "".join(astuple(pieces))
    return pieces if same and not any(mark in text for mark in ('"""', "{{", "\x01")) else None


def _between(text: str, *marks: str) -> list[str]:
    """The texts around marks. Raises ValueError if they are not there once each, in this order."""
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError(mark)
        before, _, text = text.partition(mark)
        parts.append(before)
    return [*parts, text]


def modelfile(model: str, mmproj: str, pieces: Pieces | None, stops: Sequence[str]) -> str:
    """The text of a Modelfile; without pieces it has no TEMPLATE, and Ollama takes the one in the GGUF file or none."""
    lines = [f"FROM ./{model}", f"FROM ./{mmproj}"]
    if pieces is not None:
        lines.append(f'TEMPLATE """{pieces.go()}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    return "\n".join([*lines, ""])
