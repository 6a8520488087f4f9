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
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tiny_backbones.language import make_language_model, train_tokenizer
from tiny_backbones.plan import Plan, split_pictures
from tiny_backbones.vision import make_vision_tower

DEFAULT_OUT = Path(__file__).resolve().parents[1] / "llava_train" / "demo" / "backbones"

CARD = """\
# Tiny backbones

Two tiny models for the demo and for tests of `llava-train`, each trained from scratch on the **train split alone** of
the package `easy-vqa` 1.0 (MIT): pictures of one coloured shape, and questions about them.

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
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the shipped files took %(default)s")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("vision", "llm"),
        default=("vision", "llm"),
        help="make one of the two (the model card is written only when both are made)",
    )
    return parser.parse_args()


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
