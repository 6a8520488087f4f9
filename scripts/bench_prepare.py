#!/usr/bin/env python3
"""Time and memory of `prepare` on a made set of LLaVA records, as large as you like.

    python scripts/bench_prepare.py                      # 665,298 records, the size of the LLaVA-1.5 mix
    python scripts/bench_prepare.py --records 20000

The records: nine in ten have a picture (not looked at: `verify: none`); 1 to 8 rounds (1, 1, 2, 3, 5, 8 alike); the
words of a record are lognormal with median 110 and sigma 0.8, a fifth of them in the questions: about 225 tokens with
the 32,000-entry vocabulary of the golden vectors, 801 with 576 image tokens.

Three runs, each in a process of its own: one from nothing (`seconds`, `peak_memory_mb`: the resident memory of all
its processes together, sampled ten times a second), one from nothing that is killed when half of it is there, and the
one that goes on from there (`resumed_seconds`). Prints one JSON last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "tests" / "data" / "golden" / "tokens"
WORDS = """
the of and to in is that it was for on are as with his they at be this from have or by one had not but what
all were when we there can an your which their said if do will each about how up out them then she many some
so these would other into has more her two like him see time could no make than first been its who now people
my made over picture image shows standing wearing background foreground person holding table street building
window colourful several behind visible surrounded indicates atmosphere arrangement possibly kitchen bicycle
umbrella refrigerator
""".split()  # noqa: SIM905


def make_records(path: Path, count: int) -> None:
    """Write `count` records as one JSON list."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as stream:
        stream.write("[")
        for start in tqdm(range(0, count, 1000), desc="records", unit="k", disable=None):
            made = _records(rng, start, min(1000, count - start))
            stream.write(("," if start else "") + ",\n".join(map(json.dumps, made)))
        stream.write("]")


def _records(rng: np.random.Generator, first: int, count: int) -> Iterator[dict[str, Any]]:
    for index in range(first, first + count):
        rounds = int(rng.choice([1, 1, 2, 3, 5, 8]))
        words = max(4 * rounds, round(rng.lognormal(np.log(110), 0.8)))
        ends = np.linspace(0, words, rounds + 1).astype(int)
        text = [WORDS[number] for number in rng.integers(0, len(WORDS), words)]
        turns = []
        for start, end in pairwise(ends):
            middle = start + max(1, (end - start) // 5)
            turns.append({"from": "human", "value": " ".join(text[start:middle]) + "?"})
            turns.append({"from": "gpt", "value": " ".join(text[middle:end]) + "."})
        record: dict[str, Any] = {"id": f"{index:09d}", "conversations": turns}
        if index % 10:
            record["image"] = f"coco/train2017/{index:012d}.jpg"
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        yield record


def prepare_once(data: Path, cache: Path, workers: int) -> None:
    """What a run does; in a process of its own."""
    from transformers import AutoTokenizer

    from llava_train.data.encode import Encoder
    from llava_train.data.pictures.media import Media
    from llava_train.data.preparing.prepare import prepare_set
    from llava_train.data.preparing.source import Source
    from llava_train.data.templates.template import load_template
    from llava_train.model.llm import add_image_token

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    add_image_token(tokenizer)
    encoder = Encoder(tokenizer, load_template("vicuna_v1"), image_tokens=576, max_length=2048)
    source = Source("bench", (str(data),), encoder, Media(data.parent), "llava", verify="none")
    prepared = prepare_set([source], cache, "bench", workers)
    keys = ("samples", "read", "skipped", "mean_length", "longest", "truncated_samples")
    print(json.dumps({key: prepared.info[key] for key in keys}))


def measured(command: list[str], kill_when: Any = None) -> tuple[float, float, str]:
    """Seconds, peak memory in MB of the process and all below it, and what it printed."""
    started, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None:
        peak = max(peak, _memory_mb(process.pid))
        if kill_when is not None and kill_when():
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.1)
    assert process.stdout is not None
    printed = process.stdout.read()
    if process.returncode and kill_when is None:
        sys.exit(f"error: the run ended with status {process.returncode}")
    return time.perf_counter() - started, peak, printed


def _memory_mb(group: int) -> float:
    """Resident memory of every process of a process group; pages that several share are counted in each."""
    total = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[2]) == group:
                    total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
            except (OSError, IndexError):
                continue
    return total / 2**20


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=665_298, metavar="N", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="processes of the pool (default: one a core)")
    parser.add_argument("--folder", type=Path, help="work here and keep what is made (default: a temporary folder)")
    parser.add_argument("--once", nargs=2, type=Path, metavar=("DATA", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.once:
        prepare_once(*options.once, options.workers)
        return 0
    if options.records < 1:
        parser.error("--records must be at least 1")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="bench-prepare-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        print(json.dumps(_bench(options.records, options.workers, folder)))
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def _bench(records: int, workers: int, folder: Path) -> dict[str, Any]:
    data = folder / f"records-{records}.json"
    if not data.exists():
        make_records(data, records)

    def command(cache: Path) -> list[str]:
        return [sys.executable, __file__, "--workers", str(workers), "--once", str(data), str(cache)]

    whole, killed = folder / "whole", folder / "killed"
    shutil.rmtree(whole, ignore_errors=True)
    shutil.rmtree(killed, ignore_errors=True)
    seconds, peak, printed = measured(command(whole))
    pieces = len(list((whole / "pieces").glob("*.arrow")))
    half = lambda: len(list((killed / "pieces").glob("*.arrow"))) >= max(1, pieces // 2)  # noqa: E731
    measured(command(killed), kill_when=half)
    resumed, _, _ = measured(command(killed))
    found, _, _ = measured(command(killed))
    return {
        "records": records,
        "seconds": round(seconds, 1),
        "peak_memory_mb": round(peak),
        "resumed_seconds": round(resumed, 1),
        "found_seconds": round(found, 1),
        "records_per_second": round(records / seconds),
        "data_mb": round(data.stat().st_size / 2**20),
        "prepared_mb": round(sum(file.stat().st_size for file in whole.rglob("*") if file.is_file()) / 2**20),
        **json.loads(printed.strip().splitlines()[-1]),
    }


if __name__ == "__main__":
    sys.exit(main())
