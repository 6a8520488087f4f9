"""Chat in a terminal: answers stream to stdout, everything else goes to stderr."""

from __future__ import annotations

import sys

from llava_train.chat.session import Chat
from llava_train.errors import LlavaTrainError

HELP = "/image PATH adds a picture, /clear starts over, /save FILE.json writes the conversation, /quit ends"


def one_shot(chat: Chat, prompt: str) -> None:
    """Answer one prompt and end."""
    _print_answer(chat, prompt)


def converse(chat: Chat) -> None:
    """Read questions and commands until the end of input. Ctrl-C stops an answer, not the conversation."""
    _note(HELP)
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
        try:
            if line.startswith("/"):
                _command(chat, line)
            elif line:
                _print_answer(chat, line)
        except LlavaTrainError as error:
            _note(str(error))
        except OSError as error:
            _note(f"{error.filename}: {error.strerror}")
        except KeyboardInterrupt:
            _note("\n(answer stopped)")


def _command(chat: Chat, line: str) -> None:
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/image" and argument:
        chat.show(argument)
        _note(f"{argument} is shown with your next question")
    elif name == "/clear":
        chat.clear()
        _note("started over")
    elif name == "/save" and argument:
        chat.save(argument)
        _note(f"saved to {argument}")
    else:
        _note(HELP)


def _print_answer(chat: Chat, prompt: str) -> None:
    for piece in chat.ask(prompt):
        print(piece, end="", flush=True)
    print(flush=True)


def _note(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)
