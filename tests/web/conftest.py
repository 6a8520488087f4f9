"""Two tiny models that say something, each something else."""

from pathlib import Path

import pytest
import torch

from llava_train import load_model
from llava_train.model.assemble import Assembly


@pytest.fixture(scope="session")
def assembly(finished: Path) -> Assembly:
    """A model with long answers, other ones to other pictures."""
    return _talkative(finished, 0)


@pytest.fixture(scope="session")
def other(finished: Path) -> Assembly:
    """The same with other weights."""
    return _talkative(finished, 1)


def _talkative(folder: Path, seed: int) -> Assembly:
    assembly = load_model(folder)
    torch.manual_seed(seed)
    for name, weight in assembly.model.named_parameters():
        if weight.dim() > 1 and "vis" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    return assembly
