"""The peer: transformers' `Trainer` on the stock class, with the same weights, samples and optimizer.

Weights are held as ours are: what trains in float32, the rest in the precision of the run, under autocast.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    LlavaForConditionalGeneration,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)

from gpu.cases import Case
from gpu.meter import Meter, Send
from gpu.ours import PICTURES, POOL, Conditioned, layers_of
from gpu.shapes import STAGES, Sample, make_model, make_samples
from llava_train.data.encode import IGNORE
from llava_train.model.costs import costs_of
from llava_train.model.tuning import PRECISIONS, apply_tuning, planned_dtypes
from llava_train.training.engines.base import cast

STEP = 2
"""Micro-batches a step: fewer than ours, which changes nothing a sample, so that two steps are soon over."""


def measure(case: Case, run: Conditioned, send: Send) -> None:
    """Build, train steps until they suffice, send figures."""
    shape, stage, device = run.shape, STAGES[case.stage], run.place
    micro = case.micro or shape.micro[case.stage]
    samples = make_samples(shape, stage.captions, POOL)
    layers = layers_of(case, run, samples)
    if case.grouped:
        samples = grouped(samples, micro)
    model = make_model(shape, device, PRECISIONS[run.precision], layers)
    tune = stage.tune(run.rank)
    with device:
        apply_tuning(model, tune, 0)
    costs = run.recall(f"costs/{case.stage}/{layers}", lambda: costs_of(model))
    cast(model, planned_dtypes(model, run.precision), "model")
    meter = Meter(costs, stage.modes, device, run.seconds, send)
    meter.settings = {
        "micro_batch": micro,
        "attention": str(model.config.text_config._attn_implementation),
        "gradient_checkpointing": case.checkpointing,
        "grouped": case.grouped,
        "layers": layers,
        "step_samples": STEP * micro,
    }
    send({"settings": meter.described()})
    with tempfile.TemporaryDirectory() as folder:
        rate = tune.llm.learning_rate or tune.connector.learning_rate or 1e-3
        arguments = _arguments(folder, case, run, micro, rate)
        collator = Collator(shape.image_id, shape.vision["image_size"])
        watch = _Watch(meter, collator, samples)
        trainer = _InOrder(model, arguments, collator, list(enumerate(samples)), callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def _arguments(folder: str, case: Case, run: Conditioned, micro: int, rate: float) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=STEP,
        max_steps=10_000,
        learning_rate=rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=run.precision == "bf16",
        fp16=run.precision == "fp16",
        gradient_checkpointing=case.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if case.checkpointing else None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        use_cpu=run.place.type == "cpu",
    )


def grouped(samples: Sequence[Sample], micro: int) -> list[Sample]:
    """Micro-batches of samples of like length in random order, as in the middle of a long epoch."""
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
    batches = [ordered[start : start + micro] for start in range(0, len(ordered), micro)]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [sample for number in order for sample in batches[number]]


class Collator:
    """Samples -> tensors padded to the longest; remembers which samples, and how many positions, each batch had."""

    def __init__(self, image_id: int, size: int) -> None:
        self.image_id = image_id
        self.pictures = list(torch.randn(PICTURES, 3, size, size))
        self.made: list[tuple[list[int], int]] = []

    def __call__(self, rows: list[tuple[int, Sample]]) -> dict[str, torch.Tensor]:
        """A micro-batch; no `pixel_values` for text alone."""
        ids = [torch.from_numpy(sample.input_ids) for _, sample in rows]
        labels = [torch.from_numpy(sample.labels) for _, sample in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        }
        images = sum(sample.images for _, sample in rows)
        if images:
            batch["pixel_values"] = torch.stack([self.pictures[number % PICTURES] for number in range(images)])
        self.made.append(([number for number, _ in rows], batch["input_ids"].numel()))
        return batch


class _InOrder(Trainer):
    """`Trainer` that reads its samples as they come: they are in random order, and each side has the same ones."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        arguments: TrainingArguments,
        collator: Collator,
        samples: list[tuple[int, Sample]],
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model=model, args=arguments, data_collator=collator, train_dataset=samples, callbacks=callbacks
        )

    def _get_train_sampler(self, *arguments: Any, **named: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)


class _Watch(TrainerCallback):
    """Tells the meter of each step, and ends the training."""

    def __init__(self, meter: Meter, collator: Collator, samples: Sequence[Sample]) -> None:
        self.meter, self.collator, self.samples = meter, collator, samples
        self._taken = 0

    def on_train_begin(self, *arguments: Any, **named: Any) -> None:
        self.meter.begin()

    def on_log(
        self, args: Any, state: Any, control: TrainerControl, logs: dict[str, float] | None = None, **named: Any
    ) -> None:
        if logs and "loss" in logs:
            self.meter.losses.append(float(logs["loss"]))

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **named: Any) -> None:
        batches = self._batches()
        samples = [self.samples[number] for numbers, _ in batches for number in numbers]
        if self.meter.step(samples, sum(positions for _, positions in batches)):
            control.should_training_stop = True

    def _batches(self) -> list[tuple[list[int], int]]:
        """Of this step; the loader has made one more by now."""
        start, self._taken = self._taken, self._taken + STEP
        return self.collator.made[start : self._taken]
