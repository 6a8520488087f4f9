"""Sample -> token ids and labels: the only place where labels are made. Pure.

One chat-template call of the tokenizer gives ids and the mask of what the assistant says. Nothing is split and
tokenised again, so ids and labels cannot disagree. A picture is one `<image>` here; `expand` repeats it as often
as the picture has tokens, when a batch is made:

    Sample "What is it?" -> "A cat."   with vicuna_v1 and 2 tokens an image
    folded    <s> A chat .. USER: <image> \\n What is it ? ASSISTANT: A cat . </s>
    ids       <s> A chat .. USER: <image> <image> \\n What is it ? ASSISTANT: A cat . </s>
    labels    -100 ..                                                         A cat . </s>

Expanding ids equals expanding the text: a special token is cut out of the text before anything is merged, and
between two that touch there is no text (tested for every template).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llava_train.data.pictures.shapes import Shape, shown_in
from llava_train.data.sample import IMAGE_MARKER, ImageRef, Sample, Turn
from llava_train.data.templates.marking import PROBES, rendering
from llava_train.errors import DataError, RecordError
from llava_train.files import sha256_json

IGNORE = -100
"""Label of a position that carries no loss (PyTorch's and the original's value)."""


@dataclass(frozen=True)
class Encoded:
    """One sample, folded.

    Attributes:
        input_ids: one `<image>` a picture, (folded tokens,).
        spans: start and end of each supervised stretch of `input_ids`, half open, (spans, 2).
        image_tokens: tokens of each picture.
        length: tokens when expanded.
        truncated: tokens that were cut from the end.
    """

    input_ids: np.ndarray
    spans: np.ndarray
    image_tokens: tuple[int, ...]
    length: int
    truncated: int = 0

    @property
    def supervised(self) -> int:
        """Positions that carry loss. The first position predicts nothing, so a label there never counts."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum() - (self.spans[:1, 0] == 0).sum())


