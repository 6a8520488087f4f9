#!/usr/bin/env python3
"""Memory of each rank while a model is loaded, spread and trained for two steps, on a language model of random weights.

    torchrun --standalone --nproc_per_node 2 scripts/measure_memory.py --engine deepspeed_zero3 --folder runs/memory

Prints one JSON a rank: peaks of its own memory in GB, until the first step and after, and of that together with what a
file backs and can be dropped. ZeRO-3 keeps gathered what `stage3_max_live_parameters` allows (a billion by default).
The model is made in --folder by rank 0 if it is not there (2 bytes a weight); nothing else is written elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

STAGES = {
    "stage1": ["tune.llm.mode=frozen"],
    "lora": ["tune.llm.mode=lora"],
    "full": ["tune.llm.mode=full"],
}


def main(arguments: list[str] | None = None) -> int:
    """Measure; returns the exit status."""
    options = _parser().parse_args(arguments)
    folder, rank = Path(options.folder), int(os.environ.get("RANK", "0"))
    ready = folder / f"model-{options.layers}.done"
    if rank == 0 and not ready.exists():
        _make(folder, options.layers)
        ready.touch()
    while not ready.exists():
        time.sleep(1)
    import llava_train.training.run as run_module
    from llava_train import load_recipe, train
    from llava_train.training.engines.ranks import leave_ranks

    overrides = [f"output={folder}/run", f"engine.kind={options.engine}", f"engine.offload={options.offload}"]
    overrides += [
        f"optimization.precision={options.precision}",
        "optimization.max_steps=2",
        "data.template=plain",
        "checkpoint.save_every=0",
    ]
    overrides += ["optimization.global_batch_size=2", "optimization.micro_batch_size=1", "data.validation_fraction=0"]
    recipe = load_recipe(folder / "recipe.yaml", [*overrides, *STAGES[options.stage], *options.overrides])
    with Sampler() as sampler:
        run_module.run_loop = sampler.training(run_module.run_loop)
        train(recipe, fresh=True)
    width = 2 if options.precision == "fp32" else 1  # the files are bf16
    size = width * sum(path.stat().st_size for path in (folder / "llm").glob("*.safetensors"))
    figures = {"engine": options.engine, "stage": options.stage, "rank": rank, "weights_gb": round(size / 1e9, 2)}
    print(json.dumps({**figures, **sampler.peaks}), flush=True)
    leave_ranks()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="deepspeed_zero3", help="engine.kind (default: %(default)s)")
    parser.add_argument("--offload", default="none", help="engine.offload (default: %(default)s)")
    parser.add_argument("--stage", choices=STAGES, default="stage1", help="what trains (default: %(default)s)")
    parser.add_argument("--precision", default="fp32", help="of the run; bf16 is slow on a CPU (default: %(default)s)")
    parser.add_argument("--folder", required=True, help="where the model, its data and the run lie")
    parser.add_argument("--layers", type=int, default=18, help="layers of the LLM, 51M weights each (default: 1B)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="more of the recipe")
    return parser


class Sampler:
    """Peaks of this process's memory while the body runs, looked at twenty times a second."""

    def __enter__(self) -> Sampler:
        self.peaks = {"loading_gb": 0.0, "training_gb": 0.0, "with_files_gb": 0.0}
        self._phase = "loading_gb"
        self._over = threading.Event()
        self._start = _memory()["RssAnon"]
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def training(self, loop: Callable[..., None]) -> Callable[..., None]:
        """`loop`, which begins the second phase."""

        def marked(*arguments: Any) -> None:
            self._phase = "training_gb"
            loop(*arguments)

        return marked

    def _sample(self) -> None:
        while not self._over.wait(0.05):
            now = _memory()
            own = now["RssAnon"] - self._start
            for key, value in ((self._phase, own), ("with_files_gb", own + now["RssFile"])):
                self.peaks[key] = max(self.peaks[key], round(value / 1e6, 2))

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        import torch

        if torch.cuda.is_available():
            self.peaks["device_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)


def _memory() -> dict[str, int]:
    """Resident kB by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}


def _make(folder: Path, layers: int) -> None:
    """A Llama of `layers` layers of width 2,048 in bf16, in files of 500 MB, with the tests' tower and data."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tests import tiny

    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "llm", ignore_errors=True)
    tiny.make_recipe(folder)
    (folder / "llm" / "model.safetensors").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder / "llm", max_shard_size="500MB")
    torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    sys.exit(main())
