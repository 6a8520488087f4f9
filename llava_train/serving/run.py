"""`llava-train serve`: the port, the model behind it, and what a user is told."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from shlex import quote

from llava_train.chat.pictures import PictureLimits
from llava_train.errors import LlavaTrainError
from llava_train.exporters.backends import vllm_command
from llava_train.model.assemble import Assembly
from llava_train.serving.port import LOOPBACK, address_of, bind

KEY_VARIABLE = "LLAVA_TRAIN_API_KEY"


def open_port(options: argparse.Namespace) -> socket.socket:
    """The port asked for, bound but not listening: whatever needs no model is refused before one is loaded.

    Raises LlavaTrainError: a package is missing, a public address without a key, an address that cannot be had.
    """
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise LlavaTrainError(f"{' and '.join(missing)}: not installed; pip install 'llava-train[serve]'")
    if not 0 <= options.temperature <= 2 or not 0 < options.max_image_mb < 1000:
        raise LlavaTrainError("--temperature goes from 0 to 2, --max-image-mb from more than 0 to less than 1000")
    advice = f"without a key; set {KEY_VARIABLE} (or --api-key)"
    return bind(options.host, options.port, api_key(options) is not None, advice)


def api_key(options: argparse.Namespace) -> str | None:
    """The key that requests must bring. LlavaTrainError for an empty one, or one that no header can carry."""
    key = options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE) or None
    if key is not None and (not key or not key.isascii() or not key.isprintable() or key != key.strip()):
        raise LlavaTrainError("the API key must be printable ASCII, without space around it")
    return key


def serve(assembly: Assembly, options: argparse.Namespace, port: socket.socket) -> None:
    """Answer until a signal comes: KeyboardInterrupt with its number when all is done."""
    from llava_train.serving.app import Service, build_app
    from llava_train.serving.batching import Engine
    from llava_train.serving.prompting import Bounds, context_of
    from llava_train.serving.server import Server

    key, length = api_key(options), context_of(assembly)
    if options.max_length is not None and length is not None and options.max_length > length:
        raise LlavaTrainError(f"--max-length {options.max_length}: the model was made for {length} tokens")
    name = options.name or served_name(options.model)
    service = Service(
        name=name,
        api_key=key,
        hosts=None if key else (*LOOPBACK, options.host),
        max_queue=options.max_queue,
        bounds=Bounds(
            answer=options.max_new_tokens,
            length=options.max_length or length,
            images=options.max_images,
            pictures=PictureLimits(
                max_bytes=int(options.max_image_mb * 1_000_000),
                urls=not options.no_urls,
                private=options.allow_private_urls,
                files=False,
            ),
        ),
        temperature=options.temperature,
    )
    engine = Engine(assembly, options.max_batch, options.debug)
    app = build_app(engine, service)
    production = f"for production: {vllm_command(assembly, options.model)}"
    words = [*how_to_ask(port, name, key is not None), production]
    server = Server(app, engine, lambda: print("\n".join(words), file=sys.stderr, flush=True), options.debug)
    try:
        server.run([port])
    finally:
        engine.close()
        app.state.pool.shutdown(wait=False, cancel_futures=True)
    if server.signal is not None:  # uvicorn raises it again, but a shell may have said to ignore it
        raise KeyboardInterrupt(server.signal)


def served_name(model: str) -> str:
    """What requests call a model: a folder by its last name, one of the hub by its id."""
    return Path(model).resolve().name if Path(model).exists() else model


def how_to_ask(port: socket.socket, name: str, key: bool) -> list[str]:
    """The address, and a line to try it with."""
    address = f"{address_of(port)}/v1"
    authorization = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if key else ""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Who are you?"}]}, ensure_ascii=False)
    return [
        f"serving {name} at {address} (Ctrl-C ends)",
        f"  curl {address}/chat/completions -H 'Content-Type: application/json'{authorization} -d {quote(body)}",
    ]
