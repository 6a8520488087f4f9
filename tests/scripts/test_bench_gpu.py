import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llava_train.model.costs import Costs, Work
from scripts import bench_gpu

from gpu import cases, equality, meter, processes, report, shapes  # isort: skip  (its folder is known by now)

HIDDEN = """
import runpy, sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = ("datasets", "pyarrow", "deepspeed", "torchvision", "trl")
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script as on a machine that has neither of these."""


@pytest.mark.slow(reason="loads torch and transformers anew, trains five times in processes of their own")
def test_the_benchmark_runs_without_a_gpu_and_without_packages_for_data(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "-c", HIDDEN, bench_gpu.__file__, "--shapes", "tiny", "--device", "cpu"]
    only = ["equality", "stage1/ours", "stage1/trainer", "full/ours", "lora/ours+flex", "lora/ours+compile"]
    command += ["--seconds", "0.1", "--minutes", "2", "--out", str(out), "--only", *only]
    made = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    summary = json.loads(made.stdout.strip().splitlines()[-1])
    found = json.loads(out.read_text())["cases"]
    assert set(found) == {"probe", *only}
    assert found["equality"]["verdict"] == "equal" and len(found["equality"]["model"]) == 12
    assert list(summary["failed"]) == ["lora/ours+flex"] and "backward on CPU" in summary["failed"]["lora/ours+flex"]
    for name in ("stage1/ours", "stage1/trainer", "full/ours", "lora/ours+compile"):
        figures = found[name]
        assert figures["status"] == "done", figures["error"]
        assert figures["mfu"] == pytest.approx(figures["needed_tflops"] / found["probe"]["peak_tflops"])
        assert all(5 < loss < 8 for loss in figures["losses"]) and len(figures["losses"]) == 2
    assert found["stage1/ours"]["padding"] == 0 < found["stage1/trainer"]["padding"]
    assert found["stage1/ours"]["settings"]["attention"] == ["blocks"]
    assert found["stage1/ours"]["tflop_per_sample"] == pytest.approx(
        found["stage1/trainer"]["tflop_per_sample"], rel=0.2
    )
    stage1 = summary["stage1"]
    assert stage1["target"] == 0.5 and stage1["met"] is False and stage1["mfu"] == found["stage1/ours"]["mfu"]
    assert stage1["ratio"] == pytest.approx(
        found["stage1/ours"]["needed_tflops"] / found["stage1/trainer"]["needed_tflops"]
    )


def test_utilisation_by_hand() -> None:
    """Two samples of 3 and 5 tokens, one with a picture, 4 supervised positions, in half a second; padded to 10."""
    costs = Costs(token=Work(10.0), pair=2.0, image=Work(100.0), connector=Work(6.0), head=4.0)
    labels = [np.array([-100, -100, 7]), np.array([-100, -100, 7, 7, 7])]
    samples = [shapes.Sample(np.arange(len(each)), each, images) for each, images in zip(labels, (1, 0))]
    modes = {"vision": "frozen", "connector": "full", "llm": "frozen"}
    figures = meter.rates(costs, modes, samples, positions=10, seconds=0.5)
    # Tower: forward alone. Connector: forward, and the gradients of its weights and of its input.
    # Decoder, frozen: linear layers forward and backward, attention forward and twice that backward. Head: the same.
    vision, connector, head = 1 * 100, 1 * 3 * 6, 4 * 2 * 4
    llm = 8 * 2 * 10 + (6 + 15) * 3 * 2
    needed = {
        part: flops / 2e12
        for part, flops in zip(("vision", "connector", "llm", "head"), (vision, connector, llm, head))
    }
    assert figures["tflop_per_sample"] == pytest.approx(needed)
    assert figures["needed_tflops"] == pytest.approx(2 * sum(needed.values()) / 0.5)
    assert figures["samples_per_second"] == 4 and figures["tokens_per_second"] == 16
    assert figures["padding"] == pytest.approx(0.2)
    shares = report.utilisation({"needed_tflops": 395.0}, {"peak_tflops": 790.0, "sheet_tflops": None})
    assert shares == {"mfu": 0.5, "mfu_of_sheet": None}


def test_samples_are_as_long_as_the_published_ones() -> None:
    shape = shapes.SHAPES["7b"]
    first, second = (shapes.counts_of(shapes.make_samples(shape, captions, 2000)) for captions in (True, False))
    assert first.tokens / 2000 == pytest.approx(600, abs=1) and first.supervised / 2000 == pytest.approx(22, abs=0.5)
    assert second.images / 2000 == pytest.approx(0.94, abs=0.02)
    assert second.supervised / second.tokens == pytest.approx(0.19, abs=0.01)
    assert second.tokens / 2000 == pytest.approx(0.94 * 576 + 225, abs=15)
    assert max(len(sample.input_ids) for sample in shapes.make_samples(shape, False, 2000)) <= 2048


