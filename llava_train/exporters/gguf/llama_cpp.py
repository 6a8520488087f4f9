"""Asking llama.cpp itself, where it is at hand: the npm package `@fugood/llama.node` and node.

`LLAVA_TRAIN_LLAMA_NODE` names the folder that has `node_modules`; `scripts/backends/llama_cpp.py` makes such a folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llava_train.errors import ExportError

VARIABLE = "LLAVA_TRAIN_LLAMA_NODE"
PACKAGE = Path("node_modules/@fugood/llama.node")
_SCRIPT = Path(__file__).parent / "ask.mjs"
_LONGEST_S = 600


def runtime() -> Path | None:
    """The folder that the variable names, if llama.cpp and node are there."""
    folder = Path(os.environ.get(VARIABLE) or "/nowhere")
    return folder if (folder / PACKAGE).is_dir() and shutil.which("node") else None


def version(modules: Path) -> str:
    """Which llama.cpp it is."""
    package = json.loads((modules / PACKAGE / "package.json").read_text(encoding="utf-8"))
    lines = (modules / PACKAGE / "lib" / "version.js").read_text(encoding="utf-8").splitlines()
    build = next((line.split("=")[1].strip(" ;'\"") for line in lines if "BUILD_NUMBER =" in line and "'" in line), "?")
    return f"llama.cpp b{build} (@fugood/llama.node {package['version']})"


def ask(modules: Path, folder: Path, question: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a question (`ask.mjs` says what both hold). Raises ExportError if llama.cpp fails."""
    with TemporaryDirectory() as scratch:
        job, out = Path(scratch) / "job.json", Path(scratch) / "answer.json"
        files = {"model": str(folder / "model.gguf"), "mmproj": str(folder / "mmproj.gguf")}
        job.write_text(json.dumps({"modules": str(modules), **files, **question}), encoding="utf-8")
        command = ["node", str(_SCRIPT), str(job), str(out)]
        options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "timeout": _LONGEST_S}
        try:
            done = subprocess.run(command, check=False, **options)
        except subprocess.TimeoutExpired as error:
            raise ExportError(f"llama.cpp gave no answer in {_LONGEST_S} s") from error
        if done.returncode or not out.exists():
            errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            said = errors[-1].strip() if errors else f"exit status {done.returncode}"
            raise ExportError(f"llama.cpp cannot read the export: {said}")
        answer: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return answer
