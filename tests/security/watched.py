"""A whole life of a model in one process, with every event written down that reaches out of it.

Run as `python -m tests.security.watched FOLDER`: FOLDER has the tiny parts; prints the events as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
_CHANGES = ("os.rename", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "shutil.move")
_REMOVES = ("os.remove", "os.rmdir", "shutil.rmtree")

events: list[tuple[str, str, list[str]]] = []
phase = "import"


def _note(event: str, arguments: tuple) -> None:
    if event == "pickle.find_class" or event in _STARTS:
        events.append((phase, event, [str(each) for each in arguments[:2]]))
    elif event in _NETWORK:
        if not (event == "socket.connect" and arguments[0].family.name == "AF_UNIX"):
            events.append((phase, event, [str(each) for each in arguments[1:]]))
    elif event == "open":
        path, mode, flags = arguments
        if not isinstance(path, int) and (any(c in (mode or "") for c in "wax+") or flags & _WRITES):
            events.append((phase, "write", [_absolute(path)]))
    elif event in _CHANGES:
        events.append(
            (phase, event, [_absolute(each) for each in arguments[:2] if isinstance(each, (str, bytes, Path))])
        )
    elif event in _REMOVES and (
        arguments[1:] in ((-1,), (None,), ())
    ):  # with a descriptor: within what is named before
        events.append((phase, event, [_absolute(arguments[0])]))


def _absolute(path: object) -> str:
    return os.path.abspath(os.fsdecode(path))  # noqa: PTH100  (an event may be about a path that is gone)


def _during(name: str, work: Callable[[], object]) -> None:
    global phase
    phase = name
    work()
    phase = "between"


def main(folder: Path) -> None:
    """Train, resume, merge and export, chat; then do what the hook must see, or it proves nothing."""
    sys.addaudithook(_note)
    from llava_train import export, load_model, load_recipe, train
    from llava_train.chat.session import Conversation
    from tests import tiny

    options = ["data.prepare_workers=1", "optimization.max_steps=2", "checkpoint.save_every=1"]
    recipe = load_recipe(tiny.make_recipe(folder), options)
    _during("train", lambda: train(recipe))
    shutil.rmtree(folder / "run" / "final")
    shutil.rmtree(folder / "run" / "checkpoints" / "step-2")
    _during("resume", lambda: train(recipe))
    _during("export", lambda: export(folder / "run", folder / "out" / "hf", dtype="float32"))

    def chat(model: Path) -> None:
        session = Conversation(load_model(model), max_new_tokens=2)
        session.show(folder / "data" / "0.png")
        "".join(session.ask("What is it?"))

    _during("chat", lambda: [chat(folder / "run"), chat(folder / "out" / "hf")])
    _during("control", _control)
    print(json.dumps(events))


def _control() -> None:
    import collections
    import pickle
    import socket
    from contextlib import suppress

    pickle.loads(pickle.dumps(collections.OrderedDict()))
    with socket.socket() as connection, suppress(OSError):
        connection.connect(("127.0.0.1", 9))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
