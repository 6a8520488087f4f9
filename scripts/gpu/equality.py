"""Whether packed rows compute the same on this device: each attention against the plain definition, then whole models.

First the kernel alone: output and gradients by stretch, so that a fault names its place (the stretches that see a
parent, say). Then a small model: loss and gradients of packed batches, shared beginnings among them, against padded
ones, in float32 and under autocast. What autocast itself changes is told by the padded batch under autocast.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from gpu.meter import Send
from gpu.ours import Conditioned
from gpu.shapes import SHAPES, Sample, Shape, make_model, make_sample
from llava_train.data.batch import Batch, batch_of
from llava_train.data.collate import pack, pad
from llava_train.data.encode import IGNORE
from llava_train.data.pictures.shapes import Picture
from llava_train.model.attention import ATTENTIONS, Layout, use_packed_attention
from llava_train.model.tuning import apply_tuning, planned_dtypes
from llava_train.recipe import PartTuning, TuneSettings
from llava_train.training.engines.base import cast
from llava_train.training.objective import Objective

SMALL = replace(
    SHAPES["tiny"],
    text=SHAPES["tiny"].text | {"hidden_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 2},
)
"""Heads of 32 channels, two queries a key"""
LAYOUTS = {"apart": ((70, 1, 129, 40), (-1,) * 4), "shared": ((90, 33, 64, 7, 50, 20), (-1, 0, 0, -1, 3, 3))}
"""Lengths and parents: stretches on their own, and beginnings that others follow"""
EXACT, ROUGH, TIMES = 1e-3, 2e-2, 3.0
"""Relative differences allowed: float32; half precision in a kernel; of a model, times what autocast itself does."""


def check(run: Conditioned, send: Send, kinds: Sequence[str]) -> None:
    """Check attentions; sends {"verdict", "kernel": {...}, "model": {...}}, after each finding all so far."""
    found: dict[str, Any] = {"kernel": {}, "model": {}}
    low = [torch.bfloat16] if run.place.type == "cuda" else []
    for kind in kinds:
        for dtype in low if kind == "varlen" else [torch.float32, *low]:
            for name, (lengths, parents) in LAYOUTS.items():
                for heads, groups in ((8, 8), (8, 2)):
                    layout = Layout(lengths, parents, run.place, kind)
                    key = f"{kind}/{_name(dtype)}/{name}/{heads} heads, {groups} of keys"
                    found["kernel"][key] = _tried(_kernel, layout, dtype, heads, groups)
                    send({**found, "verdict": verdict(found)})
    for mode in ("frozen", "full"):
        for key, finding in _models(run, mode, kinds):
            found["model"][key] = finding
            send({**found, "verdict": verdict(found)})


def verdict(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """ "equal", or what is not."""
    wrong = [
        f"{key}: {finding['wrong']}" for part in found.values() for key, finding in part.items() if finding["wrong"]
    ]
    return "; ".join(wrong) or "equal"


def _tried(test: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    try:
        return test(*arguments)
    except Exception as error:  # whatever a kernel raises is the finding
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error).strip().splitlines()
        where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
        return {"wrong": f"{type(error).__name__} in {where}: {text[0][:300] if text else ''}"}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kernel(layout: Layout, dtype: torch.dtype, heads: int, groups: int, channels: int = 128) -> dict[str, Any]:
    """Output and gradients against the plain definition in float32, on the same rounded values."""
    torch.manual_seed(0)
    size = sum(layout.lengths)
    given = [torch.randn(1, number, size, channels, device=layout.device) for number in (heads, groups, groups)]
    given = [each.to(dtype) for each in given]
    towards = torch.randn(1, heads, size, channels, device=layout.device)

    def results(kind: str, dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = [each.to(dtype).requires_grad_() for each in given]
        made = ATTENTIONS[kind](*tensors, layout, channels**-0.5, 0.0)
        return [made, *torch.autograd.grad(made, tensors, towards.to(dtype))]

    names = ("output", "grad_query", "grad_key", "grad_value")
    limit = EXACT if dtype == torch.float32 else ROUGH
    finding: dict[str, Any] = {"wrong": ""}
    for name, own, plain in zip(names, results(layout.kind, dtype), results("dense", torch.float32)):
        finding[name] = _relative(own, plain)
        if not finding[name] <= limit and not finding["wrong"]:
            finding["wrong"] = f"{name} differs by {finding[name]:.1e}, most in {_worst(own, plain, layout)}"
    return finding


def _relative(own: torch.Tensor, plain: torch.Tensor) -> float:
    """|own - plain| / |plain|; NaN stays NaN."""
    own, plain = own.detach().double(), plain.detach().double()
    return float((own - plain).norm() / plain.norm().clamp_min(1e-30))


def _worst(own: torch.Tensor, plain: torch.Tensor, layout: Layout) -> str:
    parts = zip(own.split(layout.lengths, dim=2), plain.split(layout.lengths, dim=2))
    differences = torch.tensor([_relative(*pair) for pair in parts]).nan_to_num(float("inf"))
    number = int(differences.argmax())
    parent = layout.parents[number]
    return (
        f"stretch {number} of {len(layout.lengths)} ({layout.lengths[number]} tokens, "
        f"{'no parent' if parent < 0 else f'parent {parent}'}: {float(differences[number]):.1e})"
    )


def _models(run: Conditioned, mode: str, kinds: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Findings of a small model whose decoder trains as `mode` says; the connector trains in any case."""
    groups, pixels = _samples(SMALL)
    rows = [row for _, members in groups for row in members]
    weights = [1 / sum(row.supervised for row in rows)] * len(rows)
    each = [Picture(pixels[number][None]) for number, (_, members) in enumerate(groups) for _ in members]
    together = [Picture(pixels[number][None]) for number in range(len(groups))]
    padded = batch_of(pad(rows, weights, 0), each, [], {})
    batches = {
        "apart": batch_of(pack([(0, [row]) for row in rows], weights), each, [], {}),
        "shared": batch_of(pack(groups, weights), together, [], {}),
    }
    exact = _Small(run, mode, "fp32")
    reference = exact.results(padded, "")
    for kind in kinds:
        if kind != "varlen":
            for name, batch in batches.items():
                yield f"{kind}/{mode}/fp32/{name}", _tried(exact.compared, reference, EXACT, batch, kind)
    yield f"stock class/{mode}/fp32", _tried(exact.compared, reference, EXACT, padded, "stock")
    rounded = _Small(run, mode, "bf16")
    plain = _tried(rounded.compared, reference, float("inf"), padded, "")
    yield f"padded/{mode}/bf16", plain
    limit = max(EXACT, TIMES * plain.get("gradients", 0.0))
    for kind in kinds:
        for name, batch in batches.items():
            yield f"{kind}/{mode}/bf16/{name}", _tried(rounded.compared, reference, limit, batch, kind)


