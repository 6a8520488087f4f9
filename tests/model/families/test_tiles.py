"""Models of tiles: the classes of transformers, assembled from parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaNextForConditionalGeneration, LlavaOnevisionForConditionalGeneration

from llava_train import export, load_model
from llava_train.data.batch import BatchReader, ImageReader
from llava_train.data.encode import IGNORE
from llava_train.data.micro_batches import Cut, MicroBatch
from llava_train.data.pictures.shapes import Shown
from llava_train.errors import RecipeError, RecordError
from llava_train.inference import Prompt, answer, batch_inputs, message, read_pictures, shape_of
from llava_train.inspection import inspect
from llava_train.model.attention import use_packed_attention
from llava_train.model.checkpoint import save_model
from llava_train.model.families.base import Pictures
from llava_train.model.families.table import family_of
from llava_train.recipe import load_recipe
from llava_train.training.material import prepare
from llava_train.training.objective import token_losses
from llava_train.training.run import train
from llava_train.training.setup import build
from tests import tiny

WAYS = {"anyres": LlavaNextForConditionalGeneration, "anyres_max_2": LlavaOnevisionForConditionalGeneration}


def recipe_of(folder: Path, way: str, **changes: Any) -> Path:
    (folder / "data").mkdir(exist_ok=True)
    records = []
    for index, size in enumerate([(40, 90), (90, 40), (28, 28), (20, 20)]):
        Image.effect_noise(size, 80).convert("RGB").save(folder / "data" / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"It is {index}."}]
        records.append({"id": f"r{index}", "image": f"{index}.png", "conversations": turns})
    two = [{"from": "human", "value": "<image>\n<image>\nWhich?"}, {"from": "gpt", "value": "yes no"}]
    records.append({"id": "two", "image": ["0.png", "1.png"], "conversations": two})
    (folder / "data" / "data.json").write_text(json.dumps(records))
    changes = {"data__train": [{"path": str(folder / "data" / "data.json")}], "data__max_length": 1024, **changes}
    return tiny.make_recipe(folder, model__image_aspect_ratio=way, data__validation_fraction=0, **changes)


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_is_the_stock_class_s_own(tmp_path: Path, way: str) -> None:
    recipe = load_recipe(recipe_of(tmp_path, way))
    assembly, prepared = build(recipe), prepare(recipe).train
    assert type(assembly.model) is WAYS[way]
    reader = BatchReader(prepared, ImageReader(shape_of(assembly.spec, assembly.image_processor)), 0, Cut(8))
    weight = 1 / prepared.supervised[:4].sum()
    batch = reader(MicroBatch(tuple(range(4)), (float(weight),) * 4))
    labels = torch.full_like(batch.input_ids, IGNORE)
    labels.view(-1)[batch.predictors + 1] = batch.targets
    images = [Image.open(tmp_path / "data" / f"{index}.png").convert("RGB") for index in range(4)]
    made = assembly.image_processor(images=images, return_tensors="pt")  # padded to the most tiles
    stock = {name: made[name] for name in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        ours = (token_losses(assembly.model, batch) * batch.weights).sum()
        theirs = assembly.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels, **stock
        ).loss
    assert float(abs(ours - theirs)) < 1e-5 * float(theirs)


def test_several_pictures_and_videos_are_those_of_onevision(tmp_path: Path) -> None:
    assembly = build(load_recipe(recipe_of(tmp_path, "anyres_max_2")))
    model, shape = assembly.model, shape_of(assembly.spec, assembly.image_processor)
    images = [Image.effect_noise(size, 80).convert("RGB") for size in ((40, 90), (50, 30))]
    several = read_pictures(assembly, images)
    frames = [shape.picture(each, Shown(*each.size, kind)) for each, kind in zip(images, ("one", "last"))]

    def states(pictures: Any) -> torch.Tensor:
        facts = {name: torch.stack([each.facts[name] for each in pictures]) for name in pictures[0].facts}
        return family_of(model).states(model, Pictures(torch.cat([each.pixels for each in pictures]), None, facts))

    made = assembly.image_processor(images=[images], return_tensors="pt")
    with torch.no_grad():
        theirs = model.model.get_image_features(
            made["pixel_values"], made["image_sizes"], batch_num_images=torch.tensor([2])
        ).pooler_output
        video = model.model.get_video_features(torch.cat([each.pixels for each in frames])[None]).pooler_output[0]
        assert torch.allclose(states(several), torch.cat(list(theirs)), atol=1e-6)
        assert torch.allclose(states(frames), video, atol=1e-6)
    assert sum(each.tokens for each in frames) == len(video)


@pytest.mark.parametrize("way", WAYS)
def test_packed_rows_lose_what_padded_ones_do(tmp_path: Path, way: str) -> None:
    recipe = load_recipe(recipe_of(tmp_path, way))
    assembly, prepared = build(recipe), prepare(recipe).train
    images = ImageReader(shape_of(assembly.spec, assembly.image_processor))
    micro_batch = MicroBatch(tuple(range(5)), (1.0,) * 5)
    losses = []
    for cut in (Cut(8), Cut(8, budget=4096, share=True)):
        if cut.budget:
            use_packed_attention(assembly.model.model.language_model)
        batch = BatchReader(prepared, images, 0, cut)(micro_batch)
        with torch.no_grad():
            losses.append(float((token_losses(assembly.model, batch) * batch.weights).sum()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_it_trains_saves_reloads_and_answers(tmp_path: Path, way: str) -> None:
    recipe = recipe_of(tmp_path, way, optimization__max_steps=2, optimization__global_batch_size=3)
    folder = train(load_recipe(recipe))
    assembly = load_model(folder)
    assert type(assembly.model) is WAYS[way]
    images = [Image.effect_noise((40, 90), 80).convert("RGB"), Image.effect_noise((30, 20), 80).convert("RGB")]
    prompts = [
        Prompt((message("user", "What?", 1),), read_pictures(assembly, images[:1])),
        Prompt((message("user", "Which?", 2),), read_pictures(assembly, images)),
        Prompt((message("user", "Hello", 0),)),
    ]
    alone = [answer(assembly, [prompt], 5)[0] for prompt in prompts]
    assert answer(assembly, prompts, 5) == alone
    (tmp_path / "again").mkdir()
    save_model(assembly, tmp_path / "again")
    again = load_model(tmp_path / "again")
    with torch.no_grad():
        one, two = (each.model(**batch_inputs(each, prompts[:1])).logits for each in (assembly, again))
    assert torch.equal(one, two)


def test_blank_pictures_reach_the_newline(tmp_path: Path) -> None:
    assembly = build(load_recipe(recipe_of(tmp_path, "anyres")))
    model, family = assembly.model, family_of(assembly.model)
    for features in (True, False):
        states = family.states(model, family.blank(model, features, torch.zeros(1)))
        assert len(states) == assembly.spec.image_tokens + 1
        states.sum().backward()
        assert model.model.image_newline.grad is not None


def test_connectors_that_leave_the_grid_are_refused(tmp_path: Path) -> None:
    options = {"model__connector": "qformer", "model__connector_options": {"num_queries": 3}}
    with pytest.raises(RecipeError, match="own grid of 4 patches; connector 'qformer' gives 3 tokens"):
        prepare(load_recipe(recipe_of(tmp_path, "anyres", **options)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__image_aspect_ratio": "anyres_max"}, "anyres_max_N"),
        ({"model__image_grid_pinpoints": [[28, 28]], "model__image_aspect_ratio": "pad"}, "is for image_aspect_ratio"),
        ({"model__image_grid_pinpoints": [[28]]}, "pairs of height and width"),
        ({"model__small_as_one_tile": True}, "anyres_max_N"),
        ({"data__feature_cache": True}, "not tiles"),
        ({"model__fusion": "cross_attention"}, "with fusion cross_attention choose"),
    ],
)
def test_recipes_that_contradict_themselves(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    changes = {"model__image_aspect_ratio": "anyres", **changes}
    with pytest.raises(RecipeError, match=message):
        load_recipe(tiny.make_recipe(tmp_path, **changes))


@pytest.mark.parametrize("way", WAYS)
def test_stage_2_goes_on_in_tiles(tmp_path: Path, way: str) -> None:
    first = train(load_recipe(recipe_of(tmp_path, "pad", tune__llm__mode="frozen", optimization__max_steps=1)))
    first.rename(tmp_path / "stage1")
    second = recipe_of(tmp_path, way, init_from=str(tmp_path / "stage1"), optimization__max_steps=1)
    assembly = load_model(train(load_recipe(second)))
    assert type(assembly.model) is WAYS[way]
    assert assembly.spec.history == (str(tmp_path / "stage1"),)
    pictures = read_pictures(assembly, [Image.effect_noise((40, 90), 80).convert("RGB")])
    assert len(pictures[0].pixels) > 1
    assert isinstance(answer(assembly, [Prompt((message("user", "What?", 1),), pictures)], 3)[0], str)


def test_what_is_inspected_has_the_tokens_of_each_picture(tmp_path: Path) -> None:
    found = list(inspect(load_recipe(recipe_of(tmp_path, "anyres"))))
    assert [len(each["image_tokens"]) for each in found] == [1, 1, 1, 1, 2]
    for each in found:
        assert each["input_ids"].count(each["image_token_id"]) == sum(each["image_tokens"])
        json.dumps(each)


@pytest.mark.parametrize("way", WAYS)
def test_the_export_is_the_stock_class_s_own(tmp_path: Path, way: str) -> None:
    folder = train(load_recipe(recipe_of(tmp_path, way, optimization__max_steps=1)))
    export(folder, tmp_path / "out", dtype="float32")
    assert json.loads((tmp_path / "out" / "export_report.json").read_text())["verified"]
    again = load_model(tmp_path / "out")
    assert type(again.model) is WAYS[way]


def test_a_picture_that_changed_since_it_was_prepared_is_told(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_of(tmp_path, "anyres"))
    assembly, prepared = build(recipe), prepare(recipe).train
    Image.effect_noise((90, 20), 80).convert("RGB").save(tmp_path / "data" / "2.png")
    reader = BatchReader(prepared, ImageReader(shape_of(assembly.spec, assembly.image_processor)), 0, Cut(8))
    with pytest.raises(RecordError, match=r"r2\): a picture has another size than when the set was prepared"):
        reader(MicroBatch((2,), (1.0,)))


def test_tiles_have_the_size_of_the_encoder(tmp_path: Path) -> None:
    tiny.make_tower(tmp_path / "vision", "dinov2")
    with pytest.raises(RecipeError, match="image_size: 56: tiles have the encoder's own size, 28"):
        prepare(load_recipe(recipe_of(tmp_path, "anyres", model__image_size=56)))


def test_a_source_of_its_own_way_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_of(tmp_path, "anyres"), ["data.train.0.image_aspect_ratio=pad"])
    with pytest.raises(RecipeError, match=r"data\.json: image_aspect_ratio: 'pad'"):
        prepare(recipe)


@pytest.mark.parametrize("key", ["model.image_aspect_ratio=anyres_max_9", "model.fusion=cross_attention"])
def test_what_init_from_decides_is_not_ignored(tmp_path: Path, key: str) -> None:
    folder = train(load_recipe(recipe_of(tmp_path, "anyres", optimization__max_steps=1)))
    changes = [f"init_from={folder}", "model.image_aspect_ratio=pad", key, f"output={tmp_path}/more"]
    with pytest.raises(RecipeError, match=f"{key.partition('=')[0]}: init_from is a llava_next model"):
        train(load_recipe(tmp_path / "recipe.yaml", changes))


def test_as_many_latents_as_patches_are_no_grid(tmp_path: Path) -> None:
    options = {"model__connector": "resampler", "model__connector_options": {"num_latents": 4, "heads": 2}}
    with pytest.raises(RecipeError, match="own grid of 4 patches; connector 'resampler' gives 4 tokens"):
        prepare(load_recipe(recipe_of(tmp_path, "anyres", **options)))
