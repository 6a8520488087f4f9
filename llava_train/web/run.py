"""`llava-train web`: the port, the page behind it, and what a user is told."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

from llava_train.errors import LlavaTrainError
from llava_train.model.assemble import Assembly
from llava_train.serving.port import LOOPBACK, address_of, bind

AUTH_VARIABLE = "LLAVA_TRAIN_WEB_AUTH"
_OLDEST = 6


def open_port(options: argparse.Namespace) -> socket.socket:
    """The port asked for, bound but not listening: whatever needs no model is refused before one is loaded.

    Raises LlavaTrainError: Gradio is missing or too old, a public address without a password, an address that cannot
    be had.
    """
    _check_gradio()
    advice = f"without a password; set {AUTH_VARIABLE} (or --auth) to USER:PASSWORD"
    return bind(options.host, options.port, credentials(options) is not None, advice)


def _check_gradio() -> None:
    advice = "pip install 'llava-train[web]'"
    try:
        found = version("gradio")
    except PackageNotFoundError as error:
        raise LlavaTrainError(f"gradio: not installed; {advice}") from error
    if int(found.partition(".")[0]) < _OLDEST:
        raise LlavaTrainError(f"gradio {found}: too old, at least {_OLDEST} is needed; {advice}")


def credentials(options: argparse.Namespace) -> tuple[str, str] | None:
    """Name and password that visitors must give; None for none asked for."""
    given = options.auth if options.auth is not None else os.environ.get(AUTH_VARIABLE) or None
    if given is None:
        return None
    user, colon, password = given.partition(":")
    if not (user and colon and password):
        raise LlavaTrainError(f"--auth (or {AUTH_VARIABLE}): must be USER:PASSWORD")
    return user, password


def names_of(models: Sequence[str]) -> list[str]:
    """What the page calls the models: folders by their last names if these differ, others as they were given."""
    short = [Path(each).resolve().name if Path(each).exists() else each for each in models]
    return short if len(set(short)) == len(short) else list(models)


def serve(models: Sequence[tuple[str, Assembly]], options: argparse.Namespace, port: socket.socket) -> None:
    """Serve the page until a signal comes: KeyboardInterrupt. What visitors sent is removed at the end."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by Gradio while it is loaded
    import uvicorn

    from llava_train.web.server import build_app
    from llava_train.web.talk import Settings

    auth = credentials(options)
    with TemporaryDirectory(prefix="llava-train-web-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        settings = Settings(options.max_new_tokens, options.temperature, options.top_p)
        app = build_app(models, settings, auth, None if auth else (*LOOPBACK, options.host))
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
        print(f"{address_of(port)} shows {' and '.join(name for name, _ in models)} (Ctrl-C ends)", file=sys.stderr)
        uvicorn.Server(config).run([port])
