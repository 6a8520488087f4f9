"""The cases in their order, the most important first, and what to try where one runs out of memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        name: stage/side, then what differs from the published or default settings.
        job: which function of `jobs` measures it.
        stage: of `shapes.STAGES`.
        attention: `speed.attention`.
        tokens: positions of a micro-batch (ours); None: the most of the shape's budgets that needs no recompute.
        recompute: `speed.recompute` (ours).
        compile: `speed.compile` (ours).
        packing: `speed.packing` (ours).
        shared: whether two samples each are about one picture, and share their beginning (ours).
        cast_input: whether PEFT casts what an adapter reads to float32 (its default).
        micro: samples of a micro-batch (Trainer, ours without packing); None: as published.
        checkpointing: gradient checkpointing (Trainer).
        grouped: micro-batches of samples of like length (Trainer).
        layers: decoder layers; None: all, in stage `full` as many as fit. -1: all, in any case.
        seconds: time limit.
    """

    name: str
    job: str
    stage: str = ""
    attention: str = "auto"
    tokens: int | None = None
    recompute: str = "auto"
    compile: bool = False
    packing: bool = True
    shared: bool = False
    cast_input: bool = True
    micro: int | None = None
    checkpointing: bool = True
    grouped: bool = False
    layers: int | None = None
    seconds: float = 110.0


def _ours(stage: str, suffix: str = "", **changes: Any) -> Case:
    return Case(f"{stage}/ours{suffix}", "ours", stage, **changes)


def _trainer(stage: str, suffix: str = "", **changes: Any) -> Case:
    return Case(f"{stage}/trainer{suffix}", "trainer", stage, **changes)


CHECKS = (Case("probe", "probe", seconds=90), Case("equality", "equality", seconds=90))
MAIN = (
    _ours("stage1"),
    _ours("lora"),
    _trainer("stage1"),
    _trainer("lora"),
    _ours("full"),
    _trainer("full"),
)
COMPILED = {"compile": True, "seconds": 150}
VARIANTS = (
    _ours("lora", "+compile", **COMPILED),
    _ours("stage1", "+compile", **COMPILED),
    _ours("lora", "+no_cast", cast_input=False),
    _trainer("stage1", "+no_checkpointing", checkpointing=False),
    _trainer("lora", "+no_checkpointing", checkpointing=False, micro=8),
    _trainer("lora", "+grouped", grouped=True),
    _ours("full", "+all_layers", layers=-1),
    _ours("lora", "+shared", shared=True),
    _ours("stage1", "+32k", tokens=32_768),
    _ours("lora", "+16k", tokens=16_384),
    _ours("full", "+compile", **COMPILED),
    _ours("lora", "+no_packing", packing=False),
    Case("equality_flex", "equality_flex", seconds=150),
    _ours("lora", "+flex", attention="flex", seconds=150),
    _ours("stage1", "+flex", attention="flex", seconds=150),
    _ours("lora", "+32k", tokens=32_768),
)
CASES = (*CHECKS, *MAIN, *VARIANTS)
SMALLEST = 2048
"""Positions below which no micro-batch is tried."""


def smaller(case: Case, settings: Mapping[str, Any]) -> Case | None:
    """What to try next where `settings` were too much for the device's memory; None: nothing is left."""
    if case.job == "trainer" or not case.packing:
        micro = int(settings.get("micro_batch", 2))
        return replace(case, micro=micro // 2) if micro > 1 else None
    tokens = int(settings.get("micro_batch_tokens", 2 * SMALLEST))
    if tokens > SMALLEST:
        return replace(case, tokens=tokens // 2, recompute="none" if case.recompute == "none" else "auto")
    if case.recompute != "full":
        return replace(case, recompute="full")
    fewer = int(settings.get("layers", 0)) * 3 // 4
    if case.stage != "full" or case.layers == -1 or fewer < 2:
        return None
    return replace(case, layers=fewer, tokens=None, recompute="auto")


def with_flex(case: Case) -> Case | None:
    """The same case with the other attention, where the one for this device failed; None: it is not to blame."""
    if case.job != "ours" or case.attention != "auto" or not case.packing:
        return None
    return replace(case, name=f"{case.name}+flex_instead", attention="flex", seconds=150)
