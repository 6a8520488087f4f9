"""How many tokens a set of conversations costs when those about one picture share their beginning."""

from __future__ import annotations

import math

import numpy as np

from llava_train.data.micro_batches import Cut, Sizes, waste
from llava_train.data.mixture import Mixture
from llava_train.data.plan import Plan
from throughput.models import LLAVA_IMAGE, LLAVA_SYSTEM, LLAVA_TEXT
from throughput.records import SIGMA

CONVERSATIONS, PICTURES = 158_000, 81_000
"""Of LLaVA-Instruct-150K, by its dataset card: 158K conversations on 81K pictures of COCO."""
STEP, MICRO = 128, 16
"""Samples of a step and of a micro-batch of LLaVA-1.5's stage 2."""


def instruct_150k(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of text behind the picture, number of the picture) of each conversation of a set of that shape.

    Every picture has one conversation at least, the others fall where chance wants.
    """
    rng = np.random.default_rng(seed)
    more = rng.integers(0, PICTURES, CONVERSATIONS - PICTURES)
    pictures = rng.permutation(np.concatenate([np.arange(PICTURES), more]))
    middle = math.log(LLAVA_TEXT - LLAVA_SYSTEM) - SIGMA**2 / 2
    return np.maximum(8, rng.lognormal(middle, SIGMA, CONVERSATIONS)).astype(int), pictures


def tokens_saved(text: np.ndarray, pictures: np.ndarray, shared: int = LLAVA_SYSTEM + LLAVA_IMAGE) -> float:
    """Tokens of the set divided by the positions that our plan computes for them, with pictures kept together.

    Args:
        text: tokens of each conversation behind what is shared, (conversations,).
        pictures: number of the picture it is about, (conversations,).
        shared: tokens of system prompt and picture.
    """
    one, lengths = np.ones(len(text), dtype=int), text + shared
    sizes = Sizes(lengths, text, one, shared * one, one, pictures + 1)
    plan = Plan.of(Mixture.whole(len(text)), STEP, 1.0, None, 0, pictures + 1)
    budget = max(int(lengths.max()), round(MICRO * float(lengths.mean())))
    return 1.0 / waste(plan, sizes, Cut(MICRO, budget=budget, share=True))["packed"]
