#!/usr/bin/env python3
"""Kill training at random moments, resume it by the same command, and compare with a run that nobody disturbed.

    python scripts/crash_test.py --kills 200                     # what a release must pass
    python scripts/crash_test.py --kills 20 --stages lora        # one stage
    python scripts/crash_test.py --kills 20 --ranks 2            # two processes a run (gloo)

Each stage (alignment, full tuning, LoRA; 20 steps, a checkpoint every second one) is trained once as the reference.
Then runs of the same recipe get SIGKILL, all processes of a run at once: at any moment between the start of the
process and its end, and often while a checkpoint is being written. After each kill the same command is given again,
without any help, until the run has had its share of kills and ends.

    kills        processes killed while at work
    inside_save  the kill left an unfinished `checkpoints/.step-<n>*.tmp` that this very process had begun
    resumed      the command went on after the newest checkpoint there was; from the start where there was none
    identical    the run ended with the reference's metrics.jsonl (all but `seconds` and `stall`, numbers compared as
                 they are written) and the reference's final and best weights (sha256)
    left_behind  temporary files and folders that are still in the run folders after the runs' end

One JSON comes last on stdout; progress goes to stderr. Exit status 0 when every kill is resumed and identical and at
least a quarter of them are inside a save, else 1.

What trains is forked from this process: see `scripts/forked_training.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava_train.files import sha256_file
from llava_train.training.monitor import CLOCK
from scripts.forked_training import STAGES, STEPS, Training, load_everything, make_recipe

PATIENCE_S = 180
WEIGHTS = ("final/weights.safetensors", "best/weights.safetensors")


@dataclass(frozen=True)
class Reference:
    """The run that nobody disturbed, and how long its parts took (seconds)."""

    rows: list[dict[str, Any]]
    hashes: dict[str, str]
    start_s: float
    total_s: float
    save_s: float


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says but for the wall time, its numbers as they are written."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line, parse_float=str, parse_int=str) for line in lines]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def hashes_of(folder: Path) -> dict[str, str]:
    """sha256 of the weights that a run leaves behind."""
    return {name: sha256_file(folder / name) for name in WEIGHTS}


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint that has its name; 0 where there is none."""
    names = [path.name for path in (folder / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def saves_under_way(folder: Path) -> set[tuple[str, int, int]]:
    """Checkpoints that are being written, or were when their process died: (name, inode, time of change)."""
    found = set()
    with suppress(FileNotFoundError), os.scandir(folder / "checkpoints") as entries:
        for entry in entries:
            if entry.name.startswith(".step-") and entry.name.endswith(".tmp"):
                with suppress(FileNotFoundError):
                    found.add((entry.name, entry.inode(), entry.stat().st_mtime_ns))
    return found


def _wait(training: Training, until: Callable[[], bool]) -> bool:
    """Wait for a moment; False where the training ended before it. Raises TimeoutError."""
    awake, last = 0.0, time.monotonic()
    while not training.over():
        if until():
            return True
        # A test that is suspended for a while finds nobody late when it goes on.
        now = time.monotonic()
        awake, last = awake + min(now - last, 1.0), now
        if awake > PATIENCE_S:
            training.kill()
            raise TimeoutError(f"still at work after {PATIENCE_S} s: killed\n{training.last_words()}")
        time.sleep(0.001)
    return False


@dataclass
class Tester:
    """All kills of a test, and what came of them."""

    recipe: Path
    folder: Path
    ranks: int
    chance: random.Random
    bar: Any
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    training: Training | None = None

    def total(self, key: str) -> int:
        """A count over all stages."""
        return sum(counts[key] for counts in self.counts.values())

    def start(self, output: Path, stage: str, *overrides: str) -> Training:
        """Give the command."""
        arguments = [str(self.recipe), f"output={output}", f"data.cache_dir={output}-data", *STAGES[stage], *overrides]
        self.training = Training(arguments, output.with_name(output.name + ".log"), self.ranks)
        return self.training

    def reference(self, stage: str) -> Reference:
        """Train a stage undisturbed; looked at while it runs to learn when it does what."""
        output = self.folder / f"{stage}-reference"
        started, seen, first_step = time.monotonic(), {}, []

        def look() -> bool:
            now = time.monotonic()
            for name, *_ in saves_under_way(output):
                seen.setdefault(name, [now, now])[1] = now
            if not first_step and (output / "metrics.jsonl").is_file():
                first_step.append(now - started)
            return False

        training = self.start(output, stage)
        _wait(training, look)
        if training.status or newest_step(output) != STEPS:
            raise RuntimeError(f"{stage}: the reference run failed (status {training.status})\n{training.last_words()}")
        save_s = median(last - first for first, last in seen.values())
        total_s = time.monotonic() - started
        return Reference(rows_of(output), hashes_of(output), first_step[0], total_s, save_s)

    def disturbed_run(self, number: int, stage: str, reference: Reference, share: int) -> None:
        """One run with up to `share` kills, resumed each time, compared at its end."""
        counts = self.counts.setdefault(stage, {"kills": 0, "inside_save": 0, "resumed": 0, "identical": 0})
        output = self.folder / f"{stage}-{number}"
        # Workers, and checkpoints that are removed, are more that a kill can hit.
        overrides = [f"data.num_workers={number % 2 * 2}", f"checkpoint.keep_last={2 if number // 2 % 2 else 100}"]
        kills = unanswered = 0
        try:
            killed = True
            while killed:
                before, newest = saves_under_way(output), newest_step(output)
                expected = STEPS if (output / "final").is_dir() else newest
                training = self.start(output, stage, *overrides)
                killed = kills < share and self._kill(training, output, reference, before, newest)
                if not killed:
                    _wait(training, lambda: False)
                    _require(training.status == 0, training, f"status {training.status}")
                if training.said() is not None or not killed:
                    _require((training.said() or 0) == expected, training, f"does not go on after step {expected}")
                    counts["resumed"] += unanswered
                    unanswered = 0
                kills, unanswered = kills + killed, unanswered + killed
                counts["kills"] += killed
                counts["inside_save"] += killed and bool(saves_under_way(output) - before)
                self._show()
            self._compare(output, reference)
            counts["identical"] += kills
            self.left_behind += [path.name for path in output.rglob("*") if path.suffix == ".tmp"]
            shutil.rmtree(output)
        except (AssertionError, TimeoutError, OSError, ValueError) as error:
            self.failures.append(f"{output.name}, {kills} kills: {error}")
        self._show()

    def _kill(self, training: Training, output: Path, reference: Reference, before: set[Any], newest: int) -> bool:
        """Wait for the next kill's moment and kill; False where the run ended before it."""
        if self.total("inside_save") > 0.4 * self.total("kills"):
            rest_s = (reference.total_s - reference.start_s) * (1 - newest / STEPS)
            moment = time.monotonic() + self.chance.uniform(0, reference.start_s + rest_s)
            return _wait(training, lambda: time.monotonic() >= moment) and training.kill()
        seen: set[str] = set()
        which = self.chance.randint(1, 3)  # the first save of this process, or one soon after

        def begun() -> bool:
            seen.update(name for name, *_ in saves_under_way(output) - before)
            return len(seen) >= which

        if not _wait(training, begun):
            return False
        time.sleep(self.chance.uniform(0, reference.save_s))
        return training.kill()

    @staticmethod
    def _compare(output: Path, reference: Reference) -> None:
        """Raise AssertionError where a run differs from the reference."""
        rows = rows_of(output)
        for number, (row, expected) in enumerate(zip(rows, reference.rows), 1):
            if row != expected:
                raise AssertionError(f"metrics.jsonl:{number}: {row}, not {expected}")
        if len(rows) != len(reference.rows):
            raise AssertionError(f"metrics.jsonl: {len(rows)} rows, not {len(reference.rows)}")
        for name, digest in hashes_of(output).items():
            if digest != reference.hashes[name]:
                raise AssertionError(f"{name}: other weights than the reference's")

    def _show(self) -> None:
        self.bar.n = self.total("kills")
        keys = ("inside_save", "resumed", "identical")
        self.bar.set_postfix({key: self.total(key) for key in keys} | {"failures": len(self.failures)})


def _require(true: bool, training: Training, fault: str) -> None:
    if not true:
        raise AssertionError(f"{fault}\n{training.last_words()}")


def crash_test(tester: Tester, stages: list[str], kills: int) -> None:
    """Disturb runs of the stages in turn until there have been `kills` kills."""
    references = {stage: tester.reference(stage) for stage in stages}
    number = unharmed = 0
    while (left := kills - tester.total("kills")) > 0 and len(tester.failures) < 5:
        stage = stages[number % len(stages)]
        tester.disturbed_run(number // len(stages), stage, references[stage], min(left, tester.chance.randint(4, 12)))
        number += 1
        unharmed = unharmed + 1 if kills - tester.total("kills") == left else 0
        if unharmed == 5:  # e.g. because no save is ever seen under way
            tester.failures.append("five runs one after the other ended before the moment of their first kill")
            return


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="over all stages (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, as far as time repeats (default: 0)")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of %(default)s")
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2), help="processes a run (default: 1)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work here; failed runs and logs stay for a look")
    options = parser.parse_args(arguments)
    stages = options.stages.split(",")
    if options.kills < 1 or not set(stages) <= set(STAGES):
        parser.error(f"--kills must be at least 1, --stages some of {','.join(STAGES)}")
    started = time.monotonic()
    load_everything()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="crash-test-"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tester = None
    try:
        recipe = make_recipe(folder)
        with tqdm(total=options.kills, desc="kills", unit="kill", file=sys.stderr, dynamic_ncols=True) as bar:
            tester = Tester(recipe, folder, options.ranks, random.Random(options.seed), bar)
            crash_test(tester, stages, options.kills)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        if tester and tester.training:
            tester.training.kill()
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    for failure in tester.failures:
        print(f"failed: {failure}", file=sys.stderr)
    keys = ("kills", "inside_save", "resumed", "identical")
    figures = {key: tester.total(key) for key in keys}
    seconds = round(time.monotonic() - started, 1)
    more = {"left_behind": len(tester.left_behind), "ranks": options.ranks, "seed": options.seed}
    more |= {"stages": tester.counts, "seconds": seconds}
    print(json.dumps({**figures, **more, "failures": tester.failures}))
    whole = figures["kills"] == figures["resumed"] == figures["identical"] >= options.kills
    return 0 if whole and 4 * figures["inside_save"] >= figures["kills"] and not tester.failures else 1


if __name__ == "__main__":
    sys.exit(main())
