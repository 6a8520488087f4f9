#!/usr/bin/env python3
"""What a step of LLaVA-1.5 7B costs on 8 to 1,024 GPUs: dealt by the plan's own code, the network on paper.

    python scripts/simulate_scale.py                       # captions and instructions; under a minute
    python scripts/simulate_scale.py --grouped             # 1.95 conversations about a picture, and what sharing saves
    python scripts/simulate_scale.py --gpus 512 --global-batch 4096 --micro-batch-tokens 16384 --inter 10

Nothing is trained. Samples are lengths drawn from the distributions below, dealt to ranks as a run would deal them, and
counted in FLOPs from the shapes of the model. Steps are taken evenly from an epoch; figures are means over them.

  captions      stage 1 (only the connector trains): 600 +- 10 tokens, 576 of them the picture's, 22 supervised
  instructions  stage 2 (the LLM trains, too): 94 % have a picture; 35 tokens of system prompt, 576 of the picture, and
                text that is lognormal with mean 225 and sigma 0.8, two thirds of it supervised; 2,048 tokens at most.
                Mean and sigma are assumptions: the authors publish no distribution

  random        samples as they come, padded to the longest of a micro-batch, as trainers do by default
  length        padded, neighbours in length together (speed.packing: false)
  packed        end to end, ranks balanced by cost
  shared        packed, with data.group_by_image: what begins alike stands once (with --grouped)

Columns. `micro`: micro-batches of a rank. `fill`: those of all ranks that carry no sample, but keep ranks in step.
`pad`: share of positions that are padding; below 0 where a shared beginning saves more. `round` and `step`: how much
longer the slowest rank computes than the mean, in each round of micro-batches, where ranks wait for one another at
every layer (ZeRO-3, FSDP2), and over the step (DDP, ZeRO-1). `deal`: time that this machine takes to deal a step; data
workers do that ahead.

The network. In a ring of N GPUs, to gather S bytes, or to sum them so that each rank gets its part, takes
S (N - 1) / N / B seconds and (N - 1) hops of --latency; to sum them for all takes that twice. B is --intra within 8
GPUs. Beyond, it is the lower of --intra and 8 times --inter: eight rings leave a node through an adapter each.

  gather  of a step under ZeRO-3: for each micro-batch all weights twice (forward, backward) at 2 bytes, and gradients
          of trained weights summed in parts at 4, one layer at a time. FSDP2 sums them in the last micro-batch alone.
  reduce  of a step under DDP: gradients of trained weights summed for all at 4 bytes; hops are left out (libraries take
          trees where they matter). ZeRO-1 moves as much, and is what training a 7B model in full needs.

`bare` is the share of the step that this takes where nothing else happens meanwhile; `left` is what remains of it
beside the compute of its micro-batch (DDP: of the last one). `rate` is samples a second and GPU with `left`.
The last line is one JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from llava_train.data.micro_batches import Cut, MicroBatch, Sizes, deal
from llava_train.data.mixture import Mixture
from llava_train.data.plan import Plan

IMAGE, SYSTEM, CAPTION, TEXT, SIGMA, LONGEST = 576, 35, 24, 225, 0.8, 2048
TEXT_ONLY, PER_IMAGE = 0.06, 1.95
"""Share of instructions without a picture (LLaVA-1.5: 40,688 of 665,298); 158K conversations on 81K pictures."""
SAMPLES = {"captions": 558_128, "instructions": 665_298}
MODES = {
    "captions": {"vision": "frozen", "connector": "full", "llm": "frozen"},
    "instructions": {"vision": "frozen", "connector": "full", "llm": "full"},
}
NODE, WEIGHT_BYTES, GRADIENT_BYTES = 8, 2, 4
Dealt = list[list[MicroBatch]]
Row = dict[str, Any]


def captions(count: int) -> Sizes:
    """Pictures with a short caption."""
    text = np.maximum(3, np.random.default_rng(0).normal(CAPTION, 10, count).round().astype(int))
    none = np.zeros(count, dtype=int)
    return Sizes(IMAGE + text, text - 2, none + 1, none, none, none)


def instructions(count: int, per_image: float = 1.0) -> Sizes:
    """Conversations; each picture has one at least, the others fall where chance wants."""
    rng = np.random.default_rng(0)
    seen = (rng.random(count) >= TEXT_ONLY).astype(int)
    text = rng.lognormal(math.log(TEXT) - SIGMA**2 / 2, SIGMA, count).astype(int) + 1
    before = SYSTEM + seen * IMAGE
    lengths = np.minimum(before + text, LONGEST)
    pictures = max(1, round(seen.sum() / per_image))
    about = np.concatenate([np.arange(pictures), rng.integers(0, pictures, seen.sum() - pictures)]) + 1
    keys = np.zeros(count, dtype=int)
    keys[seen > 0] = rng.permutation(about)
    return Sizes(lengths, np.maximum(1, (lengths - before) * 2 // 3), seen, seen * before, seen, keys)


@dataclass(frozen=True)
class Model:
    """A model in numbers.

    Attributes:
        weights: all of them.
        trained: those that train, by kind of data.
        layers: what is gathered at a time, how many of it.
        flops: of a step, by kind of data: a token's, a pair's, an image's, a supervised position's, (4,).
        pair, image: what these cost in tokens, forward.
    """

    weights: int
    trained: dict[str, int]
    layers: int
    flops: dict[str, np.ndarray]
    pair: float
    image: float


def llava_7b() -> Model:
    """CLIP-L/14-336, two layers between, Vicuna-7B; weights without values, so this takes seconds."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from llava_train.model.costs import Counts, costs_of, step_flops

    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision, text = CLIPVisionConfig(**size, image_size=336, patch_size=14), LlamaConfig()  # whose defaults are 7B's
    with torch.device("meta"):
        config = LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)
        model = LlavaForConditionalGeneration(config)
    costs = costs_of(model)
    units = [Counts(*row) for row in np.eye(4).tolist()]  # FLOPs are linear in counts
    whole, connector, tower = (
        sum(weight.numel() for weight in part.parameters())
        for part in (model, model.model.multi_modal_projector, model.model.vision_tower)
    )
    return Model(
        whole,
        {"captions": connector, "instructions": whole - tower},
        text.num_hidden_layers + vision.num_hidden_layers + 1,
        {
            kind: np.array([sum(step_flops(costs, unit, modes).values()) for unit in units])
            for kind, modes in MODES.items()
        },
        costs.pair_in_tokens,
        costs.image_in_tokens,
    )


