"""DeepSpeed's configuration: ours, or a file of the user's that leaves to the recipe what the recipe decides."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_train.errors import DataError, RecipeError
from llava_train.recipe import EngineSettings, OptimizationSettings, Recipe
from llava_train.training.engines.ranks import Ranks
from llava_train.training.engines.zero_config import stage_of, zero_config

RANKS = Ranks(0, 2, torch.device("cpu"))
LLAVA: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 500, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "offload_optimizer": {"device": "auto"},
        "offload_param": {},
    },
}
"""Laid out as the files that LLaVA is trained with."""


def configured(file: Path | None = None, stage: int = 3, offload: Any = "none", precision: Any = "bf16") -> dict:
    engine = EngineSettings(offload=offload, deepspeed_config=str(file) if file else None)
    optimization = OptimizationSettings(precision=precision, max_grad_norm=0.7)
    return zero_config(Recipe(engine=engine, optimization=optimization), RANKS, stage)


def written(folder: Path, value: Any) -> Path:
    path = folder / "zero.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_file_like_llavas_is_taken_as_it_is(tmp_path: Path, precision: str) -> None:
    config = configured(written(tmp_path, LLAVA), precision=precision)
    assert config.pop("zero_optimization") == {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "stage3_max_live_parameters": 1e9,
        "offload_param": {},
    }
    scale = {"loss_scale": 0, "loss_scale_window": 500, "min_loss_scale": 1} if precision == "fp16" else {}
    assert config.pop("fp16") == {**scale, "enabled": precision == "fp16"}
    assert config.pop("bf16") == {"enabled": precision == "bf16"}
    assert config.pop("data_types", None) == ({"grad_accum_dtype": "fp32"} if precision == "bf16" else None)
    assert config == {
        "train_micro_batch_size_per_gpu": 1,  # the loop sets the boundary of a step
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.7,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


DECIDED = {
    "train_batch_size": (256, "optimization.global_batch_size"),
    "train_micro_batch_size_per_gpu": (4, "optimization.micro_batch_size"),
    "gradient_accumulation_steps": (1, "optimization.global_batch_size"),
    "gradient_clipping": (1.0, "optimization.max_grad_norm"),
    "optimizer": ({"type": "AdamW", "params": {"lr": "auto"}}, "optimization"),
    "scheduler": ({"type": "WarmupLR"}, "optimization.schedule"),
}


@pytest.mark.parametrize("key", DECIDED)
def test_what_the_recipe_decides_is_refused_by_name(tmp_path: Path, key: str) -> None:
    value, place = DECIDED[key]
    with pytest.raises(RecipeError) as caught:
        configured(written(tmp_path, {**LLAVA, key: value}))
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/zero.json: decides what the recipe decides",
        f'  {key}: {place} of the recipe decides; remove it, or write "auto"',
    ]


@pytest.mark.parametrize("value", [{"enabled": True}, {"enabled": False}, True])
def test_precision_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    with pytest.raises(RecipeError, match=r"(?s)\n  bf16\.enabled: optimization\.precision.*\n  fp16\.enabled: "):
        configured(written(tmp_path, {**LLAVA, "fp16": value, "bf16": value}))


def test_all_of_them_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        configured(written(tmp_path, {**LLAVA, **{key: value for key, (value, _) in DECIDED.items()}}))
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == sorted(DECIDED)


@pytest.mark.parametrize(
    ("value", "stage", "message"),
    [
        (LLAVA, 2, r"zero\.json: is for ZeRO-3, engine\.kind says deepspeed_zero2"),
        ({"zero_optimization": {"stage": 0}}, 3, "stage must be 1, 2 or 3, not 0"),
        ({"zero_optimization": {"stage": "auto"}}, 3, "stage must be 1, 2 or 3, not 'auto'"),
        ({"zero_optimization": True}, 3, "stage must be 1, 2 or 3, not None"),
        ({}, 3, "stage must be 1, 2 or 3, not None"),
        ([3], 3, "stage must be 1, 2 or 3, not None"),
    ],
)
def test_a_wrong_stage_is_told(tmp_path: Path, value: Any, stage: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        configured(written(tmp_path, value), stage)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"zero\.json:1:23: not JSON"):
        configured(written(tmp_path, '{"zero_optimization": }'))
    with pytest.raises(DataError, match=r"none\.json: cannot be read: No such file"):
        stage_of(tmp_path / "none.json")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", ["none", "optimizer", "all"])
def test_offload_is_said_in_the_recipe(tmp_path: Path, stage: int, offload: str) -> None:
    away = {"device": "cpu", "pin_memory": False}
    expected = {"offload_optimizer": away} if offload != "none" else {}
    expected |= {"offload_param": away} if offload == "all" else {}
    zero = configured(stage=stage, offload=offload)["zero_optimization"]
    assert {key: value for key, value in zero.items() if key.startswith("offload")} == expected
    assert zero["stage"] == stage
    user = copy.deepcopy(LLAVA)
    user["zero_optimization"] |= {"stage": stage, "offload_optimizer": {"device": "nvme", "nvme_path": "/disk"}}
    zero = configured(written(tmp_path, user), stage, offload)["zero_optimization"]
    assert zero["offload_optimizer"] == (away if offload != "none" else {"device": "nvme", "nvme_path": "/disk"})
    assert zero["offload_param"] == (away if offload == "all" else {})


def test_gradients_of_bf16_are_added_in_float32() -> None:
    found = {(s, p): configured(stage=s, precision=p).get("data_types") for s in (1, 2, 3) for p in ("bf16", "fp32")}
    assert {key for key, value in found.items() if value == {"grad_accum_dtype": "fp32"}} == {(2, "bf16"), (3, "bf16")}
    assert {value is None for key, value in found.items() if key not in ((2, "bf16"), (3, "bf16"))} == {True}
