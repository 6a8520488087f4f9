"""Micro-batch -> tensors, and the loader that brings them in the order of the plan.

Shapes: B rows, T tokens, S supervised tokens, I images, 3 x H x W pixels; see `collate` for what a row is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from llava_train.data.collate import Collated, pack, pad
from llava_train.data.micro_batches import Cut, MicroBatch, deal
from llava_train.data.pictures.media import Media, open_picture
from llava_train.data.pictures.processors import AspectRatio
from llava_train.data.pictures.shapes import Picture, Shape, Shown, shown_in
from llava_train.data.plan import Plan
from llava_train.data.preparing.prepared import PreparedSet, Row
from llava_train.data.sample import ImageRef
from llava_train.errors import RecordError

COUNTS = ("samples", "tokens", "supervised_tokens", "positions")
"""What is counted of a batch: the first three without the weightless filling of an uneven step, `positions` all that
the language model computes (padding counts, a shared beginning once)."""
Gives = Literal["pixel_values", "features"]
"""What a batch holds of its pictures."""
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs."""

    input_ids: torch.Tensor
    """(B, T)"""
    attention_mask: torch.Tensor | None
    """(B, T), 1 where a token stands; None where all do (packed)"""
    position_ids: torch.Tensor
    """(B, T)"""
    lengths: tuple[int, ...]
    """Tokens of each stretch of a packed row"""
    parents: tuple[int, ...]
    """Number of the stretch that each one sees besides itself, -1: none"""
    predictors: torch.Tensor
    """(S,), index into the flattened (B, T) of what predicts each supervised token"""
    targets: torch.Tensor
    """(S,), the supervised tokens"""
    weights: torch.Tensor
    """(S,), their weights in the step's loss"""
    pixel_values: torch.Tensor | None
    """Pieces of the pictures in reading order, (pieces, ...): (I, 3, H, W) where a picture is one; None for text only,
    or where `features` take their place"""
    features: torch.Tensor | None
    """(I, P, V) bf16 in reading order, what the connector reads, where they were made before"""
    facts: dict[str, torch.Tensor]
    """What else the model must know of each picture, (I, ...) by name; see `llava_train.data.pictures.shapes`. They
    stay on the CPU: sizes decide the shapes of tensors"""
    ids: tuple[str, ...]
    """id and place of each sample, for messages"""
    counts: dict[str, int]
    """See `COUNTS`"""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by DataLoader)."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]


class PictureReader(Protocol):
    """What brings the pictures of a row."""

    gives: Gives

    def pictures(self, sample: int, row: Row, shared: int) -> list[Picture]:
        """Those of a sample of the set without the first `shared`, which stand before it; RecordError names it."""


class ImageReader:
    """Pictures in a model's shape; small ones that come again are kept, up to 256 MB."""

    budget = 256 * 2**20
    gives: Gives = "pixel_values"

    def __init__(self, shape: Shape) -> None:
        self._shapes: dict[str | None, Shape] = {None: shape}
        self._kept: dict[tuple[ImageRef, Media, Shown, str | None], Picture] = {}
        self._bytes = 0

    def read(
        self, images: Sequence[ImageRef], media: Media, aspect_ratio: AspectRatio | None = None, first: int = 0
    ) -> list[Picture]:
        """The pictures of a conversation from `first` on, brought to shape by `aspect_ratio` or as the model has it."""
        shown = shown_in(images, [0] * 2 * len(images))
        return [self._read(ref, media, each, aspect_ratio) for ref, each in list(zip(images, shown))[first:]]

    def _read(self, ref: ImageRef, media: Media, shown: Shown, aspect_ratio: AspectRatio | None) -> Picture:
        key = (ref, media, shown, aspect_ratio)
        if key not in self._kept:
            image = open_picture(ref, media)
            seen = replace(shown, width=image.width, height=image.height)
            picture = self._shape(aspect_ratio).picture(image, seen)
            if self._bytes + picture.pixels.nbytes > self.budget:
                return picture
            self._kept[key] = picture
            self._bytes += picture.pixels.nbytes
        return self._kept[key]

    def pictures(self, sample: int, row: Row, shared: int) -> list[Picture]:
        """See `PictureReader`: a picture that cannot be read any more is told of the row's record."""
        try:
            pictures = self.read(row.images, row.media, row.aspect_ratio, shared)
            if any(picture.tokens != tokens for picture, tokens in zip(pictures, row.image_tokens[shared:])):
                message = "a picture has another size than when the set was prepared; run prepare --rebuild"
                raise RecordError(message, "image_unreadable")
            return pictures
        except RecordError as error:
            raise error.of(f"{row.place} (id {row.id})") from error

    def _shape(self, aspect_ratio: AspectRatio | None) -> Shape:
        if aspect_ratio not in self._shapes:
            self._shapes[aspect_ratio] = self._shapes[None].reshaped(aspect_ratio)  # type: ignore[arg-type]
        return self._shapes[aspect_ratio]