@dataclass(frozen=True)
class Hardware:
    """Bytes a second of a GPU within a node and beyond it, seconds of a hop, FLOPs a second that are reached."""

    intra: float
    inter: float
    latency: float
    flops: float

    def ring(self, size: float, gpus: int, messages: float = 0.0) -> float:
        """Seconds to gather `size` bytes on every GPU, or to sum them in parts, in so many messages."""
        bandwidth = self.intra if gpus <= NODE else min(self.intra, NODE * self.inter)
        return size * (gpus - 1) / gpus / bandwidth + messages * (gpus - 1) * self.latency

    def gather(self, model: Model, trained: int, gpus: int) -> float:
        """Seconds of communication in a micro-batch under ZeRO-3."""
        both = 2 * self.ring(WEIGHT_BYTES * model.weights, gpus, model.layers)
        return both + self.ring(GRADIENT_BYTES * trained, gpus, model.layers * trained / model.weights)

    def reduce(self, trained: int, gpus: int) -> float:
        """Seconds of communication in a step under DDP."""
        return 2 * self.ring(GRADIENT_BYTES * trained, gpus)


def as_they_come(rows: list[int], gpus: int, size: int) -> Dealt:
    """Every rank takes each `gpus`-th sample, and `size` of them at a time."""
    count = math.ceil(len(rows) / (gpus * size))
    shares = [[rows[rank::gpus][start * size :][:size] for start in range(count)] for rank in range(gpus)]
    filler = MicroBatch((rows[0],), (0.0,))
    return [[MicroBatch(tuple(own), (1.0,) * len(own)) if own else filler for own in share] for share in shares]


