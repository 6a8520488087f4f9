"""Checkpoints of the original code as the starting point of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_train import load_model
from llava_train.inference import Prompt, answer, message, read_pictures
from llava_train.recipe import load_recipe
from llava_train.training.run import train
from tests import tiny
from tests.model.originals import made as originals


@pytest.mark.parametrize("layout", ["full", "stage1", "lora"])
def test_a_run_goes_on_from_it_and_needs_it_no_more(workplace: Path, layout: str) -> None:
    llm, vision, folder = workplace / "llm", workplace / "vision", workplace / "start"
    if layout == "full":
        originals.write_full(folder, llm, vision)
    elif layout == "lora":
        originals.write_lora(folder, llm, vision)
    else:
        originals.write_config(folder, llm, vision)
        torch.save(originals.projector([32, 32, 32]), folder / "mm_projector.bin")
    recipe = tiny.make_recipe(workplace, init_from=str(folder), optimization__max_steps=2, optimization__epochs=1)
    run = train(load_recipe(recipe))
    folder.rename(workplace / "elsewhere")
    assembly = load_model(run)
    images = [Image.new("RGB", size, "red") for size in ((30, 40), (20, 20))]
    prompt = Prompt(
        (message("user", "What?", 1), message("assistant", "It is red."), message("user", "And this?", 1)),
        read_pictures(assembly, images),
    )
    assert isinstance(answer(assembly, [prompt], 4)[0], str)
    assert assembly.spec.history == (str(folder),)
