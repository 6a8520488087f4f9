"""The tokenizer and the language model, trained on text that the train split gives."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llava_train.demo import easy_vqa
from llava_train.demo.easy_vqa import CAPTION_FORMS, CAPTION_PROMPTS, Scene
from tiny_backbones.plan import SPECIAL_TOKENS, LanguageSizes, Picture, Plan, fit

FILLER = ("a", "the", "an", "image", "shape", "light", "background", "there", "is", "in", "on", "of", "with", "shows")
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