def _samples(shape: Shape) -> tuple[list[tuple[int, list[Sample]]], torch.Tensor]:
    """Groups of samples with the number of tokens they share, and a picture for each group."""
    rng = np.random.default_rng(0)
    groups = []
    for texts in ((30, 50, 12), (70,), (25, 26), (5,)):
        members = [make_sample(shape, text, max(1, text // 3), 1, rng) for text in texts]
        shared = 1 + shape.image_tokens if len(texts) > 1 else 0
        groups.append((shared, members))
    size = shape.vision["image_size"]
    return groups, torch.randn(len(groups), 3, size, size, generator=torch.Generator().manual_seed(1))


class _Small:
    """A small model in a precision; its weights have values that bf16 can hold, so that casting changes none."""

    def __init__(self, run: Conditioned, mode: str, precision: str) -> None:
        self.device, self.precision = run.place, precision
        model = make_model(SMALL, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.bfloat16())
        llm = PartTuning("full" if mode == "full" else "frozen")
        apply_tuning(model, TuneSettings(connector=PartTuning("full"), llm=llm), 0)
        cast(model, planned_dtypes(model, precision), "model")
        self.model: LlavaForConditionalGeneration = model.to(self.device).train()

    def results(self, batch: Batch, kind: str) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss and gradients by name. `kind` "": a padded batch; "stock": that through the stock class's own loss."""
        decoder = self.model.model.language_model
        decoder.config._attn_implementation = "sdpa"
        if batch.lengths:
            use_packed_attention(decoder)
        self.model.zero_grad()
        half = torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()
        with half:
            loss = self._stock(batch) if kind == "stock" else Objective(self.model, False, kind)(batch.to(self.device))
        loss.backward()
        named = self.model.named_parameters()
        return float(loss.detach()), {name: weight.grad.clone() for name, weight in named if weight.requires_grad}

    def _stock(self, batch: Batch) -> torch.Tensor:
        labels = torch.full_like(batch.input_ids, IGNORE)
        labels.view(-1)[batch.predictors + 1] = batch.targets
        batch = batch.to(self.device)
        output = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=batch.pixel_values,
            labels=labels.to(self.device),
        )
        return output.loss

    def compared(
        self, reference: tuple[float, dict[str, torch.Tensor]], limit: float, batch: Batch, kind: str
    ) -> dict[str, Any]:
        """Relative differences of loss and gradients (of all weights together, and of the one that is worst)."""
        loss, gradients = self.results(batch, kind)
        plain_loss, plain = reference
        by_name = {name: _relative(gradients[name], plain[name]) for name in plain}
        worst = max(by_name, key=lambda name: by_name[name] if by_name[name] == by_name[name] else float("inf"))
        every = [torch.cat([of[name].flatten().double() for name in plain]) for of in (gradients, plain)]
        finding = {
            "loss": abs(loss - plain_loss) / abs(plain_loss),
            "gradients": _relative(*every),
            "worst": f"{worst}: {by_name[worst]:.1e}",
            "wrong": "",
        }
        if not max(finding["loss"], finding["gradients"]) <= limit:
            finding["wrong"] = (
                f"loss differs by {finding['loss']:.1e}, gradients by {finding['gradients']:.1e} "
                f"(allowed {limit:.1e}), most {finding['worst']}"
            )
        return finding
