"""Qwen2-VL and Qwen2.5-VL: tiny random checkpoints in the published layout, fine-tuned, saved, exported, asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

from llava_train import export, load_model, train
from llava_train.data.batch import Batch, BatchReader, ImageReader
from llava_train.data.encode import IGNORE, Encoder, encode, expand
from llava_train.data.micro_batches import Cut, MicroBatch
from llava_train.data.pictures.shapes import Shown
from llava_train.data.sample import ImageRef, Sample, Turn
from llava_train.data.templates.fit import resolve_template
from llava_train.errors import RecipeError, RecordError
from llava_train.inference import Prompt, answer, batch_inputs, message, read_pictures, render, shape_of, stream
from llava_train.model.assemble import Assembly
from llava_train.model.attention import use_packed_attention
from llava_train.model.costs import costs_of
from llava_train.model.families.table import family_of
from llava_train.model.tuning import apply_tuning, part_of
from llava_train.recipe import Recipe, load_recipe
from llava_train.training.material import prepare
from llava_train.training.objective import Objective
from llava_train.training.recompute import apply_recompute
from llava_train.training.setup import build
from tests import tiny, tiny_vlms

MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen2_vl": tiny_vlms.make_qwen2_vl,
    "qwen2_5_vl": tiny_vlms.make_qwen2_5_vl,
}
CLASSES = {"qwen2_vl": Qwen2VLForConditionalGeneration, "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration}
SIZES = [(40, 90), (150, 60), (28, 28), (64, 64)]


@pytest.fixture(scope="module", params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def place(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint `stock/` and records about it; tests that write into it copy it."""
    folder = tmp_path_factory.mktemp(name)
    MAKERS[name](folder / "stock")
    (folder / "data").mkdir()
    records = []
    for index, size in enumerate(SIZES):
        Image.effect_noise(size, 80).convert("RGB").save(folder / "data" / f"{index}.png")
        for question in ("What is it?", "Is it blue?"):  # samples that begin with the same picture
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": f"It is {index}."}]
            records.append({"id": f"{index} {question}", "image": f"{index}.png", "conversations": turns})
    turns = [{"from": "human", "value": "<image>\n<image>\nWhich?"}, {"from": "gpt", "value": "yes no"}]
    more = [{"from": "human", "value": "And this? <image>"}, {"from": "gpt", "value": "no"}]
    records.append({"id": "three", "image": ["0.png", "1.png", "2.png"], "conversations": turns + more})
    talk = [{"from": "human", "value": "Say yes."}, {"from": "gpt", "value": "yes"}]
    records.append({"id": "text", "conversations": talk})
    (folder / "data" / "data.json").write_text(json.dumps(records))
    return folder


def recipe_of(place: Path, **changes: Any) -> Recipe:
    fixed = {"init_from": str(place / "stock"), "model": {}, "data__template": "tokenizer", "data__max_length": 1024}
    data = {"data__train": [{"path": str(place / "data" / "data.json")}], "data__validation_fraction": 0}
    return load_recipe(tiny.make_recipe(place, **{**fixed, **data, **changes}))


def whole_batch(recipe: Recipe, assembly: Assembly, cut: Cut) -> Batch:
    prepared = prepare(recipe).train
    images = ImageReader(shape_of(assembly.spec, assembly.image_processor))
    weight = 1 / float(prepared.supervised.sum())
    count = len(prepared.lengths)
    return BatchReader(prepared, images, 0, cut)(MicroBatch(tuple(range(count)), (weight,) * count))


def gradients(assembly: Assembly, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    assembly.model.zero_grad()
    assembly.model.requires_grad_(True)
    loss = Objective(assembly.model)(batch)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in assembly.model.named_parameters() if p.grad is not None}


