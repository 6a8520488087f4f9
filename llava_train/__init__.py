"""llava_train: from a vision encoder and an LLM to a model that answers about a picture.

Everything the command line does is a function here; imports are lazy, so that `import llava_train` is fast.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "load_recipe": "llava_train.recipe",
    "Recipe": "llava_train.recipe",
    "prepare": "llava_train.training.material",
    "inspect": "llava_train.inspection",
    "train": "llava_train.training.run",
    "evaluate": "llava_train.evaluation.run",
    "export": "llava_train.exporters.run",
    "load_model": "llava_train.model.checkpoint",
    "Conversation": "llava_train.chat.session",
    "run_demo": "llava_train.demo.run",
}

__all__ = [
    "Conversation",
    "Recipe",
    "evaluate",
    "export",
    "inspect",
    "load_model",
    "load_recipe",
    "prepare",
    "run_demo",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'llava_train' has no attribute {name!r}")
