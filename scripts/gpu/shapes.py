"""What is measured: models of random weights made on the device, samples of random tokens, and the three stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_train.data.encode import IGNORE
from llava_train.data.micro_batches import Sizes
from llava_train.model.costs import Counts
from llava_train.recipe import LoraSettings, Mode, OptimizationSettings, PartTuning, TuneSettings

CAPTION, CAPTION_SPREAD = 24, 10
"""Tokens of text in stage 1: 600 +- 10 with a picture of 576; all but two are supervised."""
SIGMA, WITH_IMAGE, SUPERVISED = 0.8, 0.94, 0.65
"""Stage 2: lognormal text, the share with a picture, and of the text the share that is supervised: 19 % of all."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of what it reads.

    Attributes:
        text: `LlamaConfig` values.
        vision: `CLIPVisionConfig` values.
        image_id: the id of `<image>`; text has smaller ones.
        mean: tokens of text in a sample of stage 2.
        longest: tokens of a sample at most.
        step: samples a step.
        budgets: positions of a micro-batch to choose from, the largest first.
        micro: samples of the Trainer's micro-batch, by stage (as published, on each of eight devices).
        product: side of the square matrices that tell the device's peak.
    """

    text: Mapping[str, int | float]
    vision: Mapping[str, int]
    image_id: int
    mean: float
    longest: int
    step: int
    budgets: tuple[int, ...]
    micro: Mapping[str, int]
    product: int

    @property
    def image_tokens(self) -> int:
        """Positions of a picture."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


def _llama(width: int, inner: int, layers: int, heads: int, vocabulary: int) -> dict[str, int | float]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    fixed = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "pad_token_id": 0}
    return {**dict(zip(names, (width, inner, layers, heads, vocabulary))), **fixed}


def _clip(width: int, layers: int, heads: int, size: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    return dict(zip(names, (width, 4 * width, layers, heads, size, 14)))


SHAPES = {
    "7b": Shape(
        text=_llama(4096, 11008, 32, 32, 32_064),
        vision=_clip(1024, 24, 16, 336),
        image_id=32_000,
        mean=225,
        longest=2048,
        step=128,
        budgets=(16_384, 8192, 4096),
        micro={"stage1": 32, "lora": 16, "full": 16},
        product=8192,
    ),
    "tiny": Shape(
        text=_llama(64, 172, 4, 4, 512),
        vision=_clip(32, 3, 2, 56),
        image_id=500,
        mean=20,
        longest=96,
        step=8,
        budgets=(256, 128),
        micro={"stage1": 4, "lora": 4, "full": 4},
        product=256,
    ),
}


@dataclass(frozen=True)
class Stage:
    """A published stage: what trains, on which data, how fast it is meant to be (share of the device's peak)."""

    connector: PartTuning
    llm: PartTuning
    captions: bool
    target: float

    @property
    def modes(self) -> dict[str, Mode]:
        """How each part trains."""
        return {"vision": "frozen", "connector": self.connector.mode, "llm": self.llm.mode}

    def tune(self, rank: int = 128) -> TuneSettings:
        """The same as the recipe has it."""
        return TuneSettings(connector=self.connector, llm=self.llm, lora=LoraSettings(rank, 2 * rank))


STAGES = {
    "stage1": Stage(PartTuning("full", 1e-3), PartTuning("frozen"), True, 0.50),
    "lora": Stage(PartTuning("full", 2e-5), PartTuning("lora", 2e-4), False, 0.45),
    "full": Stage(PartTuning("full", 2e-5), PartTuning("full", 2e-5), False, 0.45),
}


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens of a sample, int64 (tokens,), labels unshifted and -100 where there is no loss; `images` is 0 or 1."""

    input_ids: np.ndarray
    labels: np.ndarray
    images: int

    @property
    def supervised(self) -> int:
        """Positions that carry loss."""
        return int((self.labels[1:] != IGNORE).sum())


def make_sample(shape: Shape, text: int, supervised: int, images: int, rng: np.random.Generator) -> Sample:
    """BOS, the picture, text; its last `supervised` tokens carry loss."""
    words = rng.integers(3, shape.image_id, text - 1)
    ids = np.concatenate([[1], np.full(images * shape.image_tokens, shape.image_id), words]).astype(np.int64)
    labels = np.where(np.arange(len(ids)) < len(ids) - supervised, IGNORE, ids)
    return Sample(ids, labels, images)


def make_samples(shape: Shape, captions: bool, count: int, seed: int = 0) -> list[Sample]:
    """Samples as long as those of stage 1 (`captions`) or of stage 2."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        if captions:
            text = int(rng.integers(CAPTION - CAPTION_SPREAD, CAPTION + CAPTION_SPREAD + 1))
            made.append(make_sample(shape, text, text - 2, 1, rng))
            continue
        images = int(rng.random() < WITH_IMAGE)
        drawn = round(rng.lognormal(np.log(shape.mean) - SIGMA**2 / 2, SIGMA))
        text = min(max(drawn, 8), shape.longest - images * shape.image_tokens)
        made.append(make_sample(shape, text, max(1, round(SUPERVISED * text)), images, rng))
    return made


def sizes_of(samples: Sequence[Sample], shape: Shape, shared: bool) -> Sizes:
    """What cutting a step knows of them. `shared`: two neighbours with pictures have the same one."""
    lengths = np.array([len(sample.input_ids) for sample in samples])
    images = np.array([sample.images for sample in samples])
    pairs = np.arange(len(samples)) // 2
    both = (images & images[pairs * 2 + 1 - np.arange(len(samples)) % 2]) * int(shared)
    return Sizes(
        lengths,
        np.array([sample.supervised for sample in samples]),
        images,
        both * (1 + shape.image_tokens),
        both,
        both * (pairs + 1),
    )


def counts_of(samples: Sequence[Sample]) -> Counts:
    """What passes through the model, without padding."""
    lengths = [len(sample.input_ids) for sample in samples]
    return Counts(
        tokens=sum(lengths),
        pairs=sum(length * (length + 1) / 2 for length in lengths),
        images=sum(sample.images for sample in samples),
        supervised=sum(sample.supervised for sample in samples),
    )


def make_model(
    shape: Shape, device: torch.device, dtype: torch.dtype, layers: int | None = None, seed: int = 0
) -> LlavaForConditionalGeneration:
    """The stock class with random weights, made where they stay (the meta device too): none on the CPU in between."""
    text = dict(shape.text) | ({"num_hidden_layers": layers} if layers else {})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape.vision),
        text_config=LlamaConfig(**text),
        image_token_index=shape.image_id,
        image_seq_length=shape.image_tokens,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    with device:
        return LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")


def optimization_of(precision: str, step: int) -> OptimizationSettings:
    """AdamW at a constant rate."""
    return OptimizationSettings(global_batch_size=step, precision=precision, schedule="constant", warmup_ratio=0.0)