def counted(samples: tuple[int, ...], sizes: Sizes, cut: Cut) -> tuple[float, ...]:
    """Tokens, pairs, images and supervised positions that a micro-batch computes, padding included."""
    rows = np.array(samples)
    lengths, images = sizes.lengths[rows].astype(float), float(sizes.images[rows].sum())
    if cut.budget is None:
        lengths[:] = lengths.max()
    tokens, pairs = lengths.sum(), (lengths * (lengths + 1) / 2).sum()
    if cut.share:
        keyed = rows[sizes.prefix_keys[rows] > 0]
        again = np.delete(keyed, np.unique(sizes.prefix_keys[keyed], return_index=True)[1])
        prefixes = sizes.prefixes[again].astype(float)
        tokens, pairs = tokens - prefixes.sum(), pairs - (prefixes * (prefixes + 1) / 2).sum()
        images -= sizes.prefix_images[again].sum()
    return tokens, pairs, images, float(sizes.supervised[rows].sum())


def timed(seconds: np.ndarray, gather: float, reduce: float, samples: int) -> Row:
    """What becomes of a step whose micro-batches compute for so many `seconds`, (ranks, rounds)."""
    rounds, apart = seconds.max(axis=0), seconds.sum(axis=1).max()
    lockstep, gathered = rounds.sum(), gather * len(rounds)
    together = np.maximum(rounds, gather).sum()
    reduced = apart + max(0.0, reduce - rounds[-1])
    return {
        "round": lockstep / seconds.mean(axis=0).sum(),
        "step": apart / seconds.sum(axis=1).mean(),
        "compute": lockstep,
        "gather": gathered,
        "zero3_bare": gathered / (gathered + lockstep),
        "zero3_left": 1 - lockstep / together,
        "zero3_rate": samples / len(seconds) / together,
        "reduce": reduce,
        "ddp_bare": reduce / (reduce + apart),
        "ddp_left": 1 - apart / reduced,
        "ddp_rate": samples / len(seconds) / reduced,
    }


@dataclass(frozen=True)
class Case:
    """One kind of data on one kind of hardware; `size` is samples of a padded micro-batch."""

    kind: str
    sizes: Sizes
    model: Model
    hardware: Hardware
    steps: int
    size: int

    def row(self, way: str, cut: Cut, gpus: int, batch: int) -> Row:
        """Means over the steps, and what they are of."""
        groups = self.sizes.prefix_keys if cut.share else None
        plan = Plan.of(Mixture.whole(len(self.sizes.lengths)), batch, 1, None, 0, groups)
        chosen = np.linspace(0, plan.steps_per_epoch - 1, self.steps, endpoint=False).astype(int).tolist()
        made = [self._step(plan.step(step), way, cut, gpus) for step in chosen]
        means = {key: float(f"{np.mean([each[key] for each in made]):.4g}") for key in made[0]}
        return {"gpus": gpus, "batch": batch, "way": way, **means}

    def _step(self, rows: list[int], way: str, cut: Cut, gpus: int) -> Row:
        started = time.perf_counter()
        dealt = as_they_come(rows, gpus, self.size) if way == "random" else deal(rows, self.sizes, gpus, cut)
        took = time.perf_counter() - started
        computed = np.array([[counted(each.samples, self.sizes, cut) for each in own] for own in dealt])
        trained = self.model.trained[self.kind]
        return {
            "micro": computed.shape[1],
            "fill": sum(not any(each.weights) for own in dealt for each in own),
            "pad": 1 - self.sizes.lengths[rows].sum() / computed[..., 0].sum(),
            "deal": took,
            **timed(
                computed @ self.model.flops[self.kind] / self.hardware.flops,
                self.hardware.gather(self.model, trained, gpus),
                self.hardware.reduce(trained, gpus),
                len(rows),
            ),
        }


def cuts(model: Model, size: int, budget: int, shared: bool) -> dict[str, Cut]:
    """The ways to cut a step."""
    packed = Cut(size, budget=budget, pair_cost=model.pair, image_cost=model.image)
    more = {"shared": replace(packed, share=True)} if shared else {}
    return {"random": Cut(size), "length": Cut(size), "packed": packed, **more}


