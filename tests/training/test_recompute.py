"""Recompute changes what is kept and nothing of what is computed."""

import pytest
import torch

from llava_train.errors import RecipeError
from llava_train.model.memory import Conditions, Kept, measure_kept
from llava_train.model.towers.features import tower_layers
from llava_train.model.tuning import planned_dtypes
from llava_train.training.engines.base import cast
from llava_train.training.objective import Objective
from llava_train.training.recompute import (
    Memory,
    MicroBatch,
    Spread,
    apply_recompute,
    choose_recompute,
    plan_memory,
    resident_bytes,
)
from tests.model.measured import Live, batch, llava

LENGTHS = [60, 40, 50, 50]
ALL = {"vision": "full", "connector": "full", "llm": "full"}


@pytest.mark.parametrize(
    ("setting", "room", "count"),
    [
        ("none", 0, 0),
        ("full", 1e9, 8),
        ("auto", 800, 0),  # 8 x 100
        ("auto", 799, 1),
        ("auto", 710, 1),  # 10 + 7 x 100
        ("auto", 709, 2),
        ("auto", 170, 7),  # 7 x 10 + 100
        ("auto", 169, 8),  # the last one is whole while it is computed again: nothing is gained, and nothing else left
        ("auto", -1, 8),
        ("selective", 1e9, 1),
        ("selective", 709, 2),
        ("selective", 0, 8),
    ],
)
def test_as_few_layers_are_recomputed_as_make_the_rest_fit(setting: str, room: float, count: int) -> None:
    assert choose_recompute(setting, layers=8, layer=100, entry=10, room=room) == count


@pytest.mark.parametrize("modes", [{"connector": "full", "llm": "lora"}, ALL])
def test_loss_and_gradients_stay_the_same_to_the_last_bit(modes) -> None:
    model = llava(modes, dropout=0.1)
    objective, made = Objective(model).train(), batch(model, LENGTHS)
    seen = []
    for count in (0, 1, 4):
        apply_recompute(model, count)
        model.zero_grad()
        torch.manual_seed(1)
        loss = objective(made)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        seen.append((loss.detach(), gradients))
    assert len(seen[0][1]) == sum(p.requires_grad for p in model.parameters())
    for loss, gradients in seen[1:]:
        assert torch.equal(loss, seen[0][0])
        assert all(torch.equal(gradient, seen[0][1][name]) for name, gradient in gradients.items())


def flags(layers) -> list[bool]:
    return [layer.gradient_checkpointing for layer in layers]


def test_the_first_layers_are_recomputed_and_a_tower_that_trains_with_all_of_them() -> None:
    model = llava(ALL)
    decoder, tower = model.model.language_model.layers, tower_layers(model.model.vision_tower)
    apply_recompute(model, 3)
    assert (flags(decoder), flags(tower)) == ([True, True, True, False], [False] * 3)
    apply_recompute(model, 4)
    assert (flags(decoder), flags(tower)) == ([True] * 4, [True] * 3)
    apply_recompute(model, 0)
    assert (flags(decoder), flags(tower)) == ([False] * 4, [False] * 3)
    frozen = llava({"connector": "full"})
    apply_recompute(frozen, 4)
    assert flags(tower_layers(frozen.model.vision_tower)) == [False] * 3


def test_layers_that_cannot_be_recomputed_are_told() -> None:
    model = llava({"connector": "full"})
    model.model.language_model.layers[0] = torch.nn.Identity()
    apply_recompute(model, 0)
    with pytest.raises(RecipeError, match=r"speed\.recompute: Identity cannot be recomputed"):
        apply_recompute(model, 1)


@pytest.mark.parametrize(("modes", "precision"), [({"connector": "full"}, "bf16"), (ALL, "fp32")])
def test_memory_falls_as_promised(modes, precision: str) -> None:
    autocast = torch.bfloat16 if precision == "bf16" else None
    model = llava(modes)
    dtypes = planned_dtypes(model, precision)
    kept = measure_kept(model, Conditions(dtypes, autocast, "cpu", 50))
    made = batch(model, LENGTHS)
    size = MicroBatch(made.input_ids.numel(), len(LENGTHS), len(made.targets))
    whole = plan_memory("none", kept, 4, size, (0, 0), 1).activations
    saving = size.tokens * (kept.layer - kept.entry)
    plans = [
        plan_memory("none", kept, 4, size, (0, 0), whole),
        plan_memory("selective", kept, 4, size, (0, 0), 2 * whole),
        plan_memory("auto", kept, 4, size, (0, 0), (whole - 1.5 * saving) / 0.9),
        plan_memory("full", kept, 4, size, (0, 0), 2 * whole),
    ]
    assert [plan.recomputed for plan in plans] == [0, 1, 2, 4]
    objective = Objective(model).train()
    cast(objective, dtypes)
    peaks = []
    for plan in plans:
        apply_recompute(model, plan.recomputed)
        model.zero_grad()
        with Live() as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
                loss = objective(made)
            loss.backward()
        # A layer is taken for the gradients of one, which is more than they need: much, for a model of four.
        assert live.peak < plan.activations < live.peak + 1.1 * size.tokens * kept.layer
        peaks.append(live.peak)
    assert peaks == sorted(peaks, reverse=True)


def test_what_lies_in_memory_whatever_the_batch() -> None:
    model = llava({"connector": "full", "llm": "lora"})
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    every, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    mixed = resident_bytes(model, planned_dtypes(model, "bf16"), Spread())
    assert mixed == (2 * (every - trained) + 4 * trained, 12 * trained)
    halves = dict.fromkeys(planned_dtypes(model, "bf16"), torch.bfloat16)
    assert resident_bytes(model, halves, Spread(optimizer=4)) == (2 * every, 2 * trained + 12 * trained / 4)
    assert resident_bytes(model, halves, Spread(4, 4, 4)) == (2 * every / 4, 14 * trained / 4)


def test_the_start_of_a_run_says_what_it_needs() -> None:
    memory = Memory(13.5e9, 0.3e9, 21.4e9, 79.2e9, 16384, 0, 32)
    assert str(memory) == (
        "memory: 13.5 GB weights, 0.3 GB gradients and optimizer, 21.4 GB activations (16,384 tokens a micro-batch) "
        "of 79.2 GB; recompute: none"
    )
    kept = Kept(layer=1e5, entry=1e4, rest=2e4, image=1e7, image_entry=1e6, logits=4e5, copies=0)
    size = MicroBatch(16384, 16, 600)

    def told(setting, total: float) -> str:
        return str(plan_memory(setting, kept, 32, size, (13.5e9, 0.3e9), total)).partition("recompute: ")[2]

    assert told("auto", 80e9) == "none"
    assert told("auto", 60e9) == "10 of 32 layers"
    assert told("selective", 80e9) == "1 of 32 layers"
    assert told("full", 80e9) == "all layers"
    assert told("auto", 20e9) == "all layers; this may not fit"
