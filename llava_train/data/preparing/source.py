"""A source: files of records of one format, and how they are treated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llava_train.data.encode import Encoder
from llava_train.data.pictures.media import Media
from llava_train.data.pictures.processors import AspectRatio


@dataclass(frozen=True)
class Source:
    """Files of records of one format, and how they are treated.

    Attributes:
        name: what reports call it.
        files: the files, in order.
        format: a row of FORMATS, or "auto".
        encoder: tokenizer and template of this source.
        media: where its pictures are and what they may be.
        verify: how closely pictures are looked at (`llava_train.data.pictures.images.LEVELS`).
        policy: "error": a record that cannot be used ends `prepare`; "skip": it is left out and counted.
        max_skipped: largest share of records that "skip" may leave out.
        duplicates: which doubles are faults: the same "id", the same "content", or none ("allow").
        aspect_ratio: how its pictures are brought to the encoder's shape; None: as the recipe's `model` says.
    """

    name: str
    files: tuple[str, ...]
    encoder: Encoder
    media: Media
    format: str = "auto"
    verify: str = "header"
    policy: Literal["error", "skip"] = "error"
    max_skipped: float = 0.001
    duplicates: Literal["id", "content", "allow"] = "id"
    aspect_ratio: AspectRatio | None = None
