"""Sample -> token ids and labels: the only place where labels are made. Pure.

Each image becomes its N placeholder tokens in the text, then one chat-template call of the tokenizer gives
ids and the mask of what the assistant says. Nothing is split and tokenised again, so ids and labels cannot
disagree:

    Sample "What is it?" -> "A cat."   with vicuna_v1 and 2 tokens an image
    ids     <s> A chat .. USER: <image> <image> \\n What is it ? ASSISTANT: A cat . </s>
    labels  -100 ..                                                         A cat . </s>
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from llava_train.data.formats import IMAGE_MARKER
from llava_train.data.sample import ImageRef, Sample
from llava_train.errors import DataError

IGNORE = -100
"""Label of a position that carries no loss (PyTorch's and the original's value)."""


@dataclass(frozen=True)
class Encoded:
    """Ids and unshifted labels of one sample, equally long; `truncated` tokens were cut from the end."""

    input_ids: list[int]
    labels: list[int]
    truncated: int = 0


@dataclass(frozen=True)
class Encoder:
    """What encoding depends on besides the sample.

    Attributes:
        tokenizer: a fast tokenizer that knows `<image>` as one token.
        template: Jinja text with generation marks.
        image_tokens: placeholders an image.
        max_length: longest sequence in tokens, images included.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    image_tokens: int
    max_length: int
    image_token_id: int = field(init=False)
    control: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Look up `<image>` and the control tokens once."""
        tokens = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        tokens |= set(self.tokenizer.all_special_tokens) | {IMAGE_MARKER}
        pattern = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
        object.__setattr__(self, "control", re.compile(pattern))
        object.__setattr__(self, "image_token_id", self.tokenizer.convert_tokens_to_ids(IMAGE_MARKER))


def messages_of(sample: Sample, image_text: str = IMAGE_MARKER) -> list[dict[str, str]]:
    """The sample as chat messages, each image written as `image_text`."""
    return [
        {
            "role": turn.role,
            "content": "".join(image_text if isinstance(part, ImageRef) else part for part in turn.parts),
        }
        for turn in sample.turns
    ]


def encode(sample: Sample, encoder: Encoder) -> Encoded:
    """Ids and labels of one sample; raises DataError where `encode_many` would return it."""
    (result,) = encode_many([sample], encoder)
    if isinstance(result, DataError):
        raise result
    return result


def encode_many(samples: Sequence[Sample], encoder: Encoder) -> list[Encoded | DataError]:
    """Ids and labels of each sample, or the DataError that says why it cannot be trained on.

    A sample is refused when its text holds a control token, when truncation to `max_length` would cut an
    image, or when no supervised token is left.
    """
    results: list[Encoded | DataError | None] = [_control_fault(sample, encoder) for sample in samples]
    good = [index for index, result in enumerate(results) if result is None]
    if good:
        placeholders = IMAGE_MARKER * encoder.image_tokens
        rendered = _apply_template([messages_of(samples[i], placeholders) for i in good], encoder)
        for index, ids, mask in zip(good, rendered["input_ids"], rendered["assistant_masks"]):
            results[index] = _finish(samples[index], ids, mask, encoder)
    return [result for result in results if result is not None]


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


def _control_fault(sample: Sample, encoder: Encoder) -> DataError | None:
    for turn in sample.turns:
        found = encoder.control.search(turn.text)
        if found:
            return DataError(
                f"{sample.where}: the text of the {turn.role} holds the control token {found.group()!r}; "
                "remove it from the data"
            )
    return None


def _finish(sample: Sample, ids: list[int], mask: list[int], encoder: Encoder) -> Encoded | DataError:
    expected = len(sample.images) * encoder.image_tokens
    found = ids.count(encoder.image_token_id)
    if found not in (expected, 0) or (found == 0 and expected):
        return DataError(f"{sample.where}: the template renders {found} image tokens, expected {expected}")
    kept = ids[: encoder.max_length]
    if kept.count(encoder.image_token_id) != found:
        return DataError(
            f"{sample.where}: max_length {encoder.max_length} would cut an image ({len(ids)} tokens in all); "
            "raise data.max_length"
        )
    # The first position predicts nothing, so a label there would never count.
    labels = [token if said else IGNORE for token, said in zip(kept, mask)]
    if all(label == IGNORE for label in labels[1:]):
        return DataError(
            f"{sample.where}: no supervised token is left within max_length {encoder.max_length} "
            f"({len(ids)} tokens in all)"
        )
    return Encoded(kept, labels, len(ids) - len(kept))
