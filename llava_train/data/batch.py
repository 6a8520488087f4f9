"""Micro-batch -> tensors, and the loader that brings them in the order of the plan.

Shapes: B samples, T tokens (the longest of the batch), I images, 3 x H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava_train.data.encode import IGNORE
from llava_train.data.pictures.images import AspectRatio, pixel_values, with_aspect_ratio
from llava_train.data.pictures.media import Media, open_picture
from llava_train.data.plan import MicroBatch, Plan, deal
from llava_train.data.preparing.prepared import PreparedSet, Row
from llava_train.data.sample import ImageRef
from llava_train.errors import RecordError


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs, right-padded."""

    input_ids: torch.Tensor
    """(B, T)"""
    attention_mask: torch.Tensor
    """(B, T), 1 where a token stands"""
    labels: torch.Tensor
    """(B, T), unshifted, -100 where unsupervised"""
    weights: torch.Tensor
    """(B,), the weight of each supervised token of a sample in the step's loss"""
    pixel_values: torch.Tensor | None
    """(I, 3, H, W) in reading order, or None for text only"""
    ids: tuple[str, ...]
    """id and place of each sample, for messages"""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by DataLoader)."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})  # type: ignore[arg-type]


class ImageReader:
    """Pixels of pictures; small ones that come again are kept, up to 256 MB."""

    budget = 256 * 2**20

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

    def _processor(self, aspect_ratio: AspectRatio | None) -> Any:
        if aspect_ratio is not None and aspect_ratio not in self._shaped:
            size = int(self.processor.crop_size["height"])
            self._shaped[aspect_ratio] = with_aspect_ratio(self.processor, aspect_ratio, size)
        return self._shaped[aspect_ratio]


class Tokens(Protocol):
    """What `collate` needs of a row: both arrays (tokens,) int64, and what messages call it."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def place(self) -> str: ...  # noqa: D102
    @property
    def input_ids(self) -> np.ndarray: ...  # noqa: D102
    @property
    def labels(self) -> np.ndarray: ...  # noqa: D102


def collate(rows: Sequence[Tokens], weights: list[float], pixels: list[torch.Tensor], pad_id: int) -> Batch:
    """Rows as right-padded tensors."""
    length = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORE, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for index, row in enumerate(rows):
        size = len(row.input_ids)
        input_ids[index, :size] = torch.from_numpy(row.input_ids)
        labels[index, :size] = torch.from_numpy(row.labels)
        mask[index, :size] = 1
    return Batch(
        input_ids,
        mask,
        labels,
        torch.tensor(weights, dtype=torch.float32),
        torch.stack(pixels) if pixels else None,
        tuple(f"{row.id} ({row.place})" for row in rows),
    )


class BatchReader:
    """Micro-batches of a prepared set, pixels included."""

    def __init__(self, prepared: PreparedSet, reader: ImageReader, pad_id: int) -> None:
        self.prepared, self.reader, self.pad_id = prepared, reader, pad_id

    def __call__(self, micro_batch: MicroBatch) -> Batch:
        """Tensors of one micro-batch; RecordError names the sample whose picture cannot be read any more."""
        rows = [self.prepared.row(sample) for sample in micro_batch.samples]
        return collate(rows, list(micro_batch.weights), [p for row in rows for p in self._pixels(row)], self.pad_id)

    def _pixels(self, row: Row) -> list[torch.Tensor]:
        try:
            return [self.reader.read(ref, row.media, row.aspect_ratio) for ref in row.images]
        except RecordError as error:
            raise error.of(f"{row.place} (id {row.id})") from error


class StepDataset(Dataset[list[Batch] | RecordError]):
    """Item n is step n: this rank's micro-batches. A pure function of the plan, so any step can come next.

    A picture that cannot be read any more is the item: a worker process could only raise it with its traceback.
    """

    def __init__(self, reader: BatchReader, plan: Plan, place: tuple[int, int], micro: tuple[int, str]) -> None:
        """`place` is (rank, world size), `micro` is (micro-batch size, loss normalization)."""
        self.reader, self.plan = reader, plan
        self.rank, self.world_size = place
        self.micro_batch_size, self.normalization = micro

    def __len__(self) -> int:
        return self.plan.total_steps

    def __getitem__(self, step: int) -> list[Batch] | RecordError:
        prepared = self.reader.prepared
        dealt = deal(
            self.plan.step(step),
            prepared.lengths,
            prepared.supervised,
            self.world_size,
            self.micro_batch_size,
            self.normalization,
        )
        try:
            return [self.reader(micro_batch) for micro_batch in dealt[self.rank]]
        except RecordError as error:
            return error


def load_steps(
    dataset: StepDataset, first: int, num_workers: int, at_start: Callable[[int], None] | None = None
) -> Iterator[list[Batch]]:
    """Steps `first`, `first + 1`, ... decoded ahead by `num_workers` processes (0: in this one).

    `at_start` is called in each of them with its number. Raises RecordError naming the sample whose picture cannot be
    read any more.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first, len(dataset)),
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=at_start,
    )
    for item in loader:
        if isinstance(item, RecordError):
            raise item
        yield item
