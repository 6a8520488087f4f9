"""Models to measure on: stock Llava folders of random weights, and what of their FLOPs each part takes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_train.demo.run import BACKBONES
from llava_train.model.costs import costs_of

LLAVA_IMAGE, LLAVA_TEXT, LLAVA_SYSTEM, LLAVA_CAPTION, LLAVA_LONGEST = 576, 225, 35, 24, 2048
"""Tokens of LLaVA-1.5: an image, the mean text of the 665K mix, its system prompt, a caption, the longest sample."""
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
SPACE = "\u2581"
"""How `Metaspace` writes the space before a word."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one model and of what it is trained on.

    Attributes:
        llm: `LlamaConfig` values; empty takes the demo's backbones.
        tower: `CLIPVisionConfig` values.
        template: `data.template` of the instructions.
        opening: tokens of a conversation that belong to no round (BOS, system prompt, the space before a picture).
        round: tokens of a round beside what is said.
        text: mean tokens of text in an instruction, all of that included.
        system: words of the system prompt.
        micro, step: samples a micro-batch and a step.
        records: samples of a set (without `--quick` and `--records`).
    """

    llm: dict[str, int]
    tower: dict[str, int]
    template: str
    opening: int
    round: int
    text: float
    system: int
    micro: int
    step: int
    records: int

    @property
    def image_tokens(self) -> int:
        """Tokens of a picture."""
        return (self.tower["image_size"] // self.tower["patch_size"]) ** 2

    @property
    def scale(self) -> float:
        """Tokens of a picture, measured in LLaVA-1.5's."""
        return self.image_tokens / LLAVA_IMAGE


def _shape(llm: dict[str, int], tower: dict[str, int], records: int) -> Shape:
    """A shape whose text is to its pictures as in LLaVA-1.5."""
    scale = (tower["image_size"] // tower["patch_size"]) ** 2 / LLAVA_IMAGE
    system = max(1, round(LLAVA_SYSTEM * scale) - 3)  # beside BOS, the first USER: and the space behind it
    return Shape(llm, tower, "vicuna_v1", 2 + system, 3, LLAVA_TEXT * scale, system, 8, 16, records)


def _llm(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, tied: bool = False) -> dict[str, int]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {**dict(zip(names, (vocabulary, hidden, inner, layers, heads))), "tie_word_embeddings": tied}


def _tower(size: int, patch: int, hidden: int, layers: int, heads: int) -> dict[str, int]:
    names = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (size, patch, hidden, 4 * hidden, layers, heads)))


SHAPES = {
    "30m": _shape(_llm(32_000, 384, 1024, 8, 6, tied=True), _tower(64, 8, 256, 4, 4), 192),
    # hidden : inner as 4096 : 11008; vocabulary and tower chosen for the shares of FLOPs they have at 7B.
    "proportioned": _shape(_llm(512, 256, 688, 8, 8), _tower(96, 8, 80, 4, 2), 128),
    "demo": Shape({}, _tower(64, 16, 128, 5, 4), "tokenizer", 0, 12, 40, 0, 16, 64, 512),
}
NOTES = {
    "30m": "a 32,000-entry vocabulary, tied: the LM head's share of FLOPs is far above that at 7B",
    "proportioned": "the proportions of LLaVA-1.5 7B",
    "demo": "the demo's backbones, three layers: Python's share of the time is large",
}


def make_model(shape: Shape, folder: Path) -> PreTrainedTokenizerBase:
    """Write a stock Llava folder with tokenizer and image processor; returns the tokenizer."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(shape)
    image, pad = tokenizer.convert_tokens_to_ids("<image>"), tokenizer.pad_token_id
    if shape.llm:
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad}
        text = LlamaConfig(**shape.llm, **ends, max_position_embeddings=4096)
        vision = CLIPVisionConfig(**shape.tower)
    else:
        llm, tower = _demo("llm", LlamaForCausalLM), _demo("vision", CLIPVisionModel)
        text, vision = llm.config, tower.config
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image,
        image_seq_length=shape.image_tokens,
        tie_word_embeddings=text.tie_word_embeddings,
        pad_token_id=pad,
    )
    model = LlavaForConditionalGeneration(config).float()
    if not shape.llm:
        model.model.vision_tower, model.model.language_model, model.lm_head = tower, llm.model, llm.lm_head
    model.config.dtype = model.config.text_config.dtype = model.config.vision_config.dtype = torch.float32
    model.save_pretrained(folder)
    _processor(shape, tokenizer).save_pretrained(folder)
    return tokenizer


def _demo(part: str, kind: Any) -> Any:
    return kind.from_pretrained(BACKBONES / part, dtype=torch.float32)


def _tokenizer(shape: Shape) -> PreTrainedTokenizerBase:
    """One token a word, so that lengths can be aimed at; the demo's own for the demo."""
    if not shape.llm:
        return PreTrainedTokenizerFast.from_pretrained(BACKBONES / "llm")
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    made = map("".join, product(syllables, repeat=3))
    spoken = ["", "USER:", "ASSISTANT:", *made]
    words = [*SPECIAL, *(SPACE + word for word in islice(spoken, shape.llm["vocab_size"] - len(SPECIAL)))]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace("\n", " ")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    unknown, bos, eos, pad, image = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unknown,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=[image],
        clean_up_tokenization_spaces=False,
    )


def words_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words that are one token each after a space."""
    bare = (token.lstrip(f"{SPACE}Ġ") for token in sorted(tokenizer.get_vocab()))
    words = [word for word in bare if word.isalpha() and word.islower() and len(word) > 2]
    return [word for word, ids in zip(words, tokenizer([f" {word}" for word in words])["input_ids"]) if len(ids) == 1]


def _processor(shape: Shape, tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    size = shape.tower["image_size"]
    images = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    template = tokenizer.chat_template or "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=shape.tower["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def proportions(shape: Shape, folder: Path) -> dict[str, float | int | bool]:
    """Weights of a model, and what LM head, tower and attention take of the forward FLOPs of a mean instruction.

    The head at every position, as stock models have it; the tower up to the feature layer. At LLaVA-1.5 7B: the head
    2 % of a token's products with weights, the tower 3.4 % of a sample.
    """
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(folder))
    model.tie_weights()
    costs, length = costs_of(model), shape.image_tokens + shape.text
    attention = costs.pair * length * (length + 1) / 2
    seen = costs.image.forward + costs.connector.forward
    total = seen + attention + length * (costs.token.forward + costs.head)
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "tied": bool(model.config.tie_word_embeddings),
        "image_tokens": shape.image_tokens,
        "text_tokens": round(shape.text, 1),
        "head_share_of_token": round(costs.head / (costs.head + costs.token.forward), 4),
        "tower_share_of_sample": round(costs.image.forward / total, 4),
        "attention_share_of_sample": round(attention / total, 4),
    }
