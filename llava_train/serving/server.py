"""uvicorn, as `llava-train serve` runs it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from llava_train.serving.batching import Engine

GRACE_S = 5.0
"""How long answers may go on after a signal; then they are cut with an error."""


class Server(uvicorn.Server):
    """Says that it is ready when it is, and lets the engine know of a signal at once.

    Attributes:
        signal: the number of the one that ended it.
    """

    def __init__(self, app: FastAPI, engine: Engine, ready: Callable[[], None], debug: bool = False) -> None:
        # Faults are logged by the application, a line each; the rest of uvicorn's log is for its developers.
        level = logging.INFO if debug else logging.CRITICAL
        logging.getLogger("uvicorn.error").setLevel(level)
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level=level,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=int(GRACE_S) + 3,
            )
        )
        self._engine, self._ready = engine, ready
        self.signal: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets=sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn: the first signal ends it in peace, a second Ctrl-C at once."""
        self.signal = sig
        self._engine.drain(GRACE_S)
        super().handle_exit(sig, frame)
