"""Which weights train: frozen, full or LoRA for each part, in which precision, at which rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlavaForConditionalGeneration

from llava_train.errors import RecipeError
from llava_train.model.spec import LoraSpec
from llava_train.recipe import OptimizationSettings, TuneSettings

PARTS = ("vision", "connector", "llm")
_PREFIXES = {
    "vision": ("model.vision_tower.",),
    "connector": ("model.multi_modal_projector.",),
    "llm": ("model.language_model.", "lm_head."),
}
ADAPTER = "default"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""`optimization.precision` -> dtype."""


def part_of(name: str) -> str:
    """The part that a parameter or module name of the model belongs to."""
    for part, prefixes in _PREFIXES.items():
        if name.startswith(prefixes):
            return part
    raise ValueError(f"{name} belongs to no part")


def linear_layers(model: nn.Module, part: str) -> tuple[str, ...]:
    """Full names of the linear layers of a part, without the LM head (LLaVA's `find_all_linear_names`).

    Full names, because bare ones such as `q_proj` would also match the vision tower.
    """
    prefix = _PREFIXES[part][0]
    return tuple(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(prefix)
    )


def add_lora(model: LlavaForConditionalGeneration, spec: LoraSpec) -> None:
    """Put LoRA adapters (PEFT) on the layers that `spec` names, in place."""
    config = LoraConfig(r=spec.r, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=list(spec.targets))
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def merge_lora(model: LlavaForConditionalGeneration) -> None:
    """Fold all adapters into the weights they sit on; the model is then of stock modules again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def apply_tuning(model: LlavaForConditionalGeneration, tune: TuneSettings, seed: int) -> LoraSpec | None:
    """Set `requires_grad` of every parameter as `tune` says, adding adapters where a part is `lora`.

    Returns the adapters' description, or None.
    """
    model.requires_grad_(False)
    modes = {"vision": tune.vision.mode, "connector": tune.connector.mode, "llm": tune.llm.mode}
    targets = tuple(name for part in PARTS if modes[part] == "lora" for name in linear_layers(model, part))
    spec = LoraSpec(tune.lora.r, tune.lora.alpha, tune.lora.dropout, targets) if targets else None
    if spec:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_lora(model, spec)
    for name, parameter in model.named_parameters():
        mode = modes[part_of(name)]
        parameter.requires_grad_(mode == "full" or (mode == "lora" and is_adapter(name)))
    if modes["vision"] != "frozen":
        _freeze_unreached(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError("tune: nothing would train (the connector has no weights and the other parts are frozen)")
    return spec


def _freeze_unreached(model: LlavaForConditionalGeneration) -> None:
    """Freeze the tower's weights above the feature layer: no gradient reaches them, and DDP would wait for one."""
    config, tower = model.config, model.model.vision_tower
    size = config.vision_config.image_size
    hidden = tower(torch.zeros(1, 3, size, size, dtype=tower.dtype), output_hidden_states=True).hidden_states
    layers = config.vision_feature_layer
    sum(hidden[layer].sum() for layer in (layers if isinstance(layers, list) else [layers])).backward()
    for parameter in tower.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
    model.zero_grad(set_to_none=True)


def is_adapter(name: str) -> bool:
    """Whether a parameter name is a LoRA weight."""
    return ".lora_A." in name or ".lora_B." in name


def planned_dtypes(model: LlavaForConditionalGeneration, precision: str) -> dict[str, torch.dtype]:
    """The precision of each weight by name: frozen parts take the run's.

    Trained weights, the connector, and every weight of a part that trains in full are float32: layers of one part
    meet outside autocast, too.
    """
    dtype = PRECISIONS[precision]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    full = {"connector", *(part_of(name) for name in trained if not is_adapter(name))}
    return {
        name: torch.float32 if parameter.requires_grad or part_of(name) in full else dtype
        for name, parameter in model.named_parameters()
    }


@dataclass(frozen=True)
class Group:
    """Parameters that train at one rate with one weight decay."""

    part: str
    learning_rate: float
    weight_decay: float
    names: tuple[str, ...]
    size: int
    """Number of weights in all of them"""


def parameter_groups(
    model: LlavaForConditionalGeneration, tune: TuneSettings, optimization: OptimizationSettings
) -> list[Group]:
    """Trained parameters by part and decay: biases, norms and other vectors are not decayed."""
    rates = {"vision": tune.vision, "connector": tune.connector, "llm": tune.llm}
    groups = []
    for part in PARTS:
        rate = rates[part].learning_rate or optimization.learning_rate
        trained = [
            (name, parameter)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and part_of(name) == part
        ]
        for decay, chosen in (
            (optimization.weight_decay, [pair for pair in trained if pair[1].ndim >= 2]),
            (0.0, [pair for pair in trained if pair[1].ndim < 2]),
        ):
            if chosen:
                size = sum(parameter.numel() for _, parameter in chosen)
                groups.append(Group(part, rate, decay, tuple(name for name, _ in chosen), size))
    return groups


def tuning_table(
    model: LlavaForConditionalGeneration, tune: TuneSettings, groups: list[Group], dtypes: dict[str, torch.dtype]
) -> str:
    """What trains, how many weights, at which rate, and the precision of the rest: printed at start."""
    modes = {"vision": tune.vision.mode, "connector": tune.connector.mode, "llm": tune.llm.mode}
    rows = [("part", "mode", "trained", "of", "rate", "precision of frozen weights")]
    for part in PARTS:
        parameters = {name: p for name, p in model.named_parameters() if part_of(name) == part}
        trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
        rates = {f"{group.learning_rate:g}" for group in groups if group.part == part}
        frozen = {str(dtypes[n]).removeprefix("torch.") for n, p in parameters.items() if not p.requires_grad}
        rows.append(
            (
                part,
                modes[part],
                f"{trained:,}",
                f"{sum(p.numel() for p in parameters.values()):,}",
                ", ".join(sorted(rates)) or "-",
                ", ".join(sorted(frozen)) or "-",
            )
        )
    return "\n".join(_aligned(rows))


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    sizes = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(
            cell.rjust(size) if column in (2, 3) else cell.ljust(size)
            for column, (cell, size) in enumerate(zip(row, sizes))
        ).rstrip()