def test_the_tokens_of_a_picture_are_known_from_its_size(place: Path) -> None:
    assembly = load_model(place / "stock")
    shape = shape_of(assembly.spec, assembly.image_processor)
    images = [Image.effect_noise((w, h), 80).convert("RGB") for w in (1, 28, 41, 200, 900) for h in (5, 30, 57, 199)]
    made = assembly.image_processor(images=images, return_tensors="pt")
    pictures = [shape.picture(image, Shown(*image.size)) for image in images]
    assert torch.equal(torch.cat([each.pixels for each in pictures]), made["pixel_values"])
    assert torch.equal(torch.stack([each.facts["image_grid_thw"] for each in pictures]), made["image_grid_thw"])
    assert [each.tokens for each in pictures] == (made["image_grid_thw"].prod(-1) // 4).tolist()
    assert len({each.tokens for each in pictures}) > 5
    with pytest.raises(RecordError, match="aspect ratio"):
        shape.tokens(Shown(2010, 10))


def test_ids_are_those_of_the_published_template(place: Path) -> None:
    assembly = load_model(place / "stock")
    tokenizer, family = assembly.tokenizer, family_of(assembly.model)
    shape = shape_of(assembly.spec, assembly.image_processor)
    _, template = resolve_template("tokenizer", tokenizer)
    pictures = [ImageRef(f"{number}.png") for number in range(3)]
    first, second = Turn("user", (*pictures[:2], "What is it?")), Turn("user", (pictures[2], "And this?"))
    sample = Sample(id="1", turns=(first, Turn("assistant", ("yes",)), second, Turn("assistant", ("It is blue.",))))
    encoder = Encoder(tokenizer, template, shape, 1024, family.marker, family.image_token)
    encoded = encode(sample, encoder, [size for pair in SIZES[:3] for size in pair])
    ids, labels = expand(encoded.input_ids, encoded.spans, encoded.image_tokens, encoder.image_token_id)
    parts = [
        {"role": turn.role, "content": [p if isinstance(p, str) else None for p in turn.parts]} for turn in sample.turns
    ]
    for turn in parts:
        turn["content"] = [{"type": "text", "text": p} if p else {"type": "image"} for p in turn["content"]]
    pieces = tokenizer.apply_chat_template(parts, tokenize=False).split("<|image_pad|>")
    made = assembly.image_processor(images=[Image.new("RGB", size) for size in SIZES[:3]], return_tensors="pt")
    pads = ["<|image_pad|>" * int(grid.prod() // 4) for grid in made["image_grid_thw"]]
    text = "".join(piece + pad for piece, pad in zip(pieces, [*pads, ""]))
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(labels[labels != IGNORE]) == "yes<|im_end|>It is blue.<|im_end|>"


def test_the_loss_is_the_stock_class_s_own(place: Path) -> None:
    recipe = recipe_of(place)
    assembly = build(recipe)
    batch = whole_batch(recipe, assembly, Cut(16))
    labels = torch.full_like(batch.input_ids, IGNORE)
    labels.view(-1)[batch.predictors + 1] = batch.targets
    rows = prepare(recipe).train
    files = [ref.path for number in range(len(rows.lengths)) for ref in rows.row(number).images]
    images = [Image.open(place / "data" / file).convert("RGB") for file in files]
    stock = assembly.image_processor(images=images, return_tensors="pt")
    kinds = (batch.input_ids == assembly.model.config.image_token_id).int()
    with torch.no_grad():
        ours = Objective(assembly.model)(batch)
        theirs = assembly.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=labels,
            mm_token_type_ids=kinds,
            **stock,
        ).loss
    assert float(abs(ours - theirs)) < 1e-5


def test_packed_rows_are_computed_as_padded_ones(place: Path) -> None:
    recipe = recipe_of(place)
    assembly = build(recipe)
    loss, grads = gradients(assembly, whole_batch(recipe, assembly, Cut(16)))
    use_packed_attention(assembly.model.model.language_model)
    for share in (False, True):
        batch = whole_batch(recipe, assembly, Cut(16, budget=4096, share=share))
        assert any(parent >= 0 for parent in batch.parents) == share
        packed_loss, packed = gradients(assembly, batch)
        assert packed_loss == pytest.approx(loss, rel=1e-6)
        assert packed.keys() == grads.keys()
        assert max(float((packed[key] - grads[key]).abs().max()) for key in grads) < 1e-6


def test_text_alone_gives_every_weight_a_gradient(place: Path) -> None:
    recipe = recipe_of(place, tune={"vision": {"mode": "full"}})
    assembly = build(recipe)
    apply_tuning(assembly.model, recipe.tune, 0)
    prepared = prepare(recipe).train
    images = ImageReader(shape_of(assembly.spec, assembly.image_processor))
    batch = BatchReader(prepared, images, 0, Cut(16))(MicroBatch((len(prepared.lengths) - 1,), (1.0,)))
    assert batch.pixel_values is None
    objective = Objective(assembly.model)
    assert objective.blank == "pixels"
    loss = objective(batch)
    loss.backward()
    with torch.no_grad():
        objective.blank = "nothing"
        assert float(objective(batch)) == float(loss)
    seeing = {n: p.grad for n, p in assembly.model.named_parameters() if part_of(n) != "llm"}
    assert {part_of(name) for name in seeing} == {"vision", "connector"}
    assert all(gradient is not None and not gradient.any() for gradient in seeing.values())


def test_recompute_and_costs(place: Path) -> None:
    recipe = recipe_of(place)
    assembly = build(recipe)
    batch = whole_batch(recipe, assembly, Cut(16))
    assembly.model.train()
    loss, grads = gradients(assembly, batch)
    apply_recompute(assembly.model, 2)
    again, recomputed = gradients(assembly, batch)
    blocks = [*assembly.model.model.visual.blocks, *assembly.model.model.language_model.layers]
    assert all(block.gradient_checkpointing for block in blocks)
    assert again == loss and all(torch.equal(recomputed[key], grads[key]) for key in grads)
    costs = costs_of(assembly.model, assembly.spec.image_size)
    assert costs.token.linear > 0 and costs.image_in_tokens == 0


def test_lora_is_trained_reloaded_asked_and_exported(place: Path, name: str, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    options = {"optimization__max_steps": 2, "monitor__eval_every": 0, "checkpoint__save_every": 0}
    recipe = recipe_of(tmp_path, **options, speed__recompute="auto")
    folder = train(recipe)
    assembly = load_model(folder)
    assert type(assembly.model) is CLASSES[name]
    assert assembly.spec.lora is not None and all(part_of(each) == "llm" for each in assembly.spec.lora.targets)
    changed = [p for n, p in assembly.model.named_parameters() if ".lora_B." in n]
    assert changed and all(weight.any() for weight in changed)
    images = [Image.effect_noise(size, 80).convert("RGB") for size in SIZES]
    talk = (message("user", "What?", 2), message("assistant", "yes"), message("user", "And this?", 1))
    prompts = [
        Prompt(talk, read_pictures(assembly, images[:3])),
        Prompt((message("user", "Hello"),)),
        Prompt((message("user", "Which?", 1),), read_pictures(assembly, images[3:])),
    ]
    stock = load_model(tmp_path / "stock")
    assert render(assembly, talk) == render(stock, talk)  # no line end behind a picture, as the data have it
    alone = [answer(assembly, [prompt], 5)[0] for prompt in prompts]
    assert answer(assembly, prompts, 5) == alone
    with torch.no_grad():
        each = [assembly.model(**batch_inputs(assembly, [prompt])).logits[0, -1] for prompt in prompts]
        together = assembly.model(**batch_inputs(assembly, prompts)).logits[:, -1]
    assert torch.allclose(together, torch.stack(each), atol=1e-5)
    assert "".join(stream(assembly, prompts[0], 5)).strip() == alone[0]
    report = json.loads((export(folder, tmp_path / "hf", dtype="float32") / "export_report.json").read_text())
    assert f" {CLASSES[name].__name__} " in report["loaded_with"]
    differences = report["max_logit_difference"]
    assert differences.keys() == {"image", "text"} and max(differences.values()) < 1e-5
    exported = load_model(tmp_path / "hf")
    with torch.no_grad():
        inputs = batch_inputs(assembly, prompts)
        assert all(torch.equal(value, batch_inputs(exported, prompts)[key]) for key, value in inputs.items())
        assert torch.allclose(assembly.model(**inputs).logits, exported.model(**inputs).logits, atol=1e-5)


def test_a_full_fine_tune_needs_its_source_no_more(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    options = {"optimization__max_steps": 2, "monitor__eval_every": 0, "checkpoint__save_every": 0}
    tune = {"vision": {"mode": "full", "learning_rate": 1e-3}, "llm": {"mode": "full", "learning_rate": 1e-3}}
    folder = train(recipe_of(tmp_path, **options, tune=tune, optimization__precision="bf16"))
    before = load_model(tmp_path / "stock")
    shutil.rmtree(tmp_path / "stock")
    assembly = load_model(folder)
    assert assembly.spec.vision.included and assembly.spec.llm.included
    still = [n for n, p in before.model.named_parameters() if torch.equal(p, assembly.model.get_parameter(n))]
    assert not still
    prompt = Prompt((message("user", "What?", 1),), read_pictures(assembly, [Image.new("RGB", SIZES[0])]))
    assert len(answer(assembly, [prompt], 3)) == 1


def test_a_feature_cache_is_refused(place: Path) -> None:
    recipe = recipe_of(place)
    with pytest.raises(RecipeError, match=r"data.feature_cache.*a qwen2.* model"):
        train(replace(recipe, data=replace(recipe.data, feature_cache=True)))
