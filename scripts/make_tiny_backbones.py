#!/usr/bin/env python3
"""Train the two tiny backbones that `llava-train demo` connects, from easy-vqa's train split alone.

Both are made from scratch on the CPU, each by the method its big relatives were made by:

  vision/  a CLIP vision tower, trained with a text encoder by the contrastive objective on pictures and captions
  llm/     a byte-level BPE tokenizer and a Llama language model, trained on captions and on dialogues in the chat
           template where a few words stand where LLaVA will later put the picture

Neither has seen the other: the language model knows no pixels, and the vision tower no question. What LLaVA training
adds is the connection. The test split is never read.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llava_train.demo import easy_vqa
from llava_train.demo.easy_vqa import CAPTION_FORMS, CAPTION_PROMPTS, Question, Scene

DEFAULT_OUT = Path(__file__).resolve().parents[1] / "llava_train" / "demo" / "backbones"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<pad>")
FILLER = (
    "a",
    "the",
    "an",
    "image",
    "shape",
    "light",
    "background",
    "there",
    "is",
    "in",
    "on",
    "of",
    "with",
    "shows",
)
IGNORE = -100

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- set body -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- else -%}{{- '<image>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endset -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- body + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- body + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

CARD = """\
# Tiny backbones

Two tiny models for the demo and for tests of `llava-train`, each trained from scratch on the **train split alone** of
[easy-vqa](https://pypi.org/project/easy-vqa/) 1.0 (MIT): pictures of one coloured shape, and questions about them.

- `vision/`: a `CLIPVisionModel` with its image processor, trained by the contrastive objective against a small text
  encoder (not kept) on pictures and captions derived from the training questions
- `llm/`: a `LlamaForCausalLM` with a byte-level BPE tokenizer and a ChatML chat template, trained on captions and
  on dialogues in which a few words stand in place of the picture

They have not seen each other: connecting them is what LLaVA training does. They know nothing but coloured shapes.

Made by `python scripts/make_tiny_backbones.py --seed {seed} --threads {threads}`. Weights are stored in bfloat16.

{sizes}

| figure | value |
| --- | --- |
{rows}
"""


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of the CLIP vision tower, named as in `CLIPVisionConfig`."""

    image_size: int = 64
    patch_size: int = 16
    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 5
    num_attention_heads: int = 4


@dataclass(frozen=True)
class LanguageSizes:
    """Sizes of the language model, named as in `LlamaConfig`."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    max_position_embeddings: int = 1024


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one of the two is trained."""

    steps: int
    batch: int
    learning_rate: float
    warmup: float = 0.05
    weight_decay: float = 0.05


@dataclass(frozen=True)
class Plan:
    """Everything that decides the result, apart from the seed."""

    vocabulary: int = 512
    held_out: int = 400
    vision: VisionSizes = field(default_factory=VisionSizes)
    language: LanguageSizes = field(default_factory=LanguageSizes)
    contrastive: Schedule = Schedule(steps=2500, batch=64, learning_rate=1e-3)
    pretraining: Schedule = Schedule(steps=1300, batch=32, learning_rate=1e-3)


@dataclass(frozen=True)
class Picture:
    """One training picture: its pixels' id, what is known of it, and its questions."""

    image_id: int
    scene: Scene
    questions: tuple[Question, ...]


def main() -> None:
    """Train what was asked for, print the figures and write the model card."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    plan, started = Plan(), time.perf_counter()
    train, held_out = split_pictures(plan.held_out, arguments.seed)
    tokenizer = train_tokenizer(plan.vocabulary)

    figures = {}
    if "llm" in arguments.only:
        figures |= make_language_model(tokenizer, train, held_out, plan, arguments.seed, arguments.out / "llm")
    if "vision" in arguments.only:
        figures |= make_vision_tower(tokenizer, train, held_out, plan, arguments.seed, arguments.out / "vision")
    figures["minutes"] = round((time.perf_counter() - started) / 60, 1)
    for name, value in figures.items():
        print(f"{name}: {value}")
    if set(arguments.only) == {"vision", "llm"}:
        write_card(arguments.out, plan, figures, arguments.seed, arguments.threads)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="folder for vision/ and llm/ (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="same seed and threads, same weights (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("vision", "llm"),
        default=("vision", "llm"),
        help="make one of the two (the model card is written only when both are made)",
    )
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------- the train split


def split_pictures(held_out: int, seed: int) -> tuple[list[Picture], list[Picture]]:
    """The train split's pictures: those to learn from, and `held_out` of them kept for the figures."""
    groups = easy_vqa.by_image(easy_vqa.questions("train"))
    pictures = [Picture(key, easy_vqa.scene_of(items), tuple(items)) for key, items in groups.items()]
    random.Random(seed).shuffle(pictures)
    return pictures[held_out:], pictures[:held_out]


# ------------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose merges come from the training questions, answers and captions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_text(), trainer)
    end, _, turn_end, _, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=turn_end,
        pad_token=pad,
        additional_special_tokens=[end, "<|im_start|>", "<image>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=LanguageSizes.max_position_embeddings,
    )


def tokenizer_text() -> Iterator[str]:
    """The texts the merges are learned from."""
    yield from ("user\n", "assistant\n", "system\n", " ".join(("", *FILLER)))
    yield from CAPTION_PROMPTS
    for item in easy_vqa.questions("train"):
        yield from (item.text, capitalized(item.text), item.answer, f" {item.answer}")
    for record in easy_vqa.caption_records():
        yield record["conversations"][1]["value"]


def capitalized(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


# -------------------------------------------------------------------------------------------------- language model


def make_language_model(
    tokenizer: PreTrainedTokenizerFast,
    train: list[Picture],
    held_out: list[Picture],
    plan: Plan,
    seed: int,
    out: Path,
) -> dict[str, object]:
    """Train the language model, save its folder and return its figures."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(language_config(tokenizer, plan))
    rng = random.Random(seed)

    def loss(size: int, progress: float) -> torch.Tensor:
        pictures = rng.choices(train, k=size)
        return language_loss(model, [training_text(rng, picture, tokenizer, progress) for picture in pictures])

    final_loss = fit(model, loss, plan.pretraining, "language model")
    model.eval()
    figures = {
        "language model parameters": sum(p.numel() for p in model.parameters()),
        "language model training loss": round(final_loss, 4),
        "answers from word pictures (held-out pictures)": answer_accuracy(model, held_out, tokenizer, seed),
    }
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=32,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return figures


def language_config(tokenizer: PreTrainedTokenizerFast, plan: Plan) -> LlamaConfig:
    """The language model's configuration; the vocabulary is padded to a multiple of 64."""
    return LlamaConfig(
        **asdict(plan.language),
        vocab_size=-(-len(tokenizer) // 64) * 64,
        bos_token_id=tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[0]),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


Tokens = tuple[list[int], list[bool]]


def training_text(rng: random.Random, picture: Picture, tokenizer: PreTrainedTokenizerFast, progress: float) -> Tokens:
    """One text about one scene: a dialogue in the chat template, or a word picture and its caption."""
    words = word_picture(rng, picture.scene)
    kind = rng.random() if not picture.scene.empty else 1.0
    if kind < 0.15:
        caption = picture.scene.caption(rng.choice(CAPTION_FORMS))
        if kind < 0.05:
            return join(tokenizer, [(f"{words}\n", False), (f"{caption}\n", True)])
        return dialogue(words, [(rng.choice(CAPTION_PROMPTS), caption)], tokenizer)
    return dialogue(words, question_turns(rng, picture, 5, progress), tokenizer)


def question_turns(rng: random.Random, picture: Picture, most: int, progress: float) -> list[tuple[str, str]]:
    """Some of the picture's questions with their answers, now and then with a capital letter.

    Two things make this learnable in minutes. Questions that name the picture's own shape or colour are drawn more
    often, because six of seven colours asked about are absent. And questions with a negation come late: whether a
    word is in the picture must be known before "not" can turn it around.
    """
    named = (picture.scene.shape or "-", picture.scene.color or "-")
    late = min(1.0, max(0.02, (progress - 0.4) / 0.2))

    def weight(text: str) -> float:
        return (4.0 if any(word in text for word in named) else 1.0) * (late if " no" in text else 1.0)

    weights = [weight(item.text) for item in picture.questions]
    chosen = dict.fromkeys(rng.choices(picture.questions, weights, k=most))
    return [(capitalized(item.text) if rng.random() < 0.2 else item.text, item.answer) for item in chosen]


def dialogue(words: str, turns: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> Tokens:
    """A dialogue that opens with a word picture, in the chat template; the answers are learned."""
    pieces = []
    for number, (question, answer) in enumerate(turns):
        content = question if number else f"{words}\n{question}"
        pieces.append((f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n", False))
        pieces += [(f"{answer}<|im_end|>", True), ("\n", False)]
    return join(tokenizer, pieces)


def join(tokenizer: PreTrainedTokenizerFast, pieces: list[tuple[str, bool]]) -> Tokens:
    """Tokens of pieces of text, with the piece's mark (learned or not) on each."""
    ids: list[int] = []
    learned: list[bool] = []
    for (_, mark), piece in zip(pieces, tokenizer([text for text, _ in pieces])["input_ids"]):
        ids += piece
        learned += [mark] * len(piece)
    return ids, learned


def word_picture(rng: random.Random, scene: Scene) -> str:
    """What stands in place of the picture: a caption, or its words among filler words in any order."""
    facts = [word for word in (scene.color, scene.shape) if word]
    if facts and rng.random() < 0.2:
        return scene.caption(rng.choice(CAPTION_FORMS))
    words = facts + rng.choices(facts, k=rng.randint(0, 10)) if facts else []
    words += rng.choices(FILLER, k=rng.randint(0, 3))
    rng.shuffle(words)
    return " " + " ".join(words)


def language_loss(model: LlamaForCausalLM, texts: list[Tokens]) -> torch.Tensor:
    """Cross-entropy over the captions and answers."""
    ids, labels = padded(texts, model.config.pad_token_id)
    logits = model(input_ids=ids).logits[:, :-1]  # padding is on the right, so causal attention needs no mask
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def padded(texts: list[Tokens], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of a batch, right-padded."""
    longest = max(len(ids) for ids, _ in texts)
    ids = torch.full((len(texts), longest), pad)
    labels = torch.full((len(texts), longest), IGNORE)
    for row, (tokens, learned) in enumerate(texts):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, : len(tokens)] = torch.where(torch.tensor(learned), ids[row, : len(tokens)], IGNORE)
    return ids, labels


@torch.inference_mode()
def answer_accuracy(
    model: LlamaForCausalLM, pictures: list[Picture], tokenizer: PreTrainedTokenizerFast, seed: int
) -> float:
    """Exact match of greedy answers to the questions about fully known scenes, described by word pictures."""
    rng = random.Random(seed)
    texts = [
        dialogue(word_picture(rng, picture.scene), [(item.text, item.answer)], tokenizer)
        for picture in pictures
        if picture.scene.complete
        for item in picture.questions
    ]
    right = 0
    for start in tqdm(range(0, len(texts), 128), desc="answers", leave=False):
        ids, labels = padded(texts[start : start + 128], model.config.pad_token_id)
        best = model(input_ids=ids).logits[:, :-1].argmax(-1)
        right += int(((best == labels[:, 1:]) | (labels[:, 1:] == IGNORE)).all(1).sum())
    return round(right / len(texts), 4)


# ----------------------------------------------------------------------------------------------------- vision tower


class TinyCLIP(nn.Module):
    """A CLIP vision tower and a small text encoder with a common space to compare pictures and captions in.

    The text encoder adds up word embeddings. (A transformer here collapses: before the tower tells shapes apart, the
    easiest way to a lower loss is to make the captions of all shapes alike, and then no gradient is left to learn
    shapes from.) Besides the tower's pooled output, the mean of the patch features that LLaVA reads is compared too.
    """

    def __init__(self, sizes: VisionSizes, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.vision = CLIPVisionModel(CLIPVisionConfig(**asdict(sizes)))
        self.pooled = nn.Linear(sizes.hidden_size, width, bias=False)
        self.patches = nn.Sequential(nn.LayerNorm(sizes.hidden_size), nn.Linear(sizes.hidden_size, width, bias=False))
        self.words = nn.EmbeddingBag(vocabulary, width, mode="sum")
        self.text = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors from the pooled output and from the patch features of the last layer but one."""
        out = self.vision(pixel_values=pixels, output_hidden_states=True)
        patches = out.hidden_states[-2][:, 1:].mean(1)
        return F.normalize(self.pooled(out.pooler_output), dim=-1), F.normalize(self.patches(patches), dim=-1)

    def encode_texts(self, texts: list[list[int]]) -> torch.Tensor:
        """Unit vectors of tokenized captions."""
        starts = torch.tensor([0, *accumulate(map(len, texts[:-1]))])
        words = self.words(torch.tensor(list(chain.from_iterable(texts))), starts)
        return F.normalize(self.text(words / 2), dim=-1)


def make_vision_tower(
    tokenizer: PreTrainedTokenizerFast,
    train: list[Picture],
    held_out: list[Picture],
    plan: Plan,
    seed: int,
    out: Path,
) -> dict[str, object]:
    """Train the tower against captions, save its folder and return its figures."""
    torch.manual_seed(seed)
    clip, rng = TinyCLIP(plan.vision, len(tokenizer)), random.Random(seed)
    processor = image_processor(plan.vision.image_size)
    train = [picture for picture in train if picture.scene.complete]
    pixels = load_pixels(train, processor)
    rooms = [room_around(image) for image in pixels]

    def loss(size: int, progress: float) -> torch.Tensor:
        rows = rng.sample(range(len(train)), size)
        images = torch.stack([augmented(pixels[row], rooms[row], rng) for row in rows])
        captions = [train[row].scene.caption(rng.choice(CAPTION_FORMS)) for row in rows]
        scenes = torch.tensor([scene_number(train[row].scene) for row in rows])
        return contrastive_loss(clip, images, tokenizer(captions)["input_ids"], scenes)

    final_loss = fit(clip, loss, plan.contrastive, "vision tower")
    clip.eval()
    pooled, patches = retrieval_accuracy(clip, held_out, tokenizer, processor)
    save_vision_tower(clip.vision, processor, out)
    return {
        "vision tower parameters": sum(p.numel() for p in clip.vision.parameters()),
        "contrastive training loss": round(final_loss, 4),
        "caption retrieval of 24, pooled output (held-out pictures)": pooled,
        "caption retrieval of 24, patch features LLaVA reads (held-out pictures)": patches,
    }


def image_processor(size: int) -> CLIPImageProcessor:
    """Pictures in CLIP's pre-processing at the tower's size; mean and deviation are those of the train split."""
    return CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.9, 0.9, 0.9],
        image_std=[0.2, 0.2, 0.2],
    )


def load_pixels(pictures: list[Picture], processor: CLIPImageProcessor) -> torch.Tensor:
    """The pictures as the tower takes them, in one tensor."""
    folder = easy_vqa.image_folder("train")
    images = [Image.open(folder / f"{picture.image_id}.png").convert("RGB") for picture in pictures]
    return torch.as_tensor(np.stack(processor(images)["pixel_values"]))


def room_around(image: torch.Tensor) -> tuple[int, int, int, int]:
    """How far the shape can move up, down, left and right on its even background."""
    background = image.flatten(1).median(1).values[:, None, None]
    shape = (image - background).abs().sum(0) > 0.3
    rows, columns = (shape.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return rows[0], shape.shape[0] - 1 - rows[-1], columns[0], shape.shape[1] - 1 - columns[-1]


def augmented(image: torch.Tensor, room: tuple[int, int, int, int], rng: random.Random) -> torch.Tensor:
    """The shape moved to a random place of the picture, and mirrored half of the time."""
    up, down, left, right = room
    moved = torch.roll(image, (rng.randint(-up, down), rng.randint(-left, right)), (1, 2))
    return moved.flip(-1) if rng.random() < 0.5 else moved


def contrastive_loss(
    clip: TinyCLIP, pixels: torch.Tensor, captions: list[list[int]], scenes: torch.Tensor
) -> torch.Tensor:
    """InfoNCE in both directions; all pairs of the same scene in the batch are positives, with equal shares."""
    positive = (scenes[:, None] == scenes[None, :]).float()
    target = positive / positive.sum(1, keepdim=True)
    texts = clip.encode_texts(captions)
    loss = torch.zeros(())
    for images in clip.encode_images(pixels):
        logits = clip.log_scale.exp() * images @ texts.T
        loss = loss + (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 4
    return loss


def scene_number(scene: Scene) -> int:
    """The number, 0 to 23, of a fully known scene."""
    assert scene.shape and scene.color
    return easy_vqa.SHAPES.index(scene.shape) * len(easy_vqa.COLORS) + easy_vqa.COLORS.index(scene.color)


@torch.inference_mode()
def retrieval_accuracy(
    clip: TinyCLIP, pictures: list[Picture], tokenizer: PreTrainedTokenizerFast, processor: CLIPImageProcessor
) -> list[float]:
    """How often the right one of the 24 possible captions is nearest, by pooled output and by patch features."""
    pictures = [picture for picture in pictures if picture.scene.complete]
    captions = [Scene(shape, color).caption() for shape in easy_vqa.SHAPES for color in easy_vqa.COLORS]
    texts = clip.encode_texts(tokenizer(captions)["input_ids"])
    truth = torch.tensor([scene_number(picture.scene) for picture in pictures])
    vectors = clip.encode_images(load_pixels(pictures, processor))
    return [round(((images @ texts.T).argmax(1) == truth).float().mean().item(), 4) for images in vectors]


def save_vision_tower(tower: CLIPVisionModel, processor: CLIPImageProcessor, out: Path) -> None:
    """Save as a `CLIPVisionModel` folder under the classic `vision_model.*` names, which every release loads."""
    tower.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)
    file = out / "model.safetensors"
    tensors = {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


# --------------------------------------------------------------------------------------------------------- training


def fit(model: torch.nn.Module, loss: Callable[[int, float], torch.Tensor], schedule: Schedule, name: str) -> float:
    """AdamW with warm-up and cosine decay; the mean loss of the last 50 steps."""
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=schedule.weight_decay
    )
    warmup = max(1, int(schedule.steps * schedule.warmup))
    ramp = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.steps - warmup)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [ramp, decay], [warmup])
    recent: list[float] = []
    bar = tqdm(range(schedule.steps), desc=name)
    for step in bar:
        value = loss(schedule.batch, step / schedule.steps)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        recent = [*recent[-49:], value.item()]
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}")
    return sum(recent) / len(recent)


def write_card(out: Path, plan: Plan, figures: dict[str, object], seed: int, threads: int) -> None:
    """The model card beside the weights: what they are, from what, how, and the figures."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    sizes = "\n".join(
        f"- `{name}/`: {', '.join(f'{key} {value}' for key, value in asdict(part).items())}"
        for name, part in (("vision", plan.vision), ("llm", plan.language))
    )
    card = CARD.format(seed=seed, threads=threads, sizes=sizes, rows=rows)
    out.joinpath("README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
