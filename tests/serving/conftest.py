"""A server in a thread of its own, with a real port."""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from openai import OpenAI

from llava_train import load_model
from llava_train.data.pictures.images import open_image
from llava_train.inference import Prompt, answer, message, read_pictures
from llava_train.model.assemble import Assembly
from llava_train.serving.app import Service, build_app
from llava_train.serving.batching import Engine
from llava_train.serving.server import Server
from tests import tiny_vlms

WAIT_S = 60


@dataclass(frozen=True)
class Served:
    """What a test asks: the address, and the engine behind it."""

    url: str
    engine: Engine

    def client(self, key: str = "any"):
        """The official client, which tries once."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)


@pytest.fixture
def serving() -> Iterator[Callable[..., Served]]:
    """`serving(assembly, max_batch, **service)` -> a running server."""
    running: list[tuple[Server, Thread, Engine]] = []

    def start(assembly: Assembly, max_batch: int = 8, **service: object) -> Served:
        port = socket.socket()
        port.bind(("127.0.0.1", 0))
        engine, ready = Engine(assembly, max_batch), Event()
        server = Server(build_app(engine, Service(name="tiny", **service)), engine, ready.set)
        thread = Thread(target=server.run, args=([port],))
        thread.start()
        running.append((server, thread, engine))
        assert ready.wait(WAIT_S)
        return Served(f"http://127.0.0.1:{port.getsockname()[1]}", engine)

    yield start
    for server, thread, engine in running:
        server.should_exit = True
        engine.close()
        thread.join(WAIT_S)


@pytest.fixture(scope="session")
def ours(finished: Path) -> Assembly:
    """A model with a template of ours."""
    return _talkative(load_model(finished))


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Assembly:
    """A model with a template of its own."""
    return _talkative(load_model(tiny_vlms.make_qwen2_5_vl(tmp_path_factory.mktemp("vlm") / "qwen2_5_vl")))


def _talkative(assembly: Assembly) -> Assembly:
    """With weights that make long answers, other ones to other pictures, with characters of several tokens."""
    torch.manual_seed(0)
    for name, weight in assembly.model.named_parameters():
        if weight.dim() > 1 and "vis" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    return assembly


def expected(assembly: Assembly, folder: Path, pictures: Sequence[str], text: str, tokens: int) -> str:
    """What `answer` says to one question after pictures."""
    images = read_pictures(assembly, [open_image(folder, name) for name in pictures])
    return answer(assembly, [Prompt((message("user", text, len(images)),), images)], tokens)[0]


def data_url(path: Path) -> str:
    """A picture as requests bring it."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def user(*parts: str | Path) -> dict[str, object]:
    """A message of texts and pictures (paths, or URLs) in this order."""
    urls = {part: data_url(part) if isinstance(part, Path) else part for part in parts}
    content = [
        {"type": "image_url", "image_url": {"url": urls[part]}}
        if isinstance(part, Path) or part.startswith(("http", "data:", "file:"))
        else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": "user", "content": content}
