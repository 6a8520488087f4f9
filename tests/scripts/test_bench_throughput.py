"""The benchmark against other trainers, on the demo's backbones and a handful of records."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import REPOSITORY

SIZES = {"records": 8, "step": 4, "micro": 2, "equal": 4, "repeat": 1, "threads": 1}
TINY = ["--model", "demo", "--data", "instructions", *(f"--{key}={value}" for key, value in SIZES.items())]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Namespace]:
    """The modules of the benchmark; what they change of this process is put back."""
    monkeypatch.setattr(sys, "path", [str(REPOSITORY / "scripts"), *sys.path])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "1" if name != "TRANSFORMERS_VERBOSITY" else "error")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    import bench_throughput
    from throughput import measure, models, peers, records, report, sharing

    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    yield Namespace(
        main=bench_throughput.main,
        measure=measure,
        models=models,
        peers=peers,
        records=records,
        report=report,
        sharing=sharing,
    )
    torch.set_num_threads(threads)
    torch.random.set_rng_state(state)


def _options(bench: Namespace, folder: Path) -> object:
    numbers = {"repeat": 1, "count": 4, "warmup": 1, "per_image": 2, "equal": 4, "threads": 1, "workers": 0}
    return bench.measure.Options(folder=folder, dtype="fp32", step=4, micro=2, **numbers)


@pytest.mark.slow(reason="two trainings in processes of their own, which load the libraries anew")
def test_it_ends_with_its_figures(bench: Namespace, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert bench.main([*TINY, "--sides", "ours_grouped", "trainer", "--folder", str(tmp_path), "--out", str(out)]) == 0
    figures = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    measured = {"ratio_trainer", "memory_ratio", "loss_difference", "tokens_saved", "seconds"}
    empty = {"ratio_trainer_grouped", "ratio_trl", "ratio_trainer_captions", "ratio_trainer_proportioned"}
    assert measured | empty <= set(figures)
    assert all(figures[key] is None for key in empty)
    assert figures["loss_difference"] < 1e-4
    assert figures["ratio_trainer"] > 0
    assert 0.2 < figures["memory_ratio"] < 5
    everything = json.loads(out.read_text())
    rows = {row["side"]: row for row in everything["medians"]}
    assert rows["trainer"]["peak_mb"] > 100
    ratio = rows["ours_grouped"]["samples_per_second"] / rows["trainer"]["samples_per_second"]
    assert ratio == pytest.approx(figures["ratio_trainer"], rel=0.01)


def test_other_losses_stop_it(
    bench: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.peers, "IGNORE", 7)  # padding is learned, too
    assert bench.main([*TINY, "--sides", "ours", "trainer", "--folder", str(tmp_path)]) == 1
    told = capfd.readouterr()
    assert "losses differ by more than 0.001, so nothing is timed" in told.err
    assert "samples/s" not in told.out + told.err


def test_trl_has_the_same_losses(bench: Namespace, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is a peer of the benchmark alone; pip install -c constraints.txt trl")
    (*differences,) = bench.measure.Bench("demo", _options(bench, tmp_path)).prepare("captions", ["trl"])
    assert len(differences) == 3
    assert max(differences) < 1e-4


def test_sets_are_of_the_asked_lengths_and_pictures(bench: Namespace, tmp_path: Path) -> None:
    shape = bench.models.SHAPES["proportioned"]
    assert np.mean(bench.records.lengths("instructions", 64, shape)) == pytest.approx(shape.text, rel=0.05)
    made = bench.records.make_set(tmp_path, "instructions", 32, shape, ["red", "blue"], per_image=2)
    shown = [record["image"] for record in made if "image" in record]
    assert (len(made), len(shown), len(set(shown))) == (32, 30, 15)
    assert all((tmp_path / name).is_file() for name in shown)
    words = [sum(len(turn["value"].split()) for turn in record["conversations"]) for record in made]
    assert 0.7 * shape.text < np.mean(words) < shape.text
    few = bench.records.one_step(made, 5)
    assert [record.get("image") is None for record in few] == [True, False, False, False, False]
    assert few[1]["image"] == few[2]["image"]


def test_ratios_are_medians_over_turns(bench: Namespace) -> None:
    def timing(side: str, turn: int, rate: float) -> object:
        return bench.measure.Timing("30m", "instructions", side, turn, rate, 100.0, "")

    pairs = [(4.0, 2.0), (3.0, 1.0), (8.0, 1.0)]
    timings = [timing(*each) for n, (a, b) in enumerate(pairs) for each in (("ours_grouped", n, a), ("trainer", n, b))]
    figures = bench.report.summary(timings, ["30m", "demo"])
    assert figures["ratio_trainer"] == 3.0
    assert figures["memory_ratio"] == 1.0
    assert figures["ratio_trl"] is None
    assert figures["ratio_trainer_demo"] is None
    assert "4.00" in bench.report.table(bench.report.medians(timings))


def test_tokens_saved_is_what_pairs_share(bench: Namespace) -> None:
    text = np.full(1000, 100)
    assert bench.sharing.tokens_saved(text, np.arange(1000), shared=300) == pytest.approx(1.0)
    pairs = bench.sharing.tokens_saved(text, np.arange(1000) // 2, shared=300)
    assert pairs == pytest.approx(800 / 500, rel=0.02)
