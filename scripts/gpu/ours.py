"""Our side: the project's own objective, cut, engine and recompute in a loop like that of `training/loop.py`."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, groupby
from queue import Queue
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import LlavaForConditionalGeneration

from gpu.cases import Case
from gpu.meter import Meter, Send
from gpu.shapes import SHAPES, STAGES, Sample, Shape, make_model, make_samples, optimization_of, sizes_of
from llava_train.data.batch import Batch, batch_of
from llava_train.data.collate import pack, pad
from llava_train.data.micro_batches import Cut, Sizes, deal
from llava_train.data.pictures.shapes import Picture
from llava_train.model import attention
from llava_train.model.costs import Costs, costs_of
from llava_train.model.kernels import compile_layers
from llava_train.model.memory import Conditions, Kept, measure_kept
from llava_train.model.tuning import PRECISIONS, apply_tuning, parameter_groups, planned_dtypes
from llava_train.recipe import Recipe, SpeedSettings
from llava_train.training.engines.choice import device_memory
from llava_train.training.engines.ranks import Ranks
from llava_train.training.engines.replicated import Replicated
from llava_train.training.objective import LOGITS_BYTES, Objective
from llava_train.training.recompute import Memory, MicroBatch, Spread, apply_recompute, plan_memory, resident_bytes

POOL = 1024
"""Samples of a set; after the last comes the first."""
PICTURES = 32
"""Pictures of random pixels: which ones a sample has makes no difference to the time."""


@dataclass(frozen=True)
class Conditioned:
    """How the script was called: shapes by name, device, precision, seconds of timed steps.

    `known` is what earlier cases found out that takes seconds and is the same for others.
    """

    shapes: str
    device: str
    precision: str
    seconds: float
    known: dict[str, Any] = field(default_factory=dict)

    def recall(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, once for all cases."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    @property
    def shape(self) -> Shape:
        """What `shapes` names."""
        return SHAPES[self.shapes]

    @property
    def place(self) -> torch.device:
        """The device."""
        return torch.device("cuda", 0) if self.device == "cuda" else torch.device(self.device)

    @property
    def rank(self) -> int:
        """Of the adapters."""
        return 128 if self.shapes == "7b" else 4


def measure(case: Case, run: Conditioned, send: Send) -> None:
    """Build, train steps until they suffice, send figures."""
    shape, stage, device = run.shape, STAGES[case.stage], run.place
    samples = make_samples(shape, stage.captions, POOL)
    speed = SpeedSettings(packing=case.packing, attention=case.attention, compile=case.compile)
    recipe = Recipe(tune=stage.tune(run.rank), optimization=optimization_of(run.precision, shape.step), speed=speed)
    engine = Replicated(recipe, Ranks(0, 1, device))
    layers = layers_of(case, run, samples)
    model = _model(case, run, recipe, layers)
    costs = run.recall(f"costs/{case.stage}/{layers}", lambda: costs_of(model))
    dtypes = engine.dtypes(planned_dtypes(model, run.precision))
    tokens, memory = _chosen(case, run, model, dtypes, samples)
    recomputed = memory.recomputed if memory else 0
    meter = Meter(costs, stage.modes, device, run.seconds, send)
    meter.settings = {
        **({"micro_batch_tokens": tokens} if case.packing else {"micro_batch": case.micro or shape.micro[case.stage]}),
        "attention": _asked_of(case),
        "recompute": f"{recomputed} of {layers} layers",
        "compile": case.compile,
        "cast_input": case.cast_input,
        "shared": case.shared,
        "layers": layers,
        "step_samples": shape.step,
        "estimate": str(memory) if memory else None,
    }
    send({"settings": meter.described()})
    apply_recompute(model, recomputed)
    objective = Objective(model, engine.shards_weights, case.attention).train()
    engine.place(objective, dtypes)
    if case.compile:
        if device.type == "cpu":  # where the compiler takes half a minute, and says nothing about a GPU
            torch.compiler.set_stance("force_eager")
        compile_layers(model)
    engine.attach(objective, parameter_groups(model, recipe.tune, recipe.optimization), recipe.optimization)
    meter.begin()
    _train(engine, recipe, _steps(case, shape, samples, tokens, costs, device), meter)


def _model(case: Case, run: Conditioned, recipe: Recipe, layers: int) -> LlavaForConditionalGeneration:
    model = make_model(run.shape, run.place, PRECISIONS[run.precision], layers)
    if case.packing:
        attention.use_packed_attention(model.model.language_model)
    with run.place:
        apply_tuning(model, recipe.tune, recipe.seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = case.cast_input
    return model


def _train(engine: Replicated, recipe: Recipe, steps: Iterator[tuple[list[Sample], list[Batch]]], meter: Meter) -> None:
    """The loop of a run, without checkpoints and messages."""
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    ready = time.perf_counter()
    for samples, micro_batches in steps:
        stalled = time.perf_counter() - ready
        shares = []
        for index, batch in enumerate(micro_batches):
            with engine.accumulate(last=index == len(micro_batches) - 1):
                share = engine.module(batch.to(engine.ranks.device))
                engine.backward(share)
            shares.append(share.detach().double())
        meter.losses.append(engine.ranks.total([float(sum(shares))])[0])
        engine.clip(recipe.optimization.max_grad_norm)
        engine.update(rates)
        if meter.step(samples, sum(batch.input_ids.numel() for batch in micro_batches), stalled):
            return
        ready = time.perf_counter()


def _steps(
    case: Case, shape: Shape, samples: Sequence[Sample], tokens: int, costs: Costs, device: torch.device
) -> Iterator[tuple[list[Sample], list[Batch]]]:
    """Each step's samples and micro-batches, two made ahead in pinned memory, as data workers would do."""
    sizes = sizes_of(samples, shape, case.shared)
    size = shape.vision["image_size"]
    pictures = list(torch.randn(PICTURES, 3, size, size))
    cut = Cut(case.micro or shape.micro[case.stage])
    if case.packing:
        costly = {"pair_cost": costs.pair_in_tokens, "image_cost": costs.image_in_tokens}
        cut = replace(cut, budget=tokens, share=case.shared, **costly)

    def steps_made() -> Iterator[tuple[list[Sample], list[Batch]]]:
        for step in count():
            rows = [number % len(samples) for number in range(step * shape.step, (step + 1) * shape.step)]
            batches = []
            for each in deal(rows, sizes, 1, cut)[0]:
                own = [samples[row] for row in each.samples]
                groups = _groups(each.samples, samples, sizes)
                made = pack(groups, each.weights) if case.packing else pad(own, each.weights, 0)
                images = sum(row.images for row in own) - sum(len(rows) - 1 for _, rows in groups)
                pixels = [Picture(pictures[number % PICTURES][None]) for number in range(images)]
                batch = batch_of(made, pixels, [str(row) for row in each.samples], {})
                batches.append(batch.pin_memory() if device.type == "cuda" else batch)
            yield [samples[row] for row in rows], batches

    return ahead(steps_made())


