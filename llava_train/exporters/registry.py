"""The table of export targets: a function each, from a merged model to a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llava_train.model.assemble import Assembly
from llava_train.registry import Registry

Write = Callable[[Assembly, Path], None]
TARGETS: Registry[Write] = Registry("export target")
