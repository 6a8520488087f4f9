"""Which engine runs a recipe, and the reason that is told."""

import json
from pathlib import Path

import pytest
import torch

from llava_train.recipe import EngineSettings, Recipe
from llava_train.training.engines import choice
from llava_train.training.engines.choice import ENGINES, Load, choose
from llava_train.training.engines.ranks import Ranks

SMALL = Load(frozen_bytes=10**9, trained=10**7)
STAGE1 = Load(frozen_bytes=14 * 10**9, trained=21 * 10**6)
FULL = Load(frozen_bytes=6 * 10**8, trained=7 * 10**9)


@pytest.mark.parametrize(
    ("load", "ranks", "memory", "deepspeed", "kind", "reason"),
    [
        (FULL, 1, 80, True, "ddp", "nothing to share with"),
        (SMALL, 2, 2, True, "ddp", "1.2 GB of weights and optimizer fit into 1.2 GB a process"),
        (STAGE1, 8, 40, True, "ddp", "14.3 GB of weights and optimizer fit into 24.0 GB a process"),
        (STAGE1, 8, 40, False, "ddp", "14.3 GB of weights and optimizer fit into 24.0 GB a process"),
        (FULL, 8, 80, True, "deepspeed_zero2", "112.6 GB do not fit into 48.0 GB a process, 39.1 GB do"),
        (FULL, 8, 80, False, "fsdp2", "39.1 GB"),
        (FULL, 2, 80, True, "deepspeed_zero3", "70.6 GB of weights do not fit into 48.0 GB a process"),
        (FULL, 2, 80, False, "fsdp2", "70.6 GB of weights do not fit into 48.0 GB a process"),
    ],
)
def test_the_plainest_that_fits(
    monkeypatch: pytest.MonkeyPatch, load: Load, ranks: int, memory: int, deepspeed: bool, kind: str, reason: str
) -> None:
    monkeypatch.setattr(choice, "device_memory", lambda device: memory * 10**9)
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: object() if deepspeed else None)
    found, why = choose(Recipe(), Ranks(0, ranks, torch.device("cpu")), load)
    assert found == kind
    assert reason in why


@pytest.mark.parametrize("kind", ENGINES)
def test_what_the_recipe_names_is_taken(kind: str) -> None:
    recipe = Recipe(engine=EngineSettings(kind=kind, deepspeed_config="none.json"))
    for ranks in (1, 8):
        assert choose(recipe, Ranks(0, ranks, torch.device("cpu")), FULL) == (kind, "the recipe names it")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_file_of_the_users_names_the_stage(tmp_path: Path, stage: int) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    recipe = Recipe(engine=EngineSettings(deepspeed_config=str(path)))
    found = choose(recipe, Ranks(0, 1, torch.device("cpu")), SMALL)
    assert found == (f"deepspeed_zero{stage}", f"{path} names the stage")


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = choice.device_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choice.device_memory(torch.device("cpu")) == alone // 4
