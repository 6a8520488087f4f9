"""Llama 3.2-Vision: transformers' own class and image processor, with our data, tuning and loop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from llava_train import load_model
from llava_train.chat.session import Conversation
from llava_train.data.batch import Batch, BatchReader, ImageReader
from llava_train.data.encode import IGNORE
from llava_train.data.micro_batches import Cut, MicroBatch
from llava_train.data.templates.template import portable
from llava_train.exporters.run import export
from llava_train.inference import Prompt, answer, batch_inputs, message, read_pictures, render, shape_of
from llava_train.model.assemble import Assembly
from llava_train.model.tuning import apply_tuning
from llava_train.recipe import Recipe, load_recipe
from llava_train.training.material import prepare
from llava_train.training.objective import Objective, token_losses
from llava_train.training.run import train
from llava_train.training.setup import build
from tests import tiny
from tests.tiny_vlms import make_mllama

SIZES = [(28, 28), (90, 40), (30, 100), (60, 60), (20, 15)]
TALKS: list[list[tuple[int, str, str]]] = [  # pictures, question, answer of each turn
    [(1, "What is it?", "It is blue.")],
    [(1, "What is it?", "It is a red circle.")],
    [(2, "Which?", "yes"), (0, "Is it green?", "no no"), (1, "And this?", "It is yellow.")],
    [(0, "Say yes.", "yes")],
    [(0, "What?", "no"), (1, "What is it?", "It is green.")],
]
TUNED = ["tune.vision.mode=full", "tune.connector.mode=full", "tune.llm.mode=full"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mllama(tmp_path_factory.mktemp("mllama") / "model")


@pytest.fixture(scope="module")
def assembly(folder: Path) -> Assembly:
    return load_model(folder)


def pictures_of(number: int) -> list[Image.Image]:
    """Those of a talk."""
    count, noise = sum(shown for shown, _, _ in TALKS[number]), np.random.default_rng(number)
    sizes = [SIZES[(number + place) % len(SIZES)] for place in range(count)]
    return [Image.fromarray(noise.integers(0, 256, (high, wide, 3), dtype=np.uint8)) for wide, high in sizes]


def messages_of(number: int) -> list[dict[str, Any]]:
    """A talk as a processor of transformers takes it."""
    made = []
    for count, question, said in TALKS[number]:
        made += [message("user", question, count), message("assistant", said)]
    return made


def recipe_of(place: Path, folder: Path, options: list[str] = []) -> Recipe:  # noqa: B006
    records = []
    for number, talk in enumerate(TALKS):
        turns = []
        for count, question, said in talk:
            turns += [{"from": "human", "value": "<image>" * count + question}, {"from": "gpt", "value": said}]
        names = [f"{number}-{place}.png" for place in range(len(pictures_of(number)))]
        for name, image in zip(names, pictures_of(number)):
            image.save(place / name)
        records.append({"id": str(number), "conversations": turns, **({"image": names} if names else {})})
    (place / "data").mkdir()
    (place / "data" / "data.json").write_text(json.dumps(records))
    for unused in ("vision", "llm"):
        (place / unused).mkdir()
    changes = {"init_from": str(folder), "model": {}, "data__train": [{"path": str(place / "data" / "data.json")}]}
    path = tiny.make_recipe(place, data__template="auto", data__validation_fraction=0, **changes)
    values = json.loads(path.read_text())
    values["data"]["train"][0]["image_root"] = str(place)
    path.write_text(json.dumps(values))
    return load_recipe(path, options)


def batch_of(assembly: Assembly, recipe: Recipe, rows: tuple[int, ...]) -> Batch:
    prepared = prepare(recipe).train
    weight = float(1 / prepared.supervised[list(rows)].sum())
    images = ImageReader(shape_of(assembly.spec, assembly.image_processor))
    pad = int(assembly.tokenizer.pad_token_id)
    return BatchReader(prepared, images, pad, Cut(8))(MicroBatch(rows, (weight,) * len(rows)))


def stock_loss(assembly: Assembly, folder: Path, batch: Batch, rows: tuple[int, ...]) -> torch.Tensor:
    """Of the stock class, with all that the stock processor makes of these talks."""
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    template = None if any(map(pictures_of, rows)) else portable(assembly.template)  # the own one writes today's date
    texts = [processor.apply_chat_template(messages_of(row), chat_template=template) for row in rows]
    images = [pictures_of(row) for row in rows]
    inputs = processor(
        text=texts, images=images if any(images) else None, padding=True, add_special_tokens=False, return_tensors="pt"
    )
    assert inputs["input_ids"].tolist() == batch.input_ids.tolist()
    labels = torch.full_like(batch.input_ids, IGNORE)
    labels.view(-1)[batch.predictors + 1] = batch.targets
    with torch.no_grad():
        return assembly.model(**inputs, labels=labels).loss


def ours(assembly: Assembly, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return (token_losses(assembly.model, batch) * batch.weights).sum()


def test_the_loss_is_the_stock_class_s_own(tmp_path: Path, folder: Path) -> None:
    recipe = recipe_of(tmp_path, folder)
    assembly = build(recipe)
    assert assembly.spec.template == "llama3"
    for rows in ((0, 1), (2,), (3,), (4,)):  # of one number of pictures: the stock class pads others to be seen
        batch = batch_of(assembly, recipe, rows)
        theirs = stock_loss(assembly, folder, batch, rows)
        assert float(abs(ours(assembly, batch) - theirs)) < 1e-5 * float(theirs), rows
    together = token_losses(assembly.model, batch_of(assembly, recipe, (0, 2, 3, 4)))
    alone = [token_losses(assembly.model, batch_of(assembly, recipe, (row,))) for row in (0, 2, 3, 4)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tuned", [TUNED, ["tune.vision.mode=frozen", "tune.connector.mode=frozen"]])
def test_text_alone_gives_every_trained_weight_a_gradient(tmp_path: Path, folder: Path, tuned: list[str]) -> None:
    recipe = recipe_of(tmp_path, folder, tuned)
    assembly = build(recipe)
    batch = batch_of(assembly, recipe, (3,))
    plain = stock_loss(assembly, folder, batch, (3,))
    apply_tuning(assembly.model, recipe.tune, 0)
    loss = Objective(assembly.model)(batch)
    loss.backward()
    trained = {name: weight for name, weight in assembly.model.named_parameters() if weight.requires_grad}
    assert [name for name, weight in trained.items() if weight.grad is None] == []
    looking = [name for name in trained if not name.startswith(("model.language_model.", "lm_head."))]
    looking += [name for name in trained if ".layers.1." in name or ".layers.3." in name]
    assert looking and all(not trained[name].grad.any() for name in looking)
    assert float((loss.detach() - plain).abs()) < 1e-6 * float(plain)
    Objective(assembly.model)(batch_of(assembly, recipe, (2,))).backward()
    # At its start an adapter's first matrix learns nothing.
    assert all(trained[name].grad.any() for name in looking if "q_proj" in name and "lora_A" not in name)


def test_prompts_are_those_of_the_stock_processor(folder: Path, assembly: Assembly) -> None:
    processor = AutoProcessor.from_pretrained(folder, backend="pil", padding_side="left")
    rows = (0, 2, 4)  # of 1, 3 and 1 pictures
    prompts = [Prompt(tuple(messages_of(row)[:-1]), read_pictures(assembly, pictures_of(row))) for row in rows]
    texts = [processor.apply_chat_template(messages_of(row)[:-1], add_generation_prompt=True) for row in rows]
    assert [render(assembly, prompt.messages) for prompt in prompts] == texts
    inputs = batch_inputs(assembly, prompts)
    stock = processor(
        text=texts,
        images=[pictures_of(row) for row in rows],
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
    assert inputs.keys() == stock.keys()
    for name, value in stock.items():
        assert torch.equal(inputs[name], value), name
    # Together as alone, text among them.
    prompts += [Prompt((message("user", "Say yes."),))]
    assert answer(assembly, prompts, 6) == [answer(assembly, [prompt], 6)[0] for prompt in prompts]
    seen = [Prompt(prompts[0].messages, read_pictures(assembly, pictures_of(row))) for row in (0, 1)]
    with torch.inference_mode():
        first, second = (assembly.model(**batch_inputs(assembly, [prompt])).logits[0, -1] for prompt in seen)
    assert float((first - second).abs().max()) > 1e-3


@pytest.mark.slow(reason="a process that loads the export")
def test_adapters_train_and_the_model_is_one_of_transformers_again(tmp_path: Path, folder: Path) -> None:
    recipe = recipe_of(tmp_path, folder, ["optimization.max_steps=2", "tune.vision.mode=lora", "speed.recompute=auto"])
    run = train(recipe)
    assembly, before = load_model(run), load_model(folder)
    assert assembly.spec.lora and {name.split(".")[1] for name in assembly.spec.lora.targets} == {
        "vision_model",
        "language_model",
    }
    prompt = [Prompt(tuple(messages_of(2)[:-1]), read_pictures(assembly, pictures_of(2)))]
    with torch.inference_mode():
        trained, fresh = (each.model(**batch_inputs(assembly, prompt)).logits for each in (assembly, before))
    assert float((trained - fresh).abs().max()) > 1e-3
    report = json.loads((export(run, tmp_path / "hf", dtype="float32") / "export_report.json").read_text())
    assert report["verified"] and " MllamaForConditionalGeneration " in report["loaded_with"]
    again = load_model(tmp_path / "hf")
    with torch.inference_mode():
        torch.testing.assert_close(again.model(**batch_inputs(assembly, prompt)).logits, trained, atol=1e-4, rtol=1e-4)
    chat = Conversation(again, max_new_tokens=4)
    for shown, question in (((0, 1), "Which?"), ((), "Is it green?"), ((2,), "And this?")):
        for place in shown:
            chat.show(tmp_path / f"2-{place}.png")
        last = "".join(chat.ask(question)).strip()
    views = chat.turns.pop().views
    asked = chat.prompt("And this?", [view.image for view in views])
    assert answer(assembly, [asked], 4) == [last] and len(chat.turns) == 2


def test_what_trains_in_full_needs_its_source_no_more(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "source")
    run = train(recipe_of(tmp_path, tmp_path / "source", ["optimization.max_steps=2", *TUNED]))
    shutil.rmtree(tmp_path / "source")
    assembly = load_model(run)
    assert assembly.model.lm_head.weight.shape[0] + 8 == assembly.model.get_input_embeddings().weight.shape[0]
    prompt = [Prompt(tuple(messages_of(2)[:-1]), read_pictures(assembly, pictures_of(2)))]
    assert answer(assembly, prompt, 4) == answer(load_model(run), prompt, 4)
