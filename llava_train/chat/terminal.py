"""A conversation in a terminal: answers stream to stdout, everything else goes to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator

from llava_train.chat.pictures import name_of
from llava_train.chat.session import Conversation
from llava_train.errors import LlavaTrainError

HELP = """\
/image PATH-or-URL  shows a picture with your next question (again for several)
/regenerate         answers the last question again
/transcript         shows what was said
/save FILE.json     writes the conversation, /load FILE.json goes on with one
/clear              starts over
/quit               ends; Ctrl-C stops an answer"""


def one_shot(conversation: Conversation, prompt: str) -> None:
    """Answer one prompt and end."""
    _print_answer(conversation.ask(prompt))


def converse(conversation: Conversation, images: Iterable[str] = ()) -> None:
    """Read questions and commands until the end of input, after showing `images`.

    Nothing that goes wrong ends it. Ctrl-C stops an answer, not the conversation.
    """
    _note(HELP)
    for image in images:
        _do(conversation, f"/image {image}")
    while True:
        try:
            _note("> ", end="")
            line = input().strip()
        except EOFError:
            _note("")
            return
        except KeyboardInterrupt:
            _note("\n(/quit ends)")
            continue
        if line in ("/quit", "/exit"):
            return
        _do(conversation, line)


def _do(conversation: Conversation, line: str) -> None:
    """A command or a question, and what goes wrong with it as one line."""
    name, _, argument = line.partition(" ")
    argument = argument.strip().strip("'\"")
    try:
        if name in _BARE:
            _BARE[name](conversation)
        elif name in _NAMING and argument:
            _NAMING[name](conversation, argument)
        elif line.startswith("/"):
            _note(HELP)
        elif line:
            _print_answer(conversation.ask(line))
    except LlavaTrainError as error:
        _note(str(error))
    except OSError as error:
        _note(f"{error.filename or ''}: {error.strerror or error}")
    except KeyboardInterrupt:
        _note("\n(answer stopped)")


def _regenerate(conversation: Conversation) -> None:
    _print_answer(conversation.regenerate())


def _transcript(conversation: Conversation) -> None:
    for turn in conversation.transcript():
        print(f"{turn['role']}: {'<image> ' * int(turn['images'])}{turn['text']}", flush=True)


def _clear(conversation: Conversation) -> None:
    conversation.clear()
    _note("started over")


def _image(conversation: Conversation, source: str) -> None:
    conversation.show(source)
    _note(f"{name_of(source)} is shown with your next question")


def _save(conversation: Conversation, file: str) -> None:
    conversation.save(file)
    _note(f"saved to {file}")


def _load(conversation: Conversation, file: str) -> None:
    found = Conversation.load(file, conversation.assembly, limits=conversation.limits)
    conversation.turns, conversation.waiting = found.turns, found.waiting
    _note(f"{file}: {len(found.turns)} answers; go on")


_BARE: dict[str, Callable[[Conversation], None]] = {
    "/regenerate": _regenerate,
    "/transcript": _transcript,
    "/clear": _clear,
}
_NAMING: dict[str, Callable[[Conversation, str], None]] = {"/image": _image, "/save": _save, "/load": _load}


def _print_answer(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _note(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)
