"""The configuration that DeepSpeed is started with: ours for the stage, or a file of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_train.errors import RecipeError
from llava_train.files import read_json
from llava_train.recipe import Recipe
from llava_train.training.engines.ranks import Ranks

_OURS = {
    "train_batch_size": "optimization.global_batch_size",
    "train_micro_batch_size_per_gpu": "optimization.micro_batch_size",
    "gradient_accumulation_steps": "optimization.global_batch_size",
    "gradient_clipping": "optimization.max_grad_norm",
    "optimizer": "optimization",
    "scheduler": "optimization.schedule",
}
"""Keys of a DeepSpeed file that the recipe decides, and where."""


def zero_config(recipe: Recipe, ranks: Ranks, stage: int) -> dict[str, Any]:
    """What `deepspeed.initialize` takes. Raises RecipeError where a file contradicts the recipe.

    A user's file decides everything about `zero_optimization`; of what the recipe decides it may only say "auto".
    """
    file = recipe.engine.deepspeed_config
    config = _user_config(Path(file).expanduser(), stage) if file else {"zero_optimization": _defaults(stage, ranks)}
    zero = config["zero_optimization"]
    if recipe.engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": ranks.device.type == "cuda"}
    if recipe.engine.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": ranks.device.type == "cuda"}
    precision = recipe.optimization.precision
    scale = {key: value for key, value in config.get("fp16", {}).items() if precision == "fp16"}
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optimization.max_grad_norm,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {**scale, "enabled": precision == "fp16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its CPU Adam is compiled at first use; torch's own needs no compiler
    }
    if precision == "bf16" and stage > 1:
        config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    elif precision == "bf16" and config.get("data_types") == {"grad_accum_dtype": "fp32"}:
        raise RecipeError(f"{file}: data_types.grad_accum_dtype: fp32 is for ZeRO-2 and 3; take those, or remove it")
    return config


def _defaults(stage: int, ranks: Ranks) -> dict[str, Any]:
    common = {"stage": stage, "contiguous_gradients": True, "overlap_comm": ranks.device.type == "cuda"}
    return common if stage < 3 else {**common, "stage3_param_persistence_threshold": 10_000}


def stage_of(path: Path) -> int:
    """The ZeRO stage that a user's file names."""
    config = read_json(path)
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        raise RecipeError(f"{path}: zero_optimization.stage must be 1, 2 or 3, not {stage!r}")
    return int(stage)


def _user_config(path: Path, stage: int) -> dict[str, Any]:
    if stage_of(path) != stage:
        raise RecipeError(f"{path}: is for ZeRO-{stage_of(path)}, engine.kind says deepspeed_zero{stage}")
    config = _without_auto(read_json(path))
    said = {key: _OURS[key] for key in sorted(_OURS.keys() & config.keys())}
    for key in ("bf16", "fp16"):  # how fp16 scales the loss the file may say, not whether
        section = config.get(key, {})
        if not isinstance(section, dict) or "enabled" in section:
            said[f"{key}.enabled"] = "optimization.precision"
    if said:
        lines = [f'  {key}: {place} of the recipe decides; remove it, or write "auto"' for key, place in said.items()]
        raise RecipeError(f"{path}: decides what the recipe decides\n" + "\n".join(lines))
    return config


def _without_auto(value: Any) -> Any:
    """A configuration without its "auto" values, and without sections that held nothing else."""
    if not isinstance(value, dict):
        return value
    kept = {key: _without_auto(item) for key, item in value.items() if item != "auto"}
    return {key: item for key, item in kept.items() if item != {} or value[key] == {}}
