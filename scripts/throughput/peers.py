"""What ours is measured against: transformers' `Trainer` and TRL's `SFTTrainer` on the stock class.

They train on the very tokens of ours, padded to the longest of a micro-batch by a collator that opens and processes the
pictures with the model folder's own image processor.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from llava_train import load_recipe
from llava_train.inspection import inspect
from throughput.sides import Task, Trace, write_recipe

IGNORE = -100
WINDOW = 50
"""Steps that `group_by_length` sorts together where the epoch is long enough."""


def write_rows(task: Task, records: Sequence[dict[str, Any]]) -> list[int]:
    """Write `peers/`: id, picture, ids and labels of each record as ours has them. Returns the lengths."""
    pictures = {record["id"]: record.get("image") for record in records}
    rows = [
        {key: row[key] for key in ("id", "input_ids", "labels")} | {"image": pictures[row["id"]]}
        for row in inspect(load_recipe(write_recipe(task)))
    ]
    Dataset.from_list(rows).save_to_disk(Path(task.data) / "peers")
    return [len(row["input_ids"]) for row in rows]


class Collator:
    """Rows -> padded tensors with pixels."""

    def __init__(self, folder: Path, processor: Any) -> None:
        self.folder, self.processor = folder, processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A micro-batch; no `pixel_values` for text alone."""
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        }
        pictures = [self._open(row["image"]) for row in rows if row["image"]]
        if pictures:
            batch["pixel_values"] = self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return batch

    def _open(self, name: str) -> Image.Image:
        with Image.open(self.folder / name) as picture:
            return picture.convert("RGB")


class LongEpoch(Sampler[int]):
    """The order of `group_by_length` as a long epoch has it: up to 50 steps sorted by length together.

    In a set of fewer than 200 steps it would sort a quarter of the set at a time, and pad more than its users see.
    """

    def __init__(self, lengths: list[int], batch: int) -> None:
        self.lengths, self.batch = lengths, batch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        window = min(WINDOW, -(-len(self.lengths) // self.batch))
        return iter(get_length_grouped_indices(self.lengths, self.batch, window))


class GroupedTrainer(Trainer):
    """`Trainer` with `train_sampling_strategy="group_by_length"` in the middle of a long epoch."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        lengths = [len(row) for row in self.train_dataset["input_ids"]]
        return LongEpoch(lengths, self.args.train_batch_size * self.args.gradient_accumulation_steps)


class _Stamps(TrainerCallback):
    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        self.trace.stamp()


def run_peer(task: Task, trace: Trace) -> Trace:
    """Train with a peer, all of its choices that the task does not make at their defaults."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration.from_pretrained(task.model, dtype=torch.float32)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if not task.frozen:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    processor = AutoProcessor.from_pretrained(task.model, backend="pil")
    kind, arguments = _kind_of(task)
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=Dataset.load_from_disk(Path(task.data) / "peers"),
        data_collator=Collator(Path(task.data), processor),
        processing_class=processor,
        callbacks=[_Stamps(trace)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trace.losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    trace.optimizer = str(trainer.args.optim)
    return trace


def _kind_of(task: Task) -> tuple[type[Trainer], TrainingArguments]:
    shared: dict[str, Any] = {
        "output_dir": f"{task.work}/peer",
        "max_steps": task.steps,
        "per_device_train_batch_size": task.micro,
        "gradient_accumulation_steps": task.step // task.micro,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "bf16": task.dtype == "bf16",
        "use_cpu": True,
        "dataloader_num_workers": task.workers,
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
        "logging_strategy": "steps" if task.log else "no",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if task.side == "trl":
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer, SFTConfig(**shared, max_length=None)
    return (GroupedTrainer if task.side == "trainer_grouped" else Trainer), TrainingArguments(**shared)