def batch_of(
    collated: Collated,
    pictures: Sequence[Picture],
    ids: Sequence[str],
    counts: dict[str, int],
    gives: Gives = "pixel_values",
) -> Batch:
    """Arrays as tensors."""
    mask = collated.attention_mask
    pieces = torch.cat([picture.pixels for picture in pictures]) if pictures else None
    names = pictures[0].facts if pictures else ()
    return Batch(
        torch.from_numpy(collated.input_ids),
        None if mask is None else torch.from_numpy(mask),
        torch.from_numpy(collated.position_ids),
        tuple(collated.lengths.tolist()),
        tuple(collated.parents.tolist()),
        torch.from_numpy(collated.predictors),
        torch.from_numpy(collated.targets),
        torch.from_numpy(collated.weights),
        pieces if gives == "pixel_values" else None,
        pieces if gives == "features" else None,
        {name: torch.stack([picture.facts[name] for picture in pictures]) for name in names},
        tuple(ids),
        counts,
    )


class BatchReader:
    """Micro-batches of a prepared set, pictures included."""

    def __init__(self, prepared: PreparedSet, reader: PictureReader, pad_id: int, cut: Cut) -> None:
        self.prepared, self.reader, self.pad_id, self.cut = prepared, reader, pad_id, cut

    def __call__(self, micro_batch: MicroBatch) -> Batch:
        """Tensors of one micro-batch; RecordError names the sample whose picture cannot be read any more."""
        rows = [self.prepared.row(sample) for sample in micro_batch.samples]
        if self.cut.budget is None:
            groups = [(0, 0, [row]) for row in rows]
            collated = pad(rows, micro_batch.weights, self.pad_id)
        else:
            groups = self._groups(rows, micro_batch.samples)
            collated = pack([(prefix, members) for prefix, _, members in groups], micro_batch.weights)
        skipped = [shared if number else 0 for _, shared, members in groups for number in range(len(members))]
        pictures = [
            picture
            for sample, row, shared in zip(micro_batch.samples, rows, skipped)
            for picture in self.reader.pictures(sample, row, shared)
        ]
        counts = _counts(rows, micro_batch.weights, collated)
        return batch_of(collated, pictures, [f"{row.id} ({row.place})" for row in rows], counts, self.reader.gives)

    def _groups(self, rows: list[Row], samples: tuple[int, ...]) -> list[tuple[int, int, list[Row]]]:
        """Neighbours that begin alike, with the number of tokens and of pictures they share."""
        keys = self.prepared.sizes.prefix_keys[list(samples)].tolist()
        names = [(key, 0 if key and self.cut.share else place) for place, key in enumerate(keys)]
        groups = []
        for _, members in groupby(zip(names, rows), lambda pair: pair[0]):
            own = [row for _, row in members]
            groups.append((own[0].prefix, own[0].prefix_images, own) if len(own) > 1 else (0, 0, own))
        return groups


def _counts(rows: Sequence[Row], weights: Sequence[float], collated: Collated) -> dict[str, int]:
    real = [row for row, weight in zip(rows, weights) if weight > 0]
    tokens = sum(len(row.input_ids) for row in real)
    return dict(zip(COUNTS, (len(real), tokens, int((collated.weights > 0).sum()), collated.input_ids.size)))


class StepDataset(Dataset[list[Batch] | RecordError]):
    """Item n is step n: this rank's micro-batches. A pure function of the plan, so any step can come next.

    A picture that cannot be read any more is the item: a worker process could only raise it with its traceback.
    """

    def __init__(self, reader: BatchReader, plan: Plan, rank: int, world_size: int) -> None:
        self.reader, self.plan = reader, plan
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.plan.total_steps

    def __getitem__(self, step: int) -> list[Batch] | RecordError:
        sizes, cut = self.reader.prepared.sizes, self.reader.cut
        dealt = deal(self.plan.step(step), sizes, self.world_size, cut)
        try:
            return [self.reader(micro_batch) for micro_batch in dealt[self.rank]]
        except RecordError as error:
            return error


def load_steps(
    dataset: Dataset[_Item | RecordError], first: int, num_workers: int, at_start: Callable[[int], None] | None = None
) -> Generator[_Item, None, None]:
    """Items (steps) `first`, `first + 1`, ... decoded ahead by `num_workers` processes (0: in this one).

    `at_start` is called in each of them with its number; `close` ends them. Raises RecordError naming the sample whose
    picture cannot be read any more.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first, len(dataset)),  # type: ignore[arg-type]
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=at_start,
    )
    for item in loader:
        if isinstance(item, RecordError):
            raise item
        yield item
