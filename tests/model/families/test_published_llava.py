"""LLaVA's own classes in the layout they are published in: gone on with, saved, reloaded, asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_train import load_model
from llava_train.data.pictures.processors import tile_processor
from llava_train.errors import CheckpointError
from llava_train.inference import Prompt, answer, batch_inputs, message, read_pictures
from llava_train.recipe import load_recipe
from llava_train.training.run import train
from tests import tiny

SIZE = 28


class Colours:
    image_mean, image_std, resample, do_normalize, rescale_factor = [0.5] * 3, [0.5] * 3, 3, True, 1 / 255


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def published(folder: Path, kind: str) -> Path:
    """A tiny random checkpoint of SigLIP and Qwen2, as llava-hf has them (interleave, v1.6 in kind, OneVision)."""
    tokenizer = tiny.make_tokenizer(folder)
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    vision = SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, image_size=SIZE, patch_size=14
    )
    text = Qwen2Config(vocab_size=len(tokenizer), **{**tiny.LLMS["qwen2"][2], "num_key_value_heads": 1})
    values: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    if kind == "interleave":
        model: Any = LlavaForConditionalGeneration(LlavaConfig(**values))
        processor: Any = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}, **vars_of(Colours))
    elif kind == "next":
        processor = tile_processor(Colours, "anyres", SIZE)
        values["image_grid_pinpoints"] = processor.image_grid_pinpoints
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(**values))
    else:
        processor = tile_processor(Colours, "anyres_max_9", SIZE)
        values |= {
            "video_token_index": tokenizer.convert_tokens_to_ids("<video>"),
            "vision_aspect_ratio": "anyres_max_9",
        }
        values["image_grid_pinpoints"] = processor.image_grid_pinpoints
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**values))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    return folder


def vars_of(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("_")}


@pytest.mark.parametrize("kind", ["interleave", "next", "onevision"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_it_goes_on_saves_and_answers(workplace: Path, kind: str, mode: str) -> None:
    start = published(workplace / "start", kind)
    recipe = tiny.make_recipe(
        workplace,
        init_from=str(start),
        data__template="auto",
        data__max_length=2048,
        tune__llm__mode=mode,
        tune__vision={"mode": "full"} if mode == "full" else {},
        optimization__max_steps=2,
    )
    run = train(load_recipe(recipe))
    if mode == "full":  # such a model stands alone
        start.rename(workplace / "elsewhere")
    assembly, before = load_model(run), load_model(start if mode == "lora" else workplace / "elsewhere")
    assert type(assembly.model) is type(before.model)
    images = [Image.effect_noise(size, 90).convert("RGB") for size in ((50, 30), (20, 80))]
    prompt = Prompt(
        (message("user", "What?", 1), message("assistant", "It is red."), message("user", "And this?", 1)),
        read_pictures(assembly, images),
    )
    assert isinstance(answer(assembly, [prompt], 4)[0], str)
    with torch.no_grad():
        changed = assembly.model(**batch_inputs(assembly, [prompt])).logits
        assert not torch.equal(changed, before.model(**batch_inputs(before, [prompt])).logits)


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    tiny.make_llm(tmp_path / "llm")
    with pytest.raises(CheckpointError, match="holds a 'llama' model, not one of those we know: llava, llava_next"):
        load_model(tmp_path / "llm")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "../up", "nobody/nothing-at-all"])
def test_what_is_nowhere_is_told(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(name)


def test_a_source_that_changed_is_refused(workplace: Path) -> None:
    start = published(workplace / "start", "interleave")
    run = train(load_recipe(tiny.make_recipe(workplace, init_from=str(start), optimization__max_steps=1)))
    weights = load_file(start / "model.safetensors")
    save_file({key: tensor + 1 for key, tensor in weights.items()}, start / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="not the weights this model was trained on"):
        load_model(run)
