import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_train import load_recipe, train
from llava_train.data.batch import COUNTS
from llava_train.errors import CheckpointError, LlavaTrainError, RecipeError, StorageError, TrainingError
from llava_train.model.checkpoint import WEIGHTS
from llava_train.training.monitor import CLOCK, read_rows
from tests import tiny

ROW = {"step", "epoch", "loss", "learning_rate", "grad_norm", *COUNTS, *CLOCK}


def rows_of(folder: Path) -> list[dict]:
    """Rows without the wall time, which no run repeats."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_rows(folder / "metrics.jsonl")]


class StoppedError(Exception):
    """A run that dies."""


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, error: Exception | None = None) -> None:
    """Let the process die after a step, before anything else is saved; or end by `error`."""
    from llava_train.training.monitor import Monitor

    original = Monitor.step

    def report(self, row):
        original(self, row)
        if row["step"] == step:
            raise error or StoppedError

    monkeypatch.setattr(Monitor, "step", report)


def test_a_run_folder_holds_what_the_contract_says(finished: Path) -> None:
    rows = read_rows(finished / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert all(set(row) == ROW for row in steps)
    assert [row["step"] for row in rows if "eval/loss" in row] == [4, 8]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [row["samples"] for row in steps[:4]] == [6, 6, 6, 1]
    assert {p.name for p in finished.iterdir()} >= {
        "recipe.yaml",
        "checkpoints",
        "final",
        "best",
        "report.html",
        "loss.png",
    }
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step-6", "step-8"]
    assert load_recipe(finished / "recipe.yaml").output == str(finished)


def test_the_same_seed_gives_the_same_run(workplace: Path, finished: Path) -> None:
    again = train(load_recipe(tiny.make_recipe(workplace)))
    assert rows_of(again) == rows_of(finished)
    assert (again / "final" / WEIGHTS).read_bytes() == (finished / "final" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_workers_changes_nothing(workplace: Path, finished: Path, workers: int) -> None:
    again = train(load_recipe(tiny.make_recipe(workplace), [f"data.num_workers={workers}"]))
    assert rows_of(again) == rows_of(finished)
    assert (again / "final" / WEIGHTS).read_bytes() == (finished / "final" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("died_after", [2, 5, 7])
def test_a_resumed_run_is_the_same_run(
    workplace: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, died_after: int, workers: int
) -> None:
    recipe = load_recipe(tiny.make_recipe(workplace), [f"data.num_workers={workers}"])
    with monkeypatch.context() as patch:
        stop_after(patch, died_after)
        with pytest.raises(StoppedError):
            train(recipe)
    resumed = train(recipe)
    assert rows_of(resumed) == rows_of(finished)
    assert (resumed / "final" / WEIGHTS).read_bytes() == (finished / "final" / WEIGHTS).read_bytes()


def test_a_damaged_checkpoint_is_passed_over(
    workplace: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(tiny.make_recipe(workplace))
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(StoppedError):
            train(recipe)
    path = workplace / "run" / "checkpoints" / "step-6" / "state-00000-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    resumed = train(recipe)
    assert "step-6: passed over: state-00000-of-00001.safetensors does not match" in capsys.readouterr().err
    assert rows_of(resumed) == rows_of(finished)


RATE = "optimization.learning_rate"


def test_another_run_does_not_resume(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.make_recipe(workplace)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(StoppedError):
            train(load_recipe(path))
    with pytest.raises(CheckpointError, match=r"optimization\.learning_rate: was 0\.01, is 0\.02"):
        train(load_recipe(path, ["optimization.learning_rate=0.02"]))
    file = workplace / "data" / "data.json"
    before = file.read_text()
    file.write_text(before.replace("What colour", "Which colour"))
    with pytest.raises(CheckpointError, match=r"data\.train: was"):
        train(load_recipe(path))
    file.write_text(before)
    train(load_recipe(path, ["monitor.eval_every=2", "optimization.learning_rate=0.02"]), allowed=[RATE])
    assert f"resuming although {RATE} was 0.01, is 0.02" in capsys.readouterr().err


def test_another_tokenizer_or_other_weights_do_not_resume(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.make_recipe(workplace)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(StoppedError):
            train(load_recipe(path))
    weights = workplace / "llm" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights\.llm: was '\w+', is '\w+'$"):
        train(load_recipe(path))
    tensors["model.norm.weight"] -= 1
    save_file(tensors, weights, {"format": "pt"})
    file = workplace / "llm" / "tokenizer.json"
    file.write_text(file.read_text().replace('"add_prefix_space":false', '"add_prefix_space":true'))
    file.write_text(file.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    with pytest.raises(CheckpointError, match=r"\n  tokenizer: was '\w+', is '\w+'"):
        train(load_recipe(path))


def test_a_finished_run_is_not_overwritten(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.make_recipe(workplace)
    recipe = load_recipe(path, ["optimization.max_steps=2"])
    run = train(recipe)
    weights = run / "final" / WEIGHTS
    before = weights.stat().st_mtime_ns
    assert train(recipe) == run
    assert "finished at step 2; nothing is left to do" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="holds a finished run of another recipe"):
        train(load_recipe(path, ["optimization.max_steps=3"]))
    assert weights.stat().st_mtime_ns == before
    train(recipe, fresh=True)
    assert weights.stat().st_mtime_ns > before


def test_what_is_not_finite_stops_before_the_update(workplace: Path) -> None:
    recipe = load_recipe(
        tiny.make_recipe(workplace),
        ["optimization.learning_rate=1e30", "tune.llm.learning_rate=1e30", "optimization.schedule=constant"],
    )
    with pytest.raises(
        TrainingError, match=r"step \d: the (loss|gradient norm) is (nan|inf).*r\d+ \(.*data\.json\[\d+\]\)"
    ):
        train(recipe)
    assert not (workplace / "run" / "final").exists()
    steps = [row for row in read_rows(workplace / "run" / "metrics.jsonl") if "loss" in row]
    assert all(abs(row["loss"]) < float("inf") for row in steps)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="Accelerate has fp16 on a GPU only")


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=GPU)])
@pytest.mark.parametrize("overrides", [[], ["speed.recompute=full"], ["tune.vision.mode=full"]])
def test_precisions_and_recompute_train(workplace: Path, precision: str, overrides: list[str]) -> None:
    recipe = load_recipe(tiny.make_recipe(workplace), [f"optimization.precision={precision}", *overrides])
    losses = [row["loss"] for row in rows_of(train(recipe)) if "loss" in row]
    assert losses[-1] < losses[0]


def test_recompute_changes_nothing(workplace: Path, finished: Path) -> None:
    recipe = load_recipe(tiny.make_recipe(workplace), ["speed.recompute=full"])
    losses = [row["loss"] for row in rows_of(train(recipe)) if "loss" in row]
    expected = [row["loss"] for row in rows_of(finished) if "loss" in row]
    assert losses == pytest.approx(expected, rel=1e-5)


def test_two_stages_and_a_third(workplace: Path) -> None:
    first = tiny.make_recipe(workplace)
    stage1 = train(load_recipe(first, ["tune.llm.mode=frozen", "data.template=plain", "optimization.max_steps=3"]))
    assert set(load_file(stage1 / "final" / WEIGHTS)) == {
        *(f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
        "new_rows.embedding",
        "new_rows.head",
    }
    options = [f"init_from={stage1}", "optimization.max_steps=2"]
    stage2 = train(load_recipe(first, [*options, f"output={workplace}/two"]))
    stage3 = train(load_recipe(first, [f"init_from={stage2}", "optimization.max_steps=2", f"output={workplace}/three"]))
    manifest = json.loads((stage3 / "final" / "llava_train.json").read_text())
    assert manifest["history"] == [str(stage1), str(stage2)]
    assert manifest["llm"]["included"]


def test_no_room_is_told_before_the_first_step(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llava_train.files

    usage = shutil.disk_usage(workplace)._replace(free=2_000_000)
    monkeypatch.setattr(llava_train.files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"this run .* needs [\d,]+ bytes, 2,000,000 are free"):
        train(load_recipe(tiny.make_recipe(workplace)))
    assert not (workplace / "run" / "checkpoints").exists()


def test_trackers_write_offline(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = load_recipe(
        tiny.make_recipe(workplace), ["monitor.tensorboard=true", "monitor.wandb=true", "optimization.max_steps=2"]
    )
    folder = train(recipe)
    assert list(folder.rglob("events.out.tfevents*"))
    assert list(folder.rglob("*.wandb"))


def test_a_missing_package_is_a_fault_of_the_request(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.tracking

    def absent(*_: object, **__: object) -> None:
        raise ImportError("No module named 'wandb'")

    monkeypatch.setattr(accelerate.tracking, "WandBTracker", absent)
    with pytest.raises(LlavaTrainError, match=r"pip install 'llava-train\[trackers\]'"):
        train(load_recipe(tiny.make_recipe(workplace), ["monitor.wandb=true"]))
