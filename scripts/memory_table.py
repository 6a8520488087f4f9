#!/usr/bin/env python3
"""What LLaVA-1.5 asks of a GPU's memory, by estimate, for docs/performance.md: `python scripts/memory_table.py`.

The same estimate by which `speed.recompute: auto` decides, on models of no values: bf16 training of the 7B and 13B
shapes, a micro-batch of 16,384 positions in stage 1 and 12,800 in stage 2. Kernels are taken to keep what those of a
CPU keep.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_train.model.attention import use_packed_attention
from llava_train.model.memory import Conditions, measure_kept
from llava_train.model.tuning import apply_tuning, planned_dtypes
from llava_train.recipe import LoraSettings, PartTuning, TuneSettings
from llava_train.training.objective import LOGITS_BYTES
from llava_train.training.recompute import Memory, MicroBatch, Spread, plan_memory, resident_bytes

CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
LLMS = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
STAGES = {
    "stage 1": (TuneSettings(), MicroBatch(16_384, 28, 1024), 600),
    "stage 2, LoRA": (TuneSettings(llm=PartTuning("lora"), lora=LoraSettings()), MicroBatch(12_800, 16, 2048), 800),
    "stage 2, full": (TuneSettings(llm=PartTuning("full")), MicroBatch(12_800, 16, 2048), 800),
}
"""Stage -> what trains, its micro-batch, tokens of a sample."""
GB = 1e9


def model_of(llm: str) -> LlavaForConditionalGeneration:
    """The shapes of LLaVA-1.5, without values."""
    vision, text = CLIPVisionConfig(**CLIP_L, image_size=336, patch_size=14), LlamaConfig(**LLMS[llm])
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).to(torch.bfloat16)
    use_packed_attention(model.model.language_model)
    return model


def rows(llm: str, stage: str) -> Iterator[tuple[str, Memory, int]]:
    """(how weights are spread, estimate, GB of the device) for each arrangement."""
    tune, batch, length = STAGES[stage]
    model = model_of(llm)
    apply_tuning(model, tune, 0)
    planned = planned_dtypes(model, "bf16")
    whole = dict.fromkeys(planned, torch.bfloat16)
    kept = {
        name: measure_kept(model, Conditions(dtypes, cast, "cpu", length))
        for name, dtypes, cast in (("DDP", planned, torch.bfloat16), ("spread", whole, None))
    }
    logits = min(batch.supervised, LOGITS_BYTES // (4 * model.lm_head.out_features))
    batch = MicroBatch(batch.tokens, batch.images, logits)
    for name, kind, dtypes, spread in (
        ("DDP, or one GPU", "DDP", planned, Spread()),
        ("ZeRO-2 over 8", "spread", whole, Spread(gradients=8, optimizer=8)),
        ("ZeRO-3 over 8", "spread", whole, Spread(8, 8, 8)),
        ("FSDP2 over 8", "spread", planned, Spread(8, 8, 8)),
    ):
        for size in (80, 141):
            layers = len(model.model.language_model.layers)
            resident = resident_bytes(model, dtypes, spread)
            yield name, plan_memory("auto", kept[kind], layers, batch, resident, size * GB), size


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", nargs="+", choices=LLMS, default=list(LLMS), help="default: both")
    options = parser.parse_args(arguments)
    print("| model | what trains | spread | weights | gradients, optimizer | of 80 GB | of 141 GB |")
    print("|---|---|---|---|---|---|---|")
    cases = [(llm, stage) for llm in options.llm for stage in STAGES]
    for llm, stage in tqdm(cases, "estimates", file=sys.stderr, dynamic_ncols=True):
        found = list(rows(llm, stage))
        for (spread, small, _), (_, large, _) in zip(found[::2], found[1::2]):
            sizes = f"{small.weights / GB:.1f} GB | {small.states / GB:.1f} GB"
            print(f"| {llm} | {stage} | {spread} | {sizes} | {said(small)} | {said(large)} |", flush=True)
    return 0


def said(memory: Memory) -> str:
    """Layers that are recomputed, and all bytes then."""
    needed = memory.weights + memory.states + memory.activations
    if needed > 0.9 * memory.total:
        return f"no: {needed / GB:.0f} GB"
    recomputed = f"{memory.recomputed} of {memory.layers} recomputed" if memory.recomputed else "none recomputed"
    return f"{recomputed}, {needed / GB:.0f} GB"


if __name__ == "__main__":
    sys.exit(main())
