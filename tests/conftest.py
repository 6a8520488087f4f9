"""Fixtures: tiny parts and one finished run, made once a session."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests import tiny

REPOSITORY = Path(__file__).parent.parent
# A shell that starts the suite in the background has it ignore Ctrl-C, nohup a lost terminal, and both go on to every
# process it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
GOLDEN = Path(__file__).parent / "data" / "golden"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the corpora out unless `-m` names them, whatever else it says."""
    if "corpus" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("corpus")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("corpus")]


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `vision/`, `llm/` and `data/`, never changed by a test."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.make_tower(folder / "vision")
    tiny.make_llm(folder / "llm")
    tiny.make_data(folder / "data")
    return folder


@pytest.fixture
def workplace(parts: Path, tmp_path: Path) -> Path:
    """A copy of the parts that a test may change."""
    for name in ("vision", "llm", "data"):
        shutil.copytree(parts / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="session")
def finished(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run (8 steps), never changed by a test."""
    from llava_train import load_recipe, train

    folder = tmp_path_factory.mktemp("finished")
    for name in ("vision", "llm", "data"):
        (folder / name).symlink_to(parts / name)
    return train(load_recipe(tiny.make_recipe(folder)))