def _groups(rows: Sequence[int], samples: Sequence[Sample], sizes: Sizes) -> list[tuple[int, list[Sample]]]:
    """Neighbours that begin alike, with the number of tokens they share."""
    keys = [int(sizes.prefix_keys[row]) or -row - 1 for row in rows]
    groups = [[row for _, row in group] for _, group in groupby(zip(keys, rows), lambda pair: pair[0])]
    return [
        (int(sizes.prefixes[group[0]]) if len(group) > 1 else 0, [samples[row] for row in group]) for group in groups
    ]


def ahead(items: Iterator[Any], depth: int = 2) -> Iterator[Any]:
    """The same items, up to `depth` of them made beforehand by a thread."""
    ready: Queue[Any] = Queue(depth)

    def fill() -> None:
        try:
            for item in items:
                ready.put(item)
        except Exception as error:  # raised where it is waited for
            ready.put(error)

    threading.Thread(target=fill, daemon=True).start()
    while True:
        item = ready.get()
        if isinstance(item, Exception):
            raise item
        yield item


def _asked_of(case: Case) -> str | set[str]:
    """The attention that computes; for "auto" a set that fills with what is chosen while the model runs."""
    if not case.packing:
        return "sdpa, padded"
    if case.attention != "auto":
        return case.attention
    seen: set[str] = set()
    chosen = attention.best

    def best(query: torch.Tensor, softcap: float | None = None) -> str:
        kind = chosen(query, softcap)
        seen.add(kind)
        return kind

    attention.best = best
    return seen


def _chosen(
    case: Case,
    run: Conditioned,
    model: LlavaForConditionalGeneration,
    dtypes: dict[str, torch.dtype],
    samples: Sequence[Sample],
) -> tuple[int, Memory | None]:
    """Positions of a micro-batch, and by estimate what it needs with as many layers recomputed as must be."""
    if not case.packing:
        return 0, None
    layers, total = len(model.model.language_model.layers), device_memory(run.place)
    kept = run.recall(
        f"kept/{case.stage}/{layers}/{case.attention}/{case.cast_input}",
        lambda: _kept(model, run, dtypes, samples, case.attention),
    )
    resident = resident_bytes(model, dtypes, Spread())
    memory = None
    for tokens in [case.tokens] if case.tokens else run.shape.budgets:
        memory = plan_memory(case.recompute, kept, layers, _largest(tokens, samples, model), resident, total)
        if not memory.recomputed:
            break
    return tokens, memory


def _kept(
    model: LlavaForConditionalGeneration,
    run: Conditioned,
    dtypes: dict[str, torch.dtype],
    samples: Sequence[Sample],
    kind: str,
) -> Kept:
    length = math.ceil(sum(len(sample.input_ids) for sample in samples) / len(samples))
    autocast = None if run.precision == "fp32" else PRECISIONS[run.precision]
    return measure_kept(model, Conditions(dtypes, autocast, run.place.type, length, kind))


def _largest(tokens: int, samples: Sequence[Sample], model: LlavaForConditionalGeneration) -> MicroBatch:
    shortest = min(len(sample.input_ids) for sample in samples if sample.images)
    return MicroBatch(
        tokens, math.ceil(tokens / shortest), min(tokens, LOGITS_BYTES // (4 * model.lm_head.out_features))
    )


def layers_of(case: Case, run: Conditioned, samples: Sequence[Sample]) -> int:
    """Decoder layers of a case: all, or in stage `full` as many as fit, by estimate, without any recompute."""
    every = int(run.shape.text["num_hidden_layers"])
    if case.stage != "full" or case.layers == -1:
        return every
    if case.layers:
        return case.layers
    model = make_model(run.shape, torch.device("meta"), PRECISIONS[run.precision])
    attention.use_packed_attention(model.model.language_model)
    apply_tuning(model, STAGES["full"].tune(), 0)
    dtypes = planned_dtypes(model, run.precision)
    kept = _kept(model, run, dtypes, samples, case.attention)
    batch = _largest(run.shape.budgets[1], samples, model)
    total = device_memory(run.place)
    layers = model.model.language_model.layers
    for number in range(every, 1, -1):
        del layers[number:]
        fewer = replace(kept, copies=kept.copies * number / every)
        if not plan_memory("auto", fewer, number, batch, resident_bytes(model, dtypes, Spread()), total).recomputed:
            return number
    return 2
