from pathlib import Path

import pytest
import torch

from llava_train import load_recipe
from llava_train.errors import RecipeError
from llava_train.model.towers.features import image_features
from llava_train.model.tuning import (
    apply_tuning,
    is_adapter,
    merge_lora,
    parameter_groups,
    part_of,
    planned_dtypes,
    tuning_table,
)
from llava_train.recipe import Mode, OptimizationSettings, PartTuning, TuneSettings
from llava_train.training.setup import build
from tests import tiny
from tests.model.towers.test_features import make


def tuned(folder: Path, *overrides: str):
    recipe = load_recipe(tiny.make_recipe(folder), list(overrides))
    model = build(recipe).model
    return recipe, model, apply_tuning(model, recipe.tune, recipe.seed)


def test_lora_sits_on_every_linear_layer_of_the_llm_and_nowhere_else(workplace: Path) -> None:
    _, model, spec = tuned(workplace)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if is_adapter(name)}
    assert len(adapted) == 2 * 7
    assert {part_of(name) for name in adapted} == {"llm"}
    assert not any("lm_head" in name for name in adapted)
    assert set(spec.targets) == adapted
    assert (spec.r, spec.alpha) == (4, 8)


@pytest.mark.parametrize("vision", ["frozen", "full", "lora"])
@pytest.mark.parametrize("connector", ["frozen", "full"])
@pytest.mark.parametrize("llm", ["frozen", "full", "lora"])
def test_each_part_trains_as_it_is_told(workplace: Path, vision: str, connector: str, llm: str) -> None:
    overrides = [f"tune.vision.mode={vision}", f"tune.connector.mode={connector}", f"tune.llm.mode={llm}"]
    if {vision, connector, llm} == {"frozen"}:
        with pytest.raises(RecipeError):
            tuned(workplace, *overrides)
        return
    _, model, _ = tuned(workplace, *overrides)
    trained = {part: [] for part in ("vision", "connector", "llm")}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained[part_of(name)].append(name)
    for part, mode in (("vision", vision), ("connector", connector), ("llm", llm)):
        assert bool(trained[part]) == (mode != "frozen")
        assert all(is_adapter(name) for name in trained[part]) or mode == "full"
    if llm == "full":
        assert "lm_head.weight" in trained["llm"]


def test_nothing_above_the_feature_layer_waits_for_a_gradient(workplace: Path) -> None:
    _, model, _ = tuned(workplace, "tune.vision.mode=full")
    names = [name for name, p in model.named_parameters() if p.requires_grad and part_of(name) == "vision"]
    assert any(".layers.1." in name for name in names)
    assert not any(".layers.2." in name or "post_layernorm" in name for name in names)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("towers", [*tiny.TOWERS, ["siglip", "dinov2-registers"]], ids=str)
def test_whatever_trains_in_a_tower_gets_a_gradient(towers: str | list[str], mode: Mode) -> None:
    model = make(towers, [-2, -1] if isinstance(towers, list) else -2, "full")
    apply_tuning(model, TuneSettings(vision=PartTuning(mode), connector=PartTuning("frozen")), seed=0)
    for parameter in model.parameters():
        parameter.data += 0.01  # LoRA's B begins as zeros, which no gradient passes
    image_features(model, torch.randn(1, 3, 28, 28)).square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {part_of(name) for name in trained} == {"vision"}
    assert all(is_adapter(name) for name in trained) == (mode == "lora")
    reached = {name.split(".towers.")[1][0] for name in trained if ".towers." in name}
    assert len(reached) == (2 if isinstance(towers, list) else len(reached))


def test_the_longest_prefix_names_the_part() -> None:
    parts = {
        "model.vision_tower.towers.0.encoder.layers.0.norm1.weight": "vision",
        "model.visual.blocks.0.attn.qkv.weight": "vision",
        "model.visual.merger.mlp.0.weight": "connector",
        "model.visual.deepstack_merger_list.0.norm.weight": "connector",
        "model.vision_model.transformer.layers.0.gate_attn": "vision",
        "model.image_newline": "connector",
        "model.cross_attention.0.gate": "connector",
        "model.language_model.layers.0.cross_attn.q_proj.weight": "llm",
        "lm_head.weight": "llm",
    }
    assert {name: part_of(name) for name in parts} == parts
    with pytest.raises(ValueError, match="belongs to no part"):
        part_of("model.something")


