"""Which weights train: frozen, full or LoRA for each part, in which precision, at which rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from llava_train.errors import RecipeError
from llava_train.model.spec import LoraSpec
from llava_train.model.towers.features import image_features
from llava_train.recipe import OptimizationSettings, TuneSettings

PARTS = ("vision", "connector", "llm")
PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the names of weights in an adapter's file"""
_PREFIXES = {
    "model.vision_tower.": "vision",
    "model.visual.": "vision",
    "model.vision_model.": "vision",
    "model.multi_modal_projector.": "connector",
    "model.image_newline": "connector",
    "model.visual.merger.": "connector",
    "model.visual.deepstack_merger_list.": "connector",
    "model.cross_attention.": "connector",
    "model.language_model.": "llm",
    "lm_head.": "llm",
}
"""How names of weights begin -> the part; the longest that fits counts."""
_SEVERAL_TOWERS = "model.vision_tower.towers."
ADAPTER = "default"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""`optimization.precision` -> dtype."""


def part_of(name: str) -> str:
    """The part that a parameter or module name of the model belongs to."""
    fitting = [prefix for prefix in _PREFIXES if f"{name}.".startswith(prefix)]
    if not fitting:
        raise ValueError(f"{name} belongs to no part")
    return _PREFIXES[max(fitting, key=len)]


def linear_layers(model: nn.Module, part: str) -> tuple[str, ...]:
    """Full names of the linear layers of a part, without the LM head (LLaVA's `find_all_linear_names`).

    Full names, because bare ones such as `q_proj` would also match the vision tower.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return tuple(name for name in linear if not name.startswith("lm_head") and part_of(name) == part)


def add_lora(model: PreTrainedModel, spec: LoraSpec) -> None:
    """Put LoRA adapters (PEFT) on the layers that `spec` names, in place."""
    config = LoraConfig(r=spec.r, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=list(spec.targets))
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def merge_lora(model: PreTrainedModel) -> None:
    """Fold all adapters into the weights they sit on; the model is then of stock modules again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def apply_tuning(model: PreTrainedModel, tune: TuneSettings, seed: int) -> LoraSpec | None:
    """Set `requires_grad` of every parameter as `tune` says, adding adapters where a part is `lora`.

    Returns the adapters' description, or None.
    """
    modes = {"vision": tune.vision.mode, "connector": tune.connector.mode, "llm": tune.llm.mode}
    unreached = _unreached(model) if modes["vision"] != "frozen" else set()
    model.requires_grad_(False)
    targets = tuple(
        name
        for part in PARTS
        if modes[part] == "lora"
        for name in linear_layers(model, part)
        if f"{name}.weight" not in unreached
    )
    spec = LoraSpec(tune.lora.r, tune.lora.alpha, tune.lora.dropout, targets) if targets else None
    if spec:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_lora(model, spec)
    for name, parameter in model.named_parameters():
        mode = modes[part_of(name)]
        parameter.requires_grad_((mode == "full" and name not in unreached) or (mode == "lora" and is_adapter(name)))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError("tune: nothing would train (the connector has no weights and the other parts are frozen)")
    return spec


def _unreached(model: PreTrainedModel) -> set[str]:
    """The tower's weights that its features do not depend on: DDP would wait for their gradients.

    Layers above the feature layer, final norms, heads, mask tokens. None for models whose class is not of LLaVA's kind:
    those use all of what they have.
    """
    tower = getattr(model.model, "vision_tower", None)
    if tower is None:
        return set()
    size, weights = model.config.vision_config.image_size, dict(tower.named_parameters())
    before = {name: weight.requires_grad for name, weight in weights.items()}
    tower.requires_grad_(True)
    pixels = torch.zeros(1, 3, size, size, dtype=tower.dtype, device=tower.device)
    found = torch.autograd.grad(image_features(model, pixels).sum(), list(weights.values()), allow_unused=True)
    for name, weight in weights.items():
        weight.requires_grad_(before[name])
    return {f"model.vision_tower.{name}" for name, gradient in zip(weights, found) if gradient is None}


def is_adapter(name: str) -> bool:
    """Whether a parameter name is a LoRA weight."""
    return ".lora_A." in name or ".lora_B." in name


def planned_dtypes(model: PreTrainedModel, precision: str) -> dict[str, torch.dtype]:
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


def parameter_groups(model: PreTrainedModel, tune: TuneSettings, optimization: OptimizationSettings) -> list[Group]:
    """Trained parameters by part, rate and decay: biases, norms and other vectors are not decayed.

    With `layer_decay`, layer k of n that train learns at rate * layer_decay ** (n - k), what lies below the first one
    (embeddings) a step slower than that, and what lies above the last at the rate.
    """
    settings = {"vision": tune.vision, "connector": tune.connector, "llm": tune.llm}
    groups = []
    for part in PARTS:
        rate, decayed = settings[part].learning_rate or optimization.learning_rate, settings[part].layer_decay
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad and part_of(n) == part}
        below = dict.fromkeys(trained, 0) if decayed is None else _layers_to_top(model, list(trained))
        for depth in sorted({*below.values()}, reverse=True):
            own = rate if decayed is None else rate * decayed**depth
            level = {name: trained[name] for name in trained if below[name] == depth}
            for decay, names in (
                (optimization.weight_decay, tuple(name for name, p in level.items() if p.ndim >= 2)),
                (0.0, tuple(name for name, p in level.items() if p.ndim < 2)),
            ):
                if names:
                    size = sum(level[name].numel() for name in names)
                    groups.append(Group(part, own, decay, names, size))
    return groups


def _layers_to_top(model: PreTrainedModel, names: list[str]) -> dict[str, int]:
    """How many layers lie between each of a part's weights and the top of its tower or decoder, itself counted.

    Of n layers the last has 0, the first n - 1, what is registered before them n, what is registered behind them 0.
    """
    stacks: dict[str, list[str]] = defaultdict(list)
    for name in names:
        inside = name.removeprefix(_SEVERAL_TOWERS)
        stacks[inside.split(".")[0] if inside != name else ""].append(name)
    found = {}
    for stack in stacks.values():
        layers = {name: _layer_of(model, name) for name in stack}
        order = {layer: number for number, layer in enumerate(dict.fromkeys(filter(None, layers.values())), start=1)}
        reached = 0
        for name in stack:
            layer = layers[name]
            number = order[layer] if layer else len(order) if reached else 0
            reached = max(reached, number)
            found[name] = len(order) - number
    return found


def _layer_of(model: nn.Module, name: str) -> str | None:
    """The layer that a weight is in: the outermost member on its path of a list of modules of one class."""
    module, path = model, name.split(".")
    for place, step in enumerate(path[:-1]):
        child = getattr(module, step)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(each) for each in module}) == 1:
            return ".".join(path[: place + 1])
        module = child
    return None


def tuning_table(
    model: PreTrainedModel, tune: TuneSettings, groups: list[Group], dtypes: dict[str, torch.dtype]
) -> str:
    """What trains, how many weights, at which rate, and the precision of the rest: printed at start."""
    modes = {"vision": tune.vision.mode, "connector": tune.connector.mode, "llm": tune.llm.mode}
    rows = [("part", "mode", "trained", "of", "rate", "precision of frozen weights")]
    for part in PARTS:
        parameters = {name: p for name, p in model.named_parameters() if part_of(name) == part}
        trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
        rates = sorted({group.learning_rate for group in groups if group.part == part})
        frozen = {str(dtypes[n]).removeprefix("torch.") for n, p in parameters.items() if not p.requires_grad}
        rows.append(
            (
                part,
                modes[part],
                f"{trained:,}",
                f"{sum(p.numel() for p in parameters.values()):,}",
                f"{rates[0]:g} to {rates[-1]:g}" if len(rates) > 1 else ", ".join(f"{rate:g}" for rate in rates) or "-",
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
