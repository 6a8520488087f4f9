"""Asking a loaded model: messages and pictures -> the prompt's ids -> an answer.

Evaluation, chat and the export check all ask through here, so they see the same prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from PIL import Image
from transformers import TextIteratorStreamer

from llava_train.data.encode import control_pattern
from llava_train.data.pictures.images import pixel_values
from llava_train.data.templates.fit import stop_token
from llava_train.data.templates.template import has_marks, portable
from llava_train.errors import DataError
from llava_train.model.assemble import Assembly
from llava_train.model.llm import IMAGE_TOKEN

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's turn, and its pictures' pixels (3, H, W) in reading order."""

    messages: tuple[Message, ...]
    pixels: tuple[torch.Tensor, ...] = ()


def message(role: str, text: str, images: int = 0) -> Message:
    """A chat message with `images` pictures before its text."""
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def read_pixels(assembly: Assembly, image: Image.Image) -> torch.Tensor:
    """(3, H, W) of one RGB picture."""
    return pixel_values([image], assembly.image_processor)[0]


def render(assembly: Assembly, messages: Sequence[Message]) -> str:
    """The prompt as text, one `<image>` a picture, up to where the assistant is to speak."""
    control = control_pattern(assembly.tokenizer, assembly.template)
    for part in (part for each in messages for part in each["content"]):
        found = control.search(part.get("text", ""))
        if found and found.group() == IMAGE_TOKEN:
            raise DataError(f"the text holds {IMAGE_TOKEN!r}, which stands for a picture; give pictures as files")
        if found:
            raise DataError(f"the text holds the control token {found.group()!r}; write it in another way")
    try:
        text = assembly.tokenizer.apply_chat_template(
            list(messages), chat_template=portable(assembly.template), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program, and can fail in any way
        raise DataError(f"the model's chat template cannot be rendered: {error}") from error
    assert isinstance(text, str)
    return text


def prompt_ids(assembly: Assembly, prompt: Prompt) -> list[int]:
    """Ids of the prompt with every picture expanded. Raises DataError where pictures and places differ."""
    text = render(assembly, prompt.messages)
    places = text.count(IMAGE_TOKEN)
    if places != len(prompt.pixels):
        raise DataError(f"the prompt has {places} places for pictures, {len(prompt.pixels)} were given")
    expanded = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * assembly.spec.image_tokens)
    # The template writes whatever begins a prompt, as it does in training.
    ids: list[int] = assembly.tokenizer(expanded, add_special_tokens=False)["input_ids"]
    return ids


def batch_inputs(assembly: Assembly, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """Model inputs of several prompts, left-padded: `input_ids`, `attention_mask`, `pixel_values`."""
    ids = [prompt_ids(assembly, prompt) for prompt in prompts]
    length = max(map(len, ids))
    pad = int(assembly.tokenizer.pad_token_id or 0)
    model = assembly.model
    inputs = {
        "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids]),
    }
    pixels = [each for prompt in prompts for each in prompt.pixels]
    if pixels:
        inputs["pixel_values"] = torch.stack(pixels).to(model.dtype)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def answer(assembly: Assembly, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float = 0.0) -> list[str]:
    """Answers of a batch; greedy at temperature 0."""
    inputs = batch_inputs(assembly, prompts)
    with torch.inference_mode():
        output = assembly.model.generate(**inputs, **_options(assembly, max_new_tokens, temperature))
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in assembly.tokenizer.batch_decode(new, skip_special_tokens=True)]


def stream(assembly: Assembly, prompt: Prompt, max_new_tokens: int, temperature: float = 0.0) -> Iterator[str]:
    """Pieces of one answer as they come; an error of the model is raised here, not lost in its thread."""
    streamer = TextIteratorStreamer(assembly.tokenizer, skip_prompt=True, skip_special_tokens=True)
    inputs = batch_inputs(assembly, [prompt])
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with torch.inference_mode():
                assembly.model.generate(**inputs, **_options(assembly, max_new_tokens, temperature), streamer=streamer)
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]


def _options(assembly: Assembly, max_new_tokens: int, temperature: float) -> dict[str, Any]:
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    return {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": stop_ids(assembly),
        "pad_token_id": assembly.tokenizer.pad_token_id,
        **sampling,
    }


def stop_ids(assembly: Assembly) -> list[int]:
    """What ends an answer: the template's stop, the tokenizer's EOS, and what the LLM's own configuration says."""
    tokenizer, stops = assembly.tokenizer, _ids(assembly.model.generation_config.eos_token_id)
    stop = stop_token(assembly.template, tokenizer) if has_marks(assembly.template) else None
    if stop is not None:
        stops = [*stops, tokenizer.convert_tokens_to_ids(stop)]
    return sorted({*stops, tokenizer.eos_token_id} - {None})


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