def table(rows: list[Row]) -> str:
    """The rows for a terminal; shares in percent."""
    keys = [key for key in rows[0] if key not in ("gpus", "batch", "way")]
    percent = [key for key in keys if key.endswith(("pad", "bare", "left"))]
    units = {**dict.fromkeys(percent, " %"), **dict.fromkeys(("compute", "gather", "reduce", "deal"), " s")}
    heads = [f"{key.replace('_', ' ')}{units.get(key, '')}".rjust(9) for key in keys]
    lines = [f"{'GPUs':>5}{'samples':>9} {'cut':6}  " + "  ".join(heads)]
    for row in rows:
        values = (row[key] * (100 if key in percent else 1) for key in keys)
        shown = (f"{value:.4g}".rjust(len(head)) for value, head in zip(values, heads))
        lines.append(f"{row['gpus']:5}{row['batch']:9} {row['way']:6}  " + "  ".join(shown))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parse(arguments)
    hardware = Hardware(
        1e9 * options.intra, 1e9 * options.inter, 1e-6 * options.latency, 1e12 * options.tflops * options.mfu
    )
    model = llava_7b()
    found: dict[str, list[Row]] = {}
    for kind in options.data:
        count, grouped = options.samples or SAMPLES[kind], options.grouped and kind == "instructions"
        sizes = captions(count) if kind == "captions" else instructions(count, PER_IMAGE if grouped else 1.0)
        mean, longest = float(sizes.lengths.mean()), int(sizes.lengths.max())
        budget = options.micro_batch_tokens or max(longest, math.ceil(options.micro_batch_size * mean))
        if budget < longest:
            sys.exit(f"error: --micro-batch-tokens {budget} is less than the longest sample has, {longest}")
        case = Case(kind, sizes, model, hardware, options.steps, options.micro_batch_size)
        ways = cuts(model, options.micro_batch_size, budget, grouped)
        todo = [(way, cut, gpus) for gpus in options.gpus for way, cut in ways.items()]
        batch = {gpus: options.global_batch or max(128, 16 * gpus) for gpus in options.gpus}
        shown = tqdm(todo, desc=kind, delay=2, disable=None)
        found[kind] = [case.row(way, cut, gpus, batch[gpus]) for way, cut, gpus in shown]
        print(f"{kind}: {mean:.0f} tokens on average, at most {budget:,} a packed micro-batch\n{table(found[kind])}\n")
    print(json.dumps({**vars(options), "weights": model.weights, "trained": model.trained, "rows": found}))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpus", type=int, nargs="+", default=[2**n for n in range(3, 11)], metavar="N", help="default: 8 to 1024")
    add("--data", nargs="+", choices=SAMPLES, default=list(SAMPLES), help="default: both")
    add("--grouped", action="store_true", help="1.95 conversations about a picture; adds the rows `shared`")
    batch = "samples a step (default: 16 a GPU, at least 128; LLaVA's 128 would leave 7 of 8 of 1,024 GPUs without one)"
    add("--global-batch", type=int, metavar="N", help=batch)
    add("--micro-batch-size", type=int, default=16, metavar="N", help="samples, where padded (default: %(default)s)")
    add("--micro-batch-tokens", type=int, metavar="N", help="positions, where packed (default: as many samples' mean)")
    add("--intra", type=float, default=360, metavar="GB/S", help="default: %(default)s, 80 %% of an H100's NVLink")
    add("--inter", type=float, default=40, metavar="GB/S", help="default: %(default)s, 80 %% of 400 Gb/s a GPU")
    add("--latency", type=float, default=2, metavar="US", help="microseconds of a hop (default: %(default)s, assumed)")
    add("--tflops", type=float, default=989, help="peak of a GPU (default: %(default)s, an H100's in bf16)")
    add("--mfu", type=float, default=0.4, help="share of it that is reached (default: %(default)s)")
    add("--steps", type=int, default=4, metavar="N", help="default: %(default)s")
    add("--samples", type=int, metavar="N", help="of a set (default: LLaVA-1.5's 558,128 and 665,298)")
    add("--quick", action="store_true", help="8, 64 and 512 GPUs, two steps: under half a minute")
    options = parser.parse_args(arguments)
    if options.quick:
        options.gpus, options.steps = [8, 64, 512], 2
    numbers = [number for value in vars(options).values() for number in (value if isinstance(value, list) else [value])]
    if any(isinstance(number, int | float) and not isinstance(number, bool) and number <= 0 for number in numbers):
        parser.error("every number must be above 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
