"""`llava-train web`: the port, the page behind it, and what a user is told."""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

from llava_train.errors import LlavaTrainError
from llava_train.model.assemble import Assembly

AUTH_VARIABLE = "LLAVA_TRAIN_WEB_AUTH"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_OLDEST = 6


def open_port(options: argparse.Namespace) -> socket.socket:
    """The port asked for, bound but not listening: whatever needs no model is refused before one is loaded.

    Raises LlavaTrainError: Gradio is missing or too old, a public address without a password (as for `serve`: what
    many could use, nobody should open by accident), an address that cannot be had.
    """
    _check_gradio()
    pair = credentials(options)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        if pair is None and not ipaddress.ip_address(address[0]).is_loopback:
            raise LlavaTrainError(
                f"--host {options.host}: others could use the model without a password; set {AUTH_VARIABLE} (or --auth)"
                " to USER:PASSWORD"
            )
        port = socket.socket(family, kind, protocol)
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        raise LlavaTrainError(f"--host {options.host} --port {options.port}: {error}") from error
    return port


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
        print(f"{_address(port)} shows {' and '.join(name for name, _ in models)} (Ctrl-C ends)", file=sys.stderr)
        uvicorn.Server(config).run([port])


def _address(port: socket.socket) -> str:
    host, number = port.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{number}"
