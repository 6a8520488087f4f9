"""Sets of records in LLaVA JSON, with small pictures; token lengths follow a target, whatever the seed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from PIL import Image

from throughput.models import LLAVA_CAPTION, LLAVA_IMAGE, LLAVA_LONGEST, Shape

SIGMA = 0.8
"""Of the lognormal text lengths: an assumption. The authors published no distribution; mean 225 is assumed, too."""
TEXT_ONLY = 0.06
"""Share of the LLaVA-1.5 mix without a picture: 40,688 of 665,298."""
KINDS = ("captions", "instructions", "instructions_single")
Record = dict[str, Any]


def lengths(kind: str, count: int, shape: Shape) -> list[float]:
    """Tokens of text in each of `count` samples, at evenly spaced quantiles, so that small sets are alike."""
    normal = [NormalDist().inv_cdf((index + 0.5) / count) for index in range(count)]
    if kind == "captions":
        return [shape.scale * (LLAVA_CAPTION + 10 * z) for z in normal]
    longest = shape.scale * (LLAVA_LONGEST - LLAVA_IMAGE) if shape.llm else 900
    middle = math.log(shape.text) - SIGMA**2 / 2
    return [min(longest, math.exp(middle + SIGMA * z)) for z in normal]


def make_set(folder: Path, kind: str, count: int, shape: Shape, words: Sequence[str], per_image: int) -> list[Record]:
    """Write `records.json` and its pictures; `per_image` instructions are about each picture (1 in other kinds)."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    blind = 0 if kind == "captions" else max(1, round(TEXT_ONLY * count))
    about = per_image if kind == "instructions" else 1
    pictures = [index // about for index in range(count - blind)] + [None] * blind
    records = []
    for index, (tokens, at) in enumerate(zip(rng.permutation(lengths(kind, count, shape)), rng.permutation(count))):
        record: Record = {"id": f"{kind}-{index}"}
        if pictures[at] is not None:
            record["image"] = f"{pictures[at]}.jpg"
        say = _caption if kind == "captions" else _instruction
        record["conversations"] = say(rng, tokens, shape, words)
        if "image" in record:
            first = next(turn for turn in record["conversations"] if turn["from"] == "human")
            first["value"] = "<image>\n" + first["value"]
        records.append(record)
    for number in {number for number in pictures if number is not None}:
        _picture(rng, shape.tower["image_size"]).save(folder / f"{number}.jpg", quality=85)
    (folder / "records.json").write_text(json.dumps(records))
    return records


def _picture(rng: np.random.Generator, size: int) -> Image.Image:
    """Soft colours, a quarter wider than high, so that there is something to pad."""
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize((size * 5 // 4, size), Image.Resampling.BICUBIC)


def _said(rng: np.random.Generator, words: Sequence[str], count: int) -> str:
    return " ".join(words[number] for number in rng.integers(0, len(words), count))


def _caption(rng: np.random.Generator, tokens: float, shape: Shape, words: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"from": "human", "value": _said(rng, words, 3)},
        {"from": "gpt", "value": _said(rng, words, max(2, round(tokens)))},
    ]


def _instruction(rng: np.random.Generator, tokens: float, shape: Shape, words: Sequence[str]) -> list[dict[str, str]]:
    """Up to four rounds; a quarter of the words in the questions."""
    turns = [{"from": "system", "value": " ".join(words[: shape.system])}] if shape.system else []
    left = tokens - shape.opening
    rounds = int(min(4, max(1, left // (shape.round + 20))))
    said = max(2 * rounds, round(left - rounds * shape.round))
    for start, end in pairwise(np.linspace(0, said, rounds + 1).astype(int).tolist()):
        asked = max(1, (end - start) // 4)
        turns += [
            {"from": "human", "value": _said(rng, words, asked)},
            {"from": "gpt", "value": _said(rng, words, max(1, end - start - asked))},
        ]
    return turns


def one_step(records: Sequence[Record], count: int) -> list[Record]:
    """`count` records of every kind there is: one of text alone, the others picture by picture."""
    blind = [record for record in records if "image" not in record][:1]
    seen = sorted((record for record in records if "image" in record), key=lambda record: record["image"])
    return blind + seen[: count - len(blind)]
