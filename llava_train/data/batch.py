"""Micro-batch -> tensors, and the loader that brings them in the order of the plan.

Shapes: B rows, T tokens, S supervised tokens, I images, 3 x H x W pixels; see `collate` for what a row is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from llava_train.data.collate import Collated, pack, pad
from llava_train.data.micro_batches import Cut, MicroBatch, deal
from llava_train.data.pictures.images import AspectRatio, pixel_values, with_aspect_ratio
from llava_train.data.pictures.media import Media, open_picture
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
    """(I, 3, H, W) in reading order; None for text only, or where `features` take their place"""
    features: torch.Tensor | None
    """(I, P, V) bf16 in reading order, what the connector reads, where they were made before"""
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
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})  # type: ignore[arg-type]


class PictureReader(Protocol):
    """What brings the pictures of a row."""

    gives: Gives

    def pictures(self, sample: int, row: Row, shared: int) -> list[torch.Tensor]:
        """Those of a sample of the set without the first `shared`, which stand before it; RecordError names it."""


class ImageReader:
    """Pixels of pictures; small ones that come again are kept, up to 256 MB."""

    budget = 256 * 2**20
    gives: Gives = "pixel_values"

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._shaped: dict[str | None, Any] = {None: processor}
        self._kept: dict[tuple[ImageRef, Media, str | None], torch.Tensor] = {}
        self._bytes = 0

    def read(self, ref: ImageRef, media: Media, aspect_ratio: AspectRatio | None = None) -> torch.Tensor:
        """(3, H, W) float32, brought to shape by `aspect_ratio` or else as the processor does."""
        key = (ref, media, aspect_ratio)
        if key not in self._kept:
            pixels = pixel_values([open_picture(ref, media)], self._processor(aspect_ratio))[0]
            if self._bytes + pixels.nbytes > self.budget:
                return pixels
            self._kept[key] = pixels
            self._bytes += pixels.nbytes
        return self._kept[key]

    def pictures(self, sample: int, row: Row, shared: int) -> list[torch.Tensor]:
        """See `PictureReader`: a picture that cannot be read any more is told of the row's record."""
        try:
            return [self.read(ref, row.media, row.aspect_ratio) for ref in row.images[shared:]]
        except RecordError as error:
            raise error.of(f"{row.place} (id {row.id})") from error

    def _processor(self, aspect_ratio: AspectRatio | None) -> Any:
        if aspect_ratio is not None and aspect_ratio not in self._shaped:
            size = int(self.processor.crop_size["height"])
            self._shaped[aspect_ratio] = with_aspect_ratio(self.processor, aspect_ratio, size)
        return self._shaped[aspect_ratio]


def batch_of(
    collated: Collated,
    pictures: Sequence[torch.Tensor],
    ids: Sequence[str],
    counts: dict[str, int],
    gives: Gives = "pixel_values",
) -> Batch:
    """Arrays as tensors."""
    mask = collated.attention_mask
    stacked = torch.stack(list(pictures)) if pictures else None
    return Batch(
        torch.from_numpy(collated.input_ids),
        None if mask is None else torch.from_numpy(mask),
        torch.from_numpy(collated.position_ids),
        tuple(collated.lengths.tolist()),
        tuple(collated.parents.tolist()),
        torch.from_numpy(collated.predictors),
        torch.from_numpy(collated.targets),
        torch.from_numpy(collated.weights),
        stacked if gives == "pixel_values" else None,
        stacked if gives == "features" else None,
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
