"""A connector that reads the question: training and asking tell it the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava_train import load_model
from llava_train.data.batch import BatchReader, ImageReader
from llava_train.data.micro_batches import Cut, MicroBatch
from llava_train.inference import Prompt, _questions, answer, message, read_pictures, shape_of
from llava_train.model.attention import use_packed_attention
from llava_train.model.families.questions import questions_in
from llava_train.recipe import load_recipe
from llava_train.training.material import prepare
from llava_train.training.objective import _questions as questions_of
from llava_train.training.objective import token_losses
from llava_train.training.parts import fitted
from llava_train.training.run import train
from llava_train.training.setup import build
from tests import tiny

OPTIONS = {"num_queries": 3, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "instruction": True}


def recipe_of(folder: Path, **changes: Any) -> Path:
    return tiny.make_recipe(folder, model__connector="qformer", model__connector_options=OPTIONS, **changes)


def test_pictures_side_by_side_have_the_same_question() -> None:
    assert questions_in([9, 9, 1, 2, 5, 9, 9, 9, 9, 3, 6], 9, 2, [4, 10]) == [[1, 2], [3], [3]]
    assert questions_in([1, 2], 9, 2, []) == []


def test_padded_packed_and_asked_alike(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_of(tmp_path))
    assert not fitted(recipe).speed.share_prefix
    assembly, prepared = build(recipe), prepare(recipe).train
    images = ImageReader(shape_of(assembly.spec, assembly.image_processor))
    shown = [sample for sample in range(len(prepared)) if prepared.row(sample).images][:4]
    batches = [
        BatchReader(prepared, images, 0, cut)(MicroBatch(tuple(shown), (1.0,) * 4))
        for cut in (Cut(8), Cut(8, budget=999))
    ]
    (padded, mask), (packed, _) = (questions_of(assembly.model, batch) for batch in batches)
    assert torch.equal(padded, packed)
    said = assembly.tokenizer.decode(padded[0][mask[0].bool()])
    assert said.strip() == "What colour is it? ASSISTANT:"
    prompt = Prompt(
        (message("user", "What colour is it?", 1), message("assistant", "red"), message("user", "Is there more?")),
        read_pictures(assembly, [Image.new("RGB", (30, 30), "red")]),
    )
    assert _questions(assembly, prompt) == [padded[0][mask[0].bool()].tolist()]
    with torch.no_grad():
        one = token_losses(assembly.model, batches[0])
        use_packed_attention(assembly.model.model.language_model)
        assert torch.allclose(one, token_losses(assembly.model, batches[1]), atol=1e-5)


def test_it_trains_and_answers_by_the_question(tmp_path: Path) -> None:
    assembly = load_model(train(load_recipe(recipe_of(tmp_path, optimization__max_steps=2))))
    pictures = read_pictures(assembly, [Image.new("RGB", (30, 30), "red")])
    prompts = [Prompt((message("user", text, 1),), pictures) for text in ("What colour is it?", "yes?")]
    assert answer(assembly, prompts, 4) == [answer(assembly, [prompt], 4)[0] for prompt in prompts]
    with pytest.raises(AssertionError):
        questions = [torch.tensor(_questions(assembly, prompt)) for prompt in prompts]
        assert torch.equal(*questions)


def test_a_question_ends_with_its_sample(tmp_path: Path) -> None:
    """Where `max_length` cuts the last answer off, its picture is left and nothing behind it is supervised."""
    recipe = load_recipe(recipe_of(tmp_path))
    assembly, prepared = build(recipe), prepare(recipe).train
    images = ImageReader(shape_of(assembly.spec, assembly.image_processor))
    shown = [sample for sample in range(len(prepared)) if prepared.row(sample).images][:2]
    for cut in (Cut(8), Cut(8, budget=999)):
        batch = BatchReader(prepared, images, 0, cut)(MicroBatch(tuple(shown), (1.0, 1.0)))
        unanswered = replace(batch, predictors=batch.predictors[:0], targets=batch.targets[:0])
        ids, mask = questions_of(assembly.model, unanswered)
        for question, own in zip(ids, mask.bool()):  # it goes on to the end of its sample, and not into the next
            said = assembly.tokenizer.decode(question[own])
            assert said.count("</s>") >= 1 and "USER" not in said.partition("</s>")[0] and "A chat" not in said
