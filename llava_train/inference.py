"""Asking a loaded model: messages and pictures -> the prompt's ids -> an answer.

Evaluation, chat and the export check all ask through here, so they see the same prompt.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, TextIteratorStreamer

from llava_train.data.encode import control_pattern, with_markers
from llava_train.data.pictures.shapes import Picture, Shape, Shown
from llava_train.data.pictures.shaping import build_shape
from llava_train.data.templates.fit import stop_token
from llava_train.data.templates.template import has_marks, portable
from llava_train.errors import DataError
from llava_train.model.assemble import Assembly
from llava_train.model.families.base import Pictures
from llava_train.model.families.questions import padded, questions_in, reads_text
from llava_train.model.families.table import family_of
from llava_train.model.llm import IMAGE_TOKEN
from llava_train.model.spec import ModelSpec

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's turn, and its pictures in reading order."""

    messages: tuple[Message, ...]
    pictures: tuple[Picture, ...] = ()


def message(role: str, text: str, images: int = 0) -> Message:
    """A chat message with `images` pictures before its text."""
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def shape_of(spec: ModelSpec, image_processor: Any) -> Shape:
    """How a model's pictures become pixels and tokens."""
    return build_shape(spec.architecture, image_processor, spec.image_tokens, spec.picture_options)


def read_pictures(assembly: Assembly, images: Sequence[Image.Image]) -> tuple[Picture, ...]:
    """The RGB pictures of a conversation as the model reads them."""
    shape = shape_of(assembly.spec, assembly.image_processor)
    shown = [Shown(image.width, image.height, alone=len(images) == 1) for image in images]
    return tuple(map(shape.picture, images, shown))


def render(assembly: Assembly, messages: Sequence[Message]) -> str:
    """The prompt as text, one place a picture, up to where the assistant is to speak."""
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
    # Our templates write `<image>` for a picture; a model's own writes what its family says.
    family = family_of(assembly.model)
    return with_markers(text, family.marker, family.line_end)


def prompt_ids(assembly: Assembly, prompt: Prompt) -> list[int]:
    """Ids of the prompt with every picture expanded. Raises DataError where pictures and places differ, or if it is
    empty."""
    text = render(assembly, prompt.messages)
    token = family_of(assembly.model).image_token
    pieces = text.split(token)
    if len(pieces) - 1 != len(prompt.pictures):
        raise DataError(f"the prompt has {len(pieces) - 1} places for pictures, {len(prompt.pictures)} were given")
    places = [token * picture.tokens for picture in prompt.pictures]
    expanded = "".join(piece + place for piece, place in zip(pieces, [*places, ""]))
    # The template writes whatever begins a prompt, as it does in training.
    ids: list[int] = assembly.tokenizer(expanded, add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataError("the prompt is empty: this model's template says nothing without a picture; show one")
    return ids


def batch_inputs(assembly: Assembly, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """What the model's `forward` and `generate` take for several prompts, left-padded."""
    ids = [prompt_ids(assembly, prompt) for prompt in prompts]
    text = None
    if reads_text(assembly.model) and any(prompt.pictures for prompt in prompts):
        questions = [each for prompt in prompts for each in _questions(assembly, prompt)]
        text = padded(questions, assembly.model.device)
    length = max(map(len, ids))
    pad = int(assembly.tokenizer.pad_token_id or 0)
    model = assembly.model
    input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids], device=model.device)
    pictures = [each for prompt in prompts for each in prompt.pictures]
    with torch.inference_mode():
        return family_of(model).prompt_inputs(model, input_ids, mask, _joined(pictures, model, text))


def _joined(
    pictures: Sequence[Picture], model: PreTrainedModel, text: tuple[torch.Tensor, torch.Tensor] | None
) -> Pictures | None:
    if not pictures:
        return None
    pixels = torch.cat([picture.pixels for picture in pictures]).to(model.device, model.dtype)
    facts = {name: torch.stack([picture.facts[name] for picture in pictures]) for name in pictures[0].facts}
    return Pictures(pixels, None, facts, text)


def _questions(assembly: Assembly, prompt: Prompt) -> list[list[int]]:
    """What is asked about each picture, as in training: the text behind it up to where its turn is answered."""
    asked = [number for number, each in enumerate(prompt.messages) if each["role"] == "user"]
    turns = [prompt.messages[: number + 1] for number in asked]
    shown = [sum(part["type"] == "image" for each in turn for part in each["content"]) for turn in turns]
    ends = [len(prompt_ids(assembly, Prompt(turn, prompt.pictures[:count]))) for turn, count in zip(turns, shown)]
    config = assembly.model.config
    return questions_in(prompt_ids(assembly, prompt), config.image_token_id, config.image_seq_length, ends)


def answer(assembly: Assembly, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float = 0.0) -> list[str]:
    """Answers of a batch; greedy at temperature 0."""
    mixes = family_of(assembly.model).mixes
    counts = [0 if mixes else len(prompt.pictures) for prompt in prompts]
    answers = [""] * len(prompts)
    for count in sorted({*counts}):
        places = [place for place, own in enumerate(counts) if own == count]
        texts = _answers(assembly, [prompts[place] for place in places], max_new_tokens, temperature)
        for place, text in zip(places, texts):
            answers[place] = text
    return answers


def _answers(assembly: Assembly, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float) -> list[str]:
    inputs = batch_inputs(assembly, prompts)
    with torch.inference_mode():
        output = assembly.model.generate(**inputs, **_options(assembly, max_new_tokens, temperature))
    # Where embeddings go in, only what is new comes out.
    new = output[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else output
    return [text.strip() for text in assembly.tokenizer.batch_decode(new, skip_special_tokens=True)]


def stream(
    assembly: Assembly,
    prompt: Prompt,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int | None = None,
) -> Generator[str, None, None]:
    """Pieces of one answer as they come; an error of the model is raised here, not lost in its thread.

    Whoever stops reading (closes the generator, presses Ctrl-C) stops the model at its next token. Without `top_p`
    the model's own is taken. A `seed` makes what is drawn the same each time.
    """
    inputs = batch_inputs(assembly, [prompt])
    streamer = TextIteratorStreamer(assembly.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []
    stopped = Event()

    def stop(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), stopped.is_set(), dtype=torch.bool, device=ids.device)

    def work() -> None:
        options = _options(assembly, max_new_tokens, temperature, top_p)
        try:
            with torch.inference_mode(), _drawn_from(seed):
                assembly.model.generate(**inputs, **options, streamer=streamer, stopping_criteria=[stop])
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        stopped.set()
        thread.join()
    if failure:
        raise failure[0]


@contextmanager
def _drawn_from(seed: int | None) -> Iterator[None]:
    """Random numbers that begin with a seed, and leave those of everybody else as they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _options(assembly: Assembly, max_new_tokens: int, temperature: float, top_p: float | None = None) -> dict[str, Any]:
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature} | ({} if top_p is None else {"top_p": top_p})
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