def test_rates_fall_layer_by_layer_from_the_top() -> None:
    model = make(["clip", "dinov2"], [-2, -1], "default")
    parts = {"vision": PartTuning("full", 0.1, layer_decay=0.5), "llm": PartTuning("full", 0.2, layer_decay=0.1)}
    tune = TuneSettings(**parts)
    apply_tuning(model, tune, seed=0)
    groups = parameter_groups(model, tune, OptimizationSettings(learning_rate=0.3))
    rates = {name: group.learning_rate for group in groups for name in group.names}
    tower = "model.vision_tower.towers."
    wanted = {
        f"{tower}0.embeddings.class_embedding": 0.1 / 4,
        f"{tower}0.pre_layrnorm.weight": 0.1 / 4,
        f"{tower}0.encoder.layers.0.mlp.fc1.weight": 0.1 / 2,
        f"{tower}0.encoder.layers.1.mlp.fc1.weight": 0.1,
        f"{tower}1.embeddings.cls_token": 0.1 / 8,
        f"{tower}1.encoder.layer.0.mlp.fc1.bias": 0.1 / 4,
        f"{tower}1.encoder.layer.2.mlp.fc1.bias": 0.1,
        "model.language_model.embed_tokens.weight": 0.02,
        "model.language_model.layers.0.mlp.up_proj.weight": 0.2,
        "model.language_model.norm.weight": 0.2,
        "lm_head.weight": 0.2,
        "model.multi_modal_projector.linear_1.weight": 0.3,
    }
    assert {name: rates[name] for name in wanted} == pytest.approx(wanted)
    assert rates.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(groups) == 8 + 4 + 2 - 1  # depths of each part, matrices and vectors; embeddings have no vectors
    table = tuning_table(model, tune, groups, planned_dtypes(model, "bf16"))
    assert "0.0125 to 0.1" in table


def test_groups_have_their_rates_and_no_decay_on_vectors(workplace: Path) -> None:
    recipe, model, _ = tuned(
        workplace, "tune.connector.learning_rate=3e-5", "optimization.weight_decay=0.1", "tune.vision.mode=full"
    )
    groups = parameter_groups(model, recipe.tune, recipe.optimization)
    assert {(g.part, g.learning_rate) for g in groups} == {("vision", 0.01), ("connector", 3e-5), ("llm", 0.01)}
    for group in groups:
        parameters = [model.get_parameter(name) for name in group.names]
        assert all((p.ndim >= 2) == (group.weight_decay > 0) for p in parameters)
        assert group.size == sum(p.numel() for p in parameters)
    counted = sum(len(group.names) for group in groups)
    assert counted == sum(p.requires_grad for p in model.parameters())
    table = tuning_table(model, recipe.tune, groups, planned_dtypes(model, "bf16"))
    assert "connector  full" in table
    assert "3e-05" in table


def test_frozen_weights_take_the_runs_precision(workplace: Path) -> None:
    _, model, _ = tuned(workplace)
    dtypes = planned_dtypes(model, "bf16")
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if parameter.requires_grad or part_of(name) == "connector" else torch.bfloat16
        assert dtypes[name] == wanted


def test_merging_changes_no_logit(workplace: Path) -> None:
    _, model, _ = tuned(workplace, "tune.vision.mode=lora")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    ids = torch.tensor([[1, 5, *[model.config.image_token_id] * 4, 9, 10]])
    pixels = torch.rand(1, 3, 28, 28)
    model.eval()
    with torch.no_grad():
        before = model(input_ids=ids, pixel_values=pixels).logits
        merge_lora(model)
        after = model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    assert not any("lora" in name or "base_layer" in name for name, _ in model.named_modules())
