"""What the scripts beside this one share: their interface, virtual environments, servers, questions over HTTP.

Each is started as `python scripts/backends/NAME.py --work FOLDER [--environments FOLDER]`, tells its steps on stderr
and prints one JSON last: `back_end`, `ok` (null where it could not be tried: `reason` says why), `version`, `seconds`,
and what was compared. The exit status is 1 if it was tried and failed.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from PIL import Image

_START_S, _REPLY_S = 180, 120
_STAMP = ".complete"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


class NotRunError(Exception):
    """A back end that cannot be tried here, and why."""


class FailedError(Exception):
    """A back end that was tried and does not do what it should."""


def say(text: str) -> None:
    """Progress, a line."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def step(text: str) -> Iterator[None]:
    """Tell what was done, and how long it took."""
    started = time.perf_counter()
    try:
        yield
    except BaseException:
        say(f"  {time.perf_counter() - started:6.1f} s  {text}: not done")
        raise
    say(f"  {time.perf_counter() - started:6.1f} s  {text}")


def default_environments() -> Path:
    """Where virtual environments are kept: they take gigabytes and minutes."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "llava_train" / "backends"


def main(back_end: str, about: str, prove: Callable[[Path, Path], dict[str, Any]]) -> int:
    """The interface: `prove(work, environments)` returns what the JSON says; raises NotRunError or another error."""
    from llava_train.errors import LlavaTrainError

    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models; what is there is not made again")
    parser.add_argument(
        "--environments",
        type=Path,
        default=default_environments(),
        help="of virtual environments (default: %(default)s)",
    )
    options = parser.parse_args()
    os.environ.update(OFFLINE)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that servers are ended, too
    started = time.perf_counter()
    try:
        found = {"ok": True, **prove(options.work.absolute(), options.environments.expanduser().absolute())}
    except NotRunError as error:
        found = {"ok": None, "reason": str(error)}
    except (FailedError, LlavaTrainError) as error:
        found = {"ok": False, "reason": str(error)}
    except KeyboardInterrupt:
        say(f"  {back_end}: interrupted")
        return 130
    print(json.dumps({"back_end": back_end, **found, "seconds": round(time.perf_counter() - started, 1)}))
    return int(found["ok"] is False)


def pip(python: Path, *arguments: str) -> None:
    """Run pip of an environment, with its own configuration. Raises NotRunError with what it says."""
    # What is imported is compiled then; most of torch never is.
    compiling = ["--no-compile"] if arguments[0] == "install" else []
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", *arguments, *compiling]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotRunError(f"pip {arguments[0]} failed: {(errors or ['no message'])[-1]}")


def install_torch(python: Path, version: str) -> None:
    """The CPU build of torch where the package indices have it, else any."""
    try:
        pip(python, "install", f"torch=={version}+cpu")
    except NotRunError:
        pip(python, "install", f"torch=={version}")


def environment(
    folder: Path, name: str, pins: Sequence[str], fill: Callable[[Path, Sequence[str]], None] | None = None
) -> Path:
    """The Python of a virtual environment, made if it is missing, unfinished or of other pins.

    `fill(python, pins)` installs what is in it; by default torch, of the version that runs here, and the pins.
    Raises NotRunError if something cannot be installed; nothing is left then, nor after Ctrl-C.
    """
    home = folder / name
    python, stamp = home / "bin" / "python", home / _STAMP
    wanted = "\n".join([f"python {sys.version_info.major}.{sys.version_info.minor}", *pins])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == wanted:
            return python
        with step(f"environment {home}"):
            try:
                shutil.rmtree(home, ignore_errors=True)
                venv.create(home, with_pip=True)
                (fill or _fill)(python, pins)
                stamp.write_text(wanted)
            except BaseException:
                shutil.rmtree(home, ignore_errors=True)
                raise
    return python


def _fill(python: Path, pins: Sequence[str]) -> None:
    import torch

    install_torch(python, torch.__version__.partition("+")[0])
    pip(python, "install", *pins)


def run_json(command: Sequence[str | Path], settings: Mapping[str, str] | None = None) -> Any:
    """The JSON in the last line that a process prints. Raises FailedError with the last line of its errors."""
    own = {**os.environ, **(settings or {})}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=own)
    if done.returncode:
        raise FailedError(_last_words(done.stderr))
    return json.loads(done.stdout.strip().splitlines()[-1])


def _last_words(text: str) -> str:
    """The error that a process ended with."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line]
    return (told or lines or ["no message"])[-1][:400]


@contextmanager
def server(
    command: Sequence[str | Path],
    port: int,
    log: Path,
    settings: Mapping[str, str] | None = None,
    ready: str = "/health",
) -> Iterator[str]:
    """A server while the body runs; yields its address. Raises FailedError if it does not come up."""
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(settings or {})},
            start_new_session=True,  # it starts processes of its own
        )
        try:
            with step(f"server up: {log.stem}"):
                _await(address + "/health", process, log)
            yield address
        finally:
            for each in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, each)
                    process.wait(timeout=20)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise FailedError(f"the server ended: {_last_words(log.read_text(errors='replace'))}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise FailedError(f"the server was not up after {_START_S} s; see {log}")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def chat(
    address: str, model: str, question: str, image: Image.Image | None, max_tokens: int, stream: bool = False
) -> str:
    """The greedy answer of an OpenAI-compatible server. Raises FailedError with what it says of a fault."""
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if image is not None:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
    body |= {"temperature": 0, "stream": stream}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_REPLY_S) as reply:
            return _streamed(reply.read().decode()) if stream else _whole(json.load(reply))
    except urllib.error.HTTPError as error:
        raise FailedError(f"HTTP {error.code}: {error.read().decode(errors='replace')[:300]}") from error


def same_text(one: str, two: str) -> bool:
    """Whether two answers are alike; a character that is not complete at the end is not streamed."""
    return one.rstrip("\ufffd") == two.rstrip("\ufffd")


def _whole(reply: Any) -> str:
    return str(reply["choices"][0]["message"]["content"])


def _streamed(body: str) -> str:
    """The pieces of server-sent events, joined."""
    events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    pieces = [json.loads(event)["choices"] for event in events if event != "[DONE]"]
    return "".join(piece[0]["delta"].get("content") or "" for piece in pieces if piece)
