"""Sizes, schedules, the train split and the training loop that both backbones share."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from llava_train.demo import easy_vqa
from llava_train.demo.easy_vqa import Question, Scene

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<pad>")


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


def split_pictures(held_out: int, seed: int) -> tuple[list[Picture], list[Picture]]:
    """The train split's pictures: those to learn from, and `held_out` of them kept for the figures."""
    groups = easy_vqa.by_image(easy_vqa.questions("train"))
    pictures = [Picture(key, easy_vqa.scene_of(items), tuple(items)) for key, items in groups.items()]
    random.Random(seed).shuffle(pictures)
    return pictures[held_out:], pictures[:held_out]


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