def expand(
    input_ids: np.ndarray, spans: np.ndarray, image_tokens: Sequence[int], image_token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and unshifted labels of a folded sample, both (tokens,) int64; -100 where unsupervised."""
    widths = _widths(input_ids, image_tokens, image_token_id)
    said = np.zeros(len(input_ids), dtype=bool)
    for start, end in spans.reshape(-1, 2):
        said[start:end] = True
    ids = np.repeat(input_ids, widths).astype(np.int64)
    return ids, np.where(np.repeat(said, widths), ids, IGNORE)


def _widths(input_ids: np.ndarray, image_tokens: Sequence[int], image_token_id: int) -> np.ndarray:
    widths = np.ones(len(input_ids), dtype=np.int64)
    widths[input_ids == image_token_id] = image_tokens
    return widths


@dataclass(frozen=True)
class Encoder:
    """What encoding depends on besides the sample.

    Attributes:
        tokenizer: a fast tokenizer that knows `<image>` as one token.
        template: Jinja text with generation marks.
        image_tokens: placeholders an image, or the shape that knows them of each.
        max_length: longest sequence in tokens, images included.
        marker: what stands for a picture in the text, one image token in it.
        image_token: that one.
        line_end: what stands behind it for the end of a line.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    image_tokens: int | Shape
    max_length: int
    marker: str = IMAGE_MARKER
    image_token: str = IMAGE_MARKER
    line_end: str = "\n"
    image_token_id: int = field(init=False)
    control: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Look up `<image>` and the control tokens once."""
        object.__setattr__(self, "control", control_pattern(self.tokenizer, self.template))
        object.__setattr__(self, "image_token_id", self.tokenizer.convert_tokens_to_ids(self.image_token))

    @property
    def sized(self) -> bool:
        """Whether the tokens of a picture depend on its size."""
        return not isinstance(self.image_tokens, int) and self.image_tokens.sized

    @property
    def shaping(self) -> Any:
        """All that the tokens of a picture depend on, as JSON."""
        return self.image_tokens if isinstance(self.image_tokens, int) else self.image_tokens.inputs

    def tokens_of(self, images: Sequence[ImageRef], sizes: Sequence[int]) -> tuple[int, ...]:
        """Tokens of each picture of a conversation; `sizes` are width and height in turn (any, unless `sized`)."""
        if isinstance(self.image_tokens, int):
            return (self.image_tokens,) * len(images)
        return tuple(map(self.image_tokens.tokens, shown_in(images, sizes)))

    @cached_property
    def tokenizer_digest(self) -> str:
        """Hash of the tokenizer, which takes a moment for a large vocabulary."""
        return sha256_json([self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.special_tokens_map])


def control_pattern(tokenizer: PreTrainedTokenizerBase, template: str) -> re.Pattern[str]:
    """What no text may hold: special tokens, and added ones that the template writes, whatever they are called.

    Added tokens that are neither (`<think>`) are content.
    """
    added = tokenizer.added_tokens_decoder.values()
    written = "".join(_rendered(template, tokenizer))
    # Some tokenizers (Gemma's) keep line breaks and runs of spaces as added tokens: those are text.
    names = [str(token) for token in added if token.special or (str(token).strip() and str(token) in written)]
    tokens = {*names, *tokenizer.all_special_tokens, IMAGE_MARKER}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _rendered(template: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for probe in PROBES:
        with suppress(DataError):  # some templates refuse a system text
            yield rendering(template, tokenizer, probe)[0]


def messages_of(sample: Sample, marker: str = IMAGE_MARKER, line_end: str = "\n") -> list[dict[str, str]]:
    """The sample as chat messages; see `with_markers`."""
    return [{"role": turn.role, "content": with_markers(_written(turn), marker, line_end)} for turn in sample.turns]


def _written(turn: Turn) -> str:
    return "".join(IMAGE_MARKER if isinstance(part, ImageRef) else part for part in turn.parts)


def with_markers(text: str, marker: str, line_end: str) -> str:
    """A text with `marker` for every `<image>`, and `line_end` for the end of a line right behind one.

    >>> with_markers("<image>\\nWhat? <image>", "<|image|>", "")
    '<|image|>What? <|image|>'
    """
    return text.replace(f"{IMAGE_MARKER}\n", marker + line_end).replace(IMAGE_MARKER, marker)


def encode(sample: Sample, encoder: Encoder, sizes: Sequence[int] = ()) -> Encoded:
    """Ids and labels of one sample; raises RecordError where `encode_many` would return it."""
    (result,) = encode_many([sample], encoder, [sizes])
    if isinstance(result, RecordError):
        raise result
    return result


def encode_many(
    samples: Sequence[Sample], encoder: Encoder, sizes: Sequence[Sequence[int]] | None = None
) -> list[Encoded | RecordError]:
    """Ids and labels of each sample, or the RecordError that says why it cannot be trained on.

    `sizes` are width and height of each one's pictures in turn, where the encoder's tokens depend on them.

    A sample is refused when its text holds a control token, when truncation to `max_length` would cut an
    image, or when no supervised token is left.
    """
    results: list[Encoded | RecordError | None] = [_text_fault(sample, encoder) for sample in samples]
    good = [index for index, result in enumerate(results) if result is None]
    if good:
        rendered = _apply_template([messages_of(samples[i], encoder.marker, encoder.line_end) for i in good], encoder)
        for index, ids, mask in zip(good, rendered["input_ids"], rendered["assistant_masks"]):
            own = () if sizes is None else sizes[index]
            results[index] = _finish(samples[index], np.asarray(ids, np.int32), np.asarray(mask, np.int8), encoder, own)
    return [result for result in results if result is not None]


def with_rejected(sample: Sample) -> Sample:
    """The same conversation with the answer that was not chosen."""
    assert sample.rejected is not None
    return replace(sample, turns=(*sample.turns[:-1], Turn("assistant", (sample.rejected,))), rejected=None)


def _apply_template(conversations: list[list[dict[str, str]]], encoder: Encoder) -> Any:
    return encoder.tokenizer.apply_chat_template(
        conversations,
        chat_template=encoder.template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        padding=False,
        truncation=False,
    )


def _text_fault(sample: Sample, encoder: Encoder) -> RecordError | None:
    for turn in sample.turns:
        found = encoder.control.search(turn.text)
        if found:
            return sample.fault(
                f"the text of the {turn.role} holds the control token {found.group()!r}; remove it from the data",
                "control_token",
            )
        if not turn.text.isascii() and _half_characters(turn.text):
            return sample.fault(f"the text of the {turn.role} is not valid Unicode (half of a character)", "not_utf8")
    return None


def _half_characters(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _finish(
    sample: Sample, ids: np.ndarray, mask: np.ndarray, encoder: Encoder, sizes: Sequence[int]
) -> Encoded | RecordError:
    expected = len(sample.images)
    found = int((ids == encoder.image_token_id).sum())
    if found != expected:
        return sample.fault(f"the template renders {found} images, expected {expected}", "marker_count")
    try:
        image_tokens = encoder.tokens_of(sample.images, sizes)
    except RecordError as error:
        return error.of(sample.where)
    # ends[n] is the expanded length of the first n folded tokens.
    ends = np.concatenate([[0], np.cumsum(_widths(ids, image_tokens, encoder.image_token_id))])
    length, kept = int(ends[-1]), int(np.searchsorted(ends, encoder.max_length, side="right")) - 1
    ids, mask = ids[:kept], mask[:kept]
    if (ids == encoder.image_token_id).sum() != found:
        return sample.fault(
            f"max_length {encoder.max_length} would cut an image ({length} tokens in all); raise data.max_length",
            "image_cut",
        )
    borders = np.flatnonzero(np.diff(mask, prepend=0, append=0)).astype(np.int32)
    encoded = Encoded(ids, borders.reshape(-1, 2), image_tokens, int(ends[kept]), length - int(ends[kept]))
    if encoded.supervised < 1:
        return sample.fault(
            f"no supervised token is left within max_length {encoder.max_length} ({length} tokens in all)",
            "nothing_supervised",
        )
    return encoded