def test_what_is_too_much_for_the_memory_is_tried_with_less_and_a_failed_attention_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def run_case(case: cases.Case, run: object, limit: float) -> processes.Outcome:
        tried.append((case.name, case.attention, case.tokens, case.recompute, case.micro or case.layers))
        if case.job == "probe":
            return processes.Outcome("done", {"peak_tflops": 1.0, "sheet_tflops": 2.0, "device": "D", "torch": "T"})
        if case.stage == "stage1" and case.attention == "auto":
            return processes.Outcome("error", error="Traceback ...\nTypeError: no such kernel")
        settings = {"micro_batch_tokens": case.tokens or 4096, "micro_batch": case.micro or 4, "layers": 2}
        settings["layers"] = case.layers or 3
        if case.stage in ("lora", "full"):
            return processes.Outcome("out of memory", {"settings": settings}, "CUDA out of memory")
        return processes.Outcome("error", {"settings": settings}, "ValueError: mine")

    monkeypatch.setattr(processes, "run_case", run_case)
    bench = bench_gpu.Bench(SimpleNamespace(), tmp_path / "out.json", time.monotonic() + 60, time.monotonic())
    named = {case.name: case for case in cases.CASES}
    chosen = ["probe", "stage1/ours", "lora/ours", "lora/trainer", "stage1/ours+compile", "full/ours"]
    assert bench.all([named[name] for name in chosen]) == 0
    assert tried[1:] == [
        ("stage1/ours", "auto", None, "auto", None),
        ("stage1/ours+flex_instead", "flex", None, "auto", None),
        ("lora/ours", "auto", None, "auto", None),
        ("lora/ours", "auto", 2048, "auto", None),
        ("lora/ours", "auto", 2048, "full", None),
        ("lora/trainer", "auto", None, "auto", None),
        ("lora/trainer", "auto", None, "auto", 2),
        ("lora/trainer", "auto", None, "auto", 1),
        ("stage1/ours+compile+flex_instead", "flex", None, "auto", None),
        ("full/ours", "auto", None, "auto", None),
        ("full/ours", "auto", 2048, "auto", None),
        ("full/ours", "auto", 2048, "full", None),
        ("full/ours", "auto", None, "auto", 2),
        ("full/ours", "auto", 2048, "auto", 2),
        ("full/ours", "auto", 2048, "full", 2),
    ]
    failed = json.loads((tmp_path / "out.json").read_text())["summary"]["failed"]
    assert failed["lora/ours"] == "CUDA out of memory" and failed["stage1/ours"] == "TypeError: no such kernel"
    bench.deadline = time.monotonic()
    assert bench.all([named["full/ours"]]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["skipped"] == ["full/ours"]


@pytest.mark.parametrize(("ending", "status"), [("hangs", "cut short"), ("dies", "error"), ("lacks", "out of memory")])
def test_a_case_that_does_not_end_well_leaves_what_it_found(
    monkeypatch: pytest.MonkeyPatch, ending: str, status: str
) -> None:
    def job(case: object, run: SimpleNamespace, send: meter.Send) -> None:
        run.known["costs"] = 7
        send({"steps": 1})
        if ending == "hangs":
            time.sleep(60)
        if ending == "dies":
            os._exit(3)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(processes, "job", lambda case: job)
    run = SimpleNamespace(known={})
    outcome = processes.run_case(cases.CASES[0], run, limit=1.0)
    assert (outcome.status, outcome.figures, run.known) == (status, {"steps": 1}, {"costs": 7})
    assert outcome.error and outcome.seconds < 20


def test_a_wrong_attention_is_named_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is right but for the second stretch, where that has a parent."""

    def unlike(query, key, value, layout, scale, dropout, softcap=None):  # type: ignore[no-untyped-def]
        made = equality.ATTENTIONS["dense"](query, key, value, layout, scale, dropout, softcap)
        child = slice(layout.starts[1], layout.starts[1] + layout.lengths[1])
        if layout.parents[1] >= 0:
            made = made.clone()
            made[:, :, child] = made[:, :, child] * 1.5
        return made

    monkeypatch.setitem(equality.ATTENTIONS._rows, "wrong", unlike)
    found: list[dict] = []
    run = SimpleNamespace(place=torch.device("cpu"))
    equality.check(run, found.append, ["wrong"])
    kernel = found[-1]["kernel"]
    assert not kernel["wrong/float32/apart/8 heads, 2 of keys"]["wrong"]
    assert "stretch 1 of 6 (33 tokens, parent 0" in kernel["wrong/float32/shared/8 heads, 2 of keys"]["wrong"]
    assert "wrong/full/bf16/shared: loss differs" in found[-1]["verdict"]
    assert "apart" not in found[-1]["verdict"]
