"""Cross-attention through everything that stands around a model: data, training, checkpoints, chat."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from llava_train import export, load_model
from llava_train.chat.session import Conversation
from llava_train.errors import ExportError
from llava_train.inference import Prompt, answer, message, read_pictures
from llava_train.model.costs import Counts, costs_of, step_flops
from llava_train.model.cross.fused import CrossAttentionForConditionalGeneration
from llava_train.model.memory import Conditions, measure_kept
from llava_train.recipe import load_recipe
from llava_train.training.run import train
from llava_train.training.setup import build
from tests import tiny


def recipe_of(folder: Path, **changes: object) -> Path:
    fusion = {"model__fusion": "cross_attention", "model__fusion_options": {"every": 1}}
    return tiny.make_recipe(folder, **fusion, **changes)


def test_untrained_it_is_the_language_model(tmp_path: Path) -> None:
    assembly = build(load_recipe(recipe_of(tmp_path)))
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    ids = torch.randint(5, 300, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = assembly.model(input_ids=ids).logits, bare(input_ids=ids).logits
    assert torch.equal(ours[..., : theirs.shape[-1]], theirs)
    assert assembly.spec.image_tokens == 1


@pytest.mark.parametrize("llm", ["frozen", "lora", "full"])
def test_both_stages_save_and_answer(tmp_path: Path, llm: str) -> None:
    recipe = recipe_of(tmp_path, tune__llm__mode=llm, optimization__max_steps=3, optimization__micro_batch_size=1)
    assembly = load_model(train(load_recipe(recipe)))
    assert type(assembly.model) is CrossAttentionForConditionalGeneration
    gates = [block.attention_gate.item() for block in assembly.model.model.cross_attention]
    assert all(gates)
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    pictures = read_pictures(assembly, [image])
    prompts = [Prompt((message("user", "What?", 1),), pictures), Prompt((message("user", "Say yes."),))]
    assert answer(assembly, prompts, 5) == [answer(assembly, [prompt], 5)[0] for prompt in prompts]
    image.save(tmp_path / "a.png")
    chat = Conversation(assembly, max_new_tokens=4)
    chat.show(tmp_path / "a.png")
    "".join(chat.ask("What?"))
    chat.show(tmp_path / "a.png")
    "".join(chat.ask("And this?"))
    assert len(chat.transcript()) == 4


def test_stock_layouts_have_no_place_for_it(tmp_path: Path) -> None:
    folder = train(load_recipe(recipe_of(tmp_path, optimization__max_steps=1)))
    with pytest.raises(ExportError, match="cross"):
        export(folder, tmp_path / "out")


def test_flops_and_memory_count_the_gated_layers(tmp_path: Path) -> None:
    assembly = build(load_recipe(recipe_of(tmp_path, tune__llm__mode="frozen")))
    model, width, positions = assembly.model, 32, 4
    costs = costs_of(model)
    blocks = len(model.model.cross_attention)
    assert costs.looking.linear == blocks * 2 * (2 * width**2 + 2 * 4 * width**2)
    assert costs.looking.attention == blocks * 4 * positions * width
    projector = 2 * positions * sum(p.numel() for p in model.model.multi_modal_projector.parameters() if p.ndim == 2)
    assert costs.connector.linear == projector + blocks * 4 * positions * width**2
    modes = {"vision": "frozen", "connector": "full", "llm": "frozen"}
    counts = Counts(tokens=10, pairs=55, images=1, supervised=2)
    looking = 10 * (3 * costs.looking.linear + 3 * costs.looking.attention)
    assert step_flops(costs, counts, modes)["connector"] == costs.connector.needed("full", False) + looking
    dtypes = dict.fromkeys((name for name, _ in model.named_parameters()), torch.float32)
    kept = measure_kept(model, Conditions(dtypes, None, "cpu", 16))
    model.model.cross_attention = torch.nn.ModuleList()
    without = measure_kept(model, Conditions(dtypes, None, "cpu", 16))
    assert kept.rest - without.rest == pytest.approx(blocks * 88 * width, rel=0.15)
