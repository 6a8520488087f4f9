#!/usr/bin/env python3
"""Exports in the chat back ends that read them: tiny models are trained, exported, loaded and asked.

    python scripts/prove_backends.py                                   # all; minutes and gigabytes the first time
    python scripts/prove_backends.py --only vllm,transformers-oldest
    python scripts/prove_backends.py --environments /scratch/environments --work runs/backends

  transformers-oldest  the oldest version that reads `--to hf`, in an environment without this package
  transformers-newest  the newest
  transformers-serve   `transformers serve`: a chat completion with a picture over HTTP, whole and streamed
  vllm                 vLLM on the CPU (3.5 GB): offline, and its OpenAI server with a picture in the request
  llama-cpp            llama.cpp from `--to gguf`
  sglang, lmdeploy     have no engine for a CPU: their loading code, from their wheels, over the names of the weights

Each is a script in scripts/backends/, which can be run alone. Environments are kept and made again when their pins
change; one that was interrupted in the making is made anew. Nothing is taken but what pip finds with its own
configuration: a back end that cannot be installed is reported as not run, with the reason.

The last line is one JSON: for each back end `ok` (true, false, or null where it was not run: `reason`), `version`,
what was compared (`max_logit_difference`, `equal_tokens`, ...) and `seconds`. The exit status is 1 if one that ran
failed, else 0.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent / "backends"
BACK_ENDS = {
    "transformers-oldest": ("transformers_stock.py", "oldest"),
    "transformers-newest": ("transformers_stock.py", "newest"),
    "transformers-serve": ("transformers_serve.py",),
    "vllm": ("vllm.py",),
    "llama-cpp": ("llama_cpp.py",),
    "sglang": ("sglang.py",),
    "lmdeploy": ("lmdeploy.py",),
}
_PATIENCE_S = 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="prove-backends-") as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        try:
            found = {name: run(name, work, options.environments) for name in options.only}
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
    for name, each in found.items():
        print(f"{name:20}  {_verdict(each)}", file=sys.stderr)
    print(json.dumps(found))
    return int(any(each["ok"] is False for each in found.values()))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(BACK_ENDS)
    parser.add_argument("--only", type=_names, default=list(BACK_ENDS), metavar="NAME,...", help=f"of {names}")
    parser.add_argument("--work", type=Path, help="keep models here, and take those that are there (default: not kept)")
    where = "of virtual environments (default: llava_train/backends in $XDG_CACHE_HOME or ~/.cache)"
    parser.add_argument("--environments", type=Path, metavar="FOLDER", help=where)
    return parser.parse_args(arguments)


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in BACK_ENDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no back end {unknown[0]!r}; choose of {', '.join(BACK_ENDS)}")
    return names


def run(name: str, work: Path, environments: Path | None) -> dict[str, Any]:
    """What a back end's script says: its last line, `back_end` left out."""
    file, *words = BACK_ENDS[name]
    print(f"{name}", file=sys.stderr, flush=True)
    command = [sys.executable, str(SCRIPTS / file), *words, "--work", str(work)]
    command += ["--environments", str(environments)] if environments else []
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            output = process.communicate()[0]
        except BaseException:
            _end(process)
            raise
    lines = output.strip().splitlines()
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        found = {"ok": False, "reason": f"its script ended with status {process.returncode}"}
        found["seconds"] = round(time.perf_counter() - started, 1)
    return {key: value for key, value in found.items() if key != "back_end"}


def _end(process: subprocess.Popen[str]) -> None:
    """Ctrl-C for a script and all it started, once; it removes what is half made."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def _verdict(found: dict[str, Any]) -> str:
    word = {True: "ok", False: "FAILED", None: "not run"}[found["ok"]]
    return f"{word:8}{found.get('version') or ''}  {found.get('reason', '')}".rstrip()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
