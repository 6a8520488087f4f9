"""Boxes that an answer names, and a picture with them drawn in.

How models write a box:

* LLaVA-1.5 (arXiv 2310.03744): `[0.12, 0.30, 0.55, 0.80]`, left, top, right, bottom as fractions of the square that the
  picture is padded to (github.com/haotian-liu/LLaVA, issue 606).
* Shikra (arXiv 2306.15195): `a dog[0.120,0.300,0.550,0.800]`, several of one thing `[...;...]`, fractions too, of the
  padded square where the picture is padded (github.com/shikras/shikra, mllm/dataset/process_function).
* Qwen-VL (arXiv 2308.12966): `<ref>a dog</ref><box>(120,300),(550,800)</box>` in thousandths of the picture.
* Qwen2-VL (arXiv 2409.12191): `<|object_ref_start|>a dog<|object_ref_end|><|box_start|>(120,300),(550,800)<|box_end|>`,
  thousandths. The marks are special tokens, which decoding leaves out: `a dog(120,300),(550,800)` remains.
* Qwen2.5-VL (arXiv 2502.13923): JSON, `{"bbox_2d": [120, 300, 550, 800], "label": "a dog"}`, in pixels of the picture
  as resized for the model (github.com/QwenLM/Qwen3-VL, issues 676 and 721). Qwen3-VL writes the same in thousandths
  (issue 1486).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

THOUSANDTHS = (1000, 1000)
_NUMBER = r"\s*\d{1,5}(?:\.\d{1,9})?\s*"
_FOUR = rf"{_NUMBER}(?:,{_NUMBER}){{3}}"
_POINT = rf"\({_NUMBER},{_NUMBER}\)"
_OBJECT = re.compile(r"\{[^{}]*\}")
_FRACTIONS = re.compile(rf"\[({_FOUR}(?:;{_FOUR})*)\]")
_POINTS = re.compile(rf"{_POINT}(?:\s*,\s*{_POINT})*")
_NAMED = re.compile(r"(?:<ref>|<\|object_ref_start\|>)(.{0,200}?)(?:</ref>|<\|object_ref_end\|>)", re.DOTALL)
_OPENED = re.compile(r"(?:<box>|<\|box_start\|>)\s*$")
_MARK = re.compile(r"</?(?:ref|box)>|<\|(?:object_ref|box)_(?:start|end)\|>")
_WORDS = 4
"""Where nothing marks the beginning of a label, it is at most so many words."""

# Okabe and Ito's colours, told apart by the colour-blind too.
_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
_DARK, _LIGHT = "#111111", "#ffffff"
_LEAST_SIDE = 512
_LONGEST_LABEL = 40


@dataclass(frozen=True)
class Box:
    """A named part of a picture: left, top, right, bottom as fractions of its width and height."""

    label: str
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Frame:
    """What the numbers of an answer refer to.

    Attributes:
        width, height: of the picture in pixels.
        padded: fractions are of the square around the picture, which lies in its middle.
        scale: what whole numbers count: the width and the height of the picture in them.
        marked: pairs of points are boxes only where marks say so; else also `a dog(120,300),(550,800)`.
    """

    width: int
    height: int
    padded: bool = False
    scale: tuple[int, int] = THOUSANDTHS
    marked: bool = True


def boxes_in(text: str, frame: Frame) -> list[Box]:
    """The boxes of an answer in the order of the text, mapped to the picture.

    What is no box (inverted, empty, beyond the picture, malformed) is left out.
    """
    found = [*_json_boxes(text, frame), *_pairs(text, frame), *_fractions(text, frame)]
    return [box for _, box in sorted(found, key=lambda each: each[0]) if box is not None]


Found = tuple[int, Box | None]
"""Where in the text a box was found, and the box if it is one."""


def _json_boxes(text: str, frame: Frame) -> Iterator[Found]:
    for match in _OBJECT.finditer(text):
        try:
            value = json.loads(match.group())
        except ValueError:
            continue
        corners = value.get("bbox_2d")
        if isinstance(corners, list) and len(corners) == 4 and all(type(each) in (int, float) for each in corners):
            yield match.start(), _counted(_short(str(value.get("label", ""))), corners, frame)


def _pairs(text: str, frame: Frame) -> Iterator[Found]:
    label, end = "", 0
    for match in _POINTS.finditer(text):
        before, end = text[end : match.start()], match.end()
        named = _NAMED.findall(before)
        if named:
            label = _short(named[-1])
        elif _MARK.sub("", before).strip(" ,;\n"):
            label = _last_words(_MARK.sub("", before))
        corners = _numbers(match.group())
        if len(corners) == 4 and (_OPENED.search(before) or not frame.marked):
            yield match.start(), _counted(label, corners, frame)


def _fractions(text: str, frame: Frame) -> Iterator[Found]:
    end = 0
    for match in _FRACTIONS.finditer(text):
        before, end = text[end : match.start()], match.end()
        # Whole numbers are a list of something else, or the pixels of a JSON.
        if "." not in match.group(1) or before.rstrip(" ").endswith('":'):
            continue
        for each in match.group(1).split(";"):
            yield match.start(), _fraction(_last_words(before), _numbers(each), frame)


def _numbers(text: str) -> list[float]:
    return [float(each) for each in re.findall(r"[\d.]+", text)]


def _last_words(before: str) -> str:
    """The words that lead to a box: of its own sentence, and few."""
    return _short(" ".join(re.split(r"[.,:;!?\n\[\](){}]", before)[-1].split()[-_WORDS:]))


def _short(label: str) -> str:
    line = " ".join(label.split())
    return line if len(line) <= _LONGEST_LABEL else line[: _LONGEST_LABEL - 1] + "…"


def _counted(label: str, corners: Sequence[float], frame: Frame) -> Box | None:
    width, height = frame.scale
    return _valid(label, [corners[0] / width, corners[1] / height, corners[2] / width, corners[3] / height])


def _fraction(label: str, corners: Sequence[float], frame: Frame) -> Box | None:
    box = _valid(label, corners)
    if box is None or not frame.padded:
        return box
    side = max(frame.width, frame.height)
    across, down = side / frame.width, side / frame.height
    left, top = (across - 1) / 2, (down - 1) / 2
    inside = [corners[0] * across - left, corners[1] * down - top, corners[2] * across - left, corners[3] * down - top]
    return _valid(label, [min(max(each, 0.0), 1.0) for each in inside])  # the border belongs to no picture


def _valid(label: str, corners: Iterable[float]) -> Box | None:
    x1, y1, x2, y2 = corners
    return Box(label, x1, y1, x2, y2) if 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 else None


def draw(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of an RGB picture with the boxes and their labels; a small one is enlarged, so that labels can be read."""
    longer = max(image.size)
    if longer < _LEAST_SIDE:
        size = tuple(max(1, round(each * _LEAST_SIDE / longer)) for each in image.size)
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    drawn = image.convert("RGB") if image.mode != "RGB" else image.copy()
    pen = ImageDraw.Draw(drawn)
    line = max(2, max(drawn.size) // 200)
    font = ImageFont.load_default(size=max(14, max(drawn.size) // 32))
    for number, box in enumerate(boxes):
        colour = _COLOURS[number % len(_COLOURS)]
        corners = _pixels(box, drawn.size)
        # A dark and a light edge around the colour: one of the three stands out from whatever is below.
        pen.rectangle(_grown(corners, line), outline=_DARK, width=3 * line)
        pen.rectangle(corners, outline=_LIGHT, width=line + 2)
        pen.rectangle(corners, outline=colour, width=line)
        if box.label:
            _write(pen, box.label, corners, colour, font, drawn.size)
    return drawn


def _pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The outermost pixels of a box, both ends within it."""
    width, height = size
    x1, y1 = min(int(box.x1 * width), width - 1), min(int(box.y1 * height), height - 1)
    return x1, y1, max(x1, round(box.x2 * width) - 1), max(y1, round(box.y2 * height) - 1)


def _grown(corners: tuple[int, int, int, int], by: int) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = corners
    return x1 - by, y1 - by, x2 + by, y2 + by


def _write(
    pen: ImageDraw.ImageDraw,
    label: str,
    corners: tuple[int, int, int, int],
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
) -> None:
    """A label on its own ground: above the box, or inside it where there is no room above."""
    left, top, right, bottom = pen.textbbox((0, 0), label, font=font)
    width, height = int(right - left) + 8, int(bottom - top) + 8
    x = max(0, min(corners[0], size[0] - width))
    y = corners[1] - height if corners[1] >= height else corners[1]
    pen.rectangle((x, y, x + width, y + height), fill=_DARK, outline=colour, width=2)
    pen.text((x + 4 - left, y + 4 - top), label, fill=_LIGHT, font=font)
