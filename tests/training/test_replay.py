"""What stopped a run is found again: the sample, the module, the operation; and nothing of the run is touched."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_train import load_recipe, train
from llava_train.cli import main
from llava_train.data.batch import load_steps
from llava_train.errors import TrainingError
from llava_train.files import read_json, write_json
from llava_train.training import replay, run
from llava_train.training.engines.ranks import Ranks
from llava_train.training.material import course_of, plan_of, prepare, readers_of
from llava_train.training.setup import build
from tests import tiny


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time and bytes."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def failed(recipe: Path) -> str:
    """The message of a run that must fail."""
    with pytest.raises(TrainingError) as stopped:
        train(load_recipe(recipe))
    return str(stopped.value)


def looked(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[list[dict[str, Any]], str]:
    """(rows of stdout, stderr without progress bars) of a replay that ends well."""
    capsys.readouterr()
    assert main(["replay", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err.split("\r")[-1]


def ids(samples: list[str]) -> set[str]:
    assert all(re.fullmatch(r"r\d+ \(.*data\.json\[\d+\]\)", sample) for sample in samples)
    return {sample.split()[0] for sample in samples}


@pytest.fixture
def stopped_setup(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The setups of the runs that a test makes, in memory as the runs left them."""
    made: list[Any] = []
    original = run.set_up

    def kept(*arguments: Any, **named: Any) -> Any:
        made.append(original(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(run, "set_up", kept)
    yield made
    made.clear()


def poisoned(workplace: Path, step: int) -> tuple[Path, str]:
    """A recipe, and the id of the one record of `step` that alone reads a token whose embedding is not a number."""
    llm, data = workplace / "llm", workplace / "data" / "data.json"
    model = AutoModelForCausalLM.from_pretrained(llm)
    model.resize_token_embeddings(512)  # room for <image>: new rows would be drawn around the mean of the old ones
    model.save_pretrained(llm)
    recipe = tiny.make_recipe(workplace, checkpoint__save_every=1)
    loaded = load_recipe(recipe)
    sets = prepare(loaded)
    culprit = sets.train.row(plan_of(loaded, sets).step(step - 1)[0]).id
    records = json.loads(data.read_text())
    record = next(record for record in records if record["id"] == culprit)
    record["conversations"][0]["value"] += " ¶"
    data.write_text(json.dumps(records))
    token = AutoTokenizer.from_pretrained(llm)(" ¶", add_special_tokens=False).input_ids[-1]
    tensors = load_file(llm / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = torch.nan
    save_file(tensors, llm / "model.safetensors", {"format": "pt"})
    return recipe, culprit


def test_one_sample_is_to_blame(workplace: Path, stopped_setup: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    recipe, culprit = poisoned(workplace, step=3)
    message = failed(recipe)
    folder = workplace / "run"
    assert "step 3: the loss is nan; stopped before the update. Samples of rank 0: " in message

    kept = load_file(folder / "checkpoints" / "step-2" / "state-00000-of-00001.safetensors")
    weights = {name: weight.detach() for name, weight in stopped_setup[0].engine.trained.items()}
    assert {key.removesuffix(".weight@0") for key in kept if key.endswith(".weight@0")} == set(weights)
    assert all(torch.equal(kept[f"{name}.weight@0"], weight.flatten()) for name, weight in weights.items())

    before = contents(folder)
    (command,) = re.findall(r"llava-train (replay \S+ --step 3)$", message, re.MULTILINE)
    rows, err = looked(capsys, *shlex.split(command)[1:])
    assert [row["sample"].split()[0] for row in rows if not row["finite"]] == [culprit]
    assert rows[0]["loss"] == rows[0]["grad_norm"] == "nan"
    assert all(0 < row["loss"] < 10 and 0 < row["grad_norm"] < 100 for row in rows[1:])
    blamed = read_json(folder / "failed" / "step-3-rank-0.json")["samples"]
    assert culprit in ids(blamed) <= ids([row["sample"] for row in rows])
    assert "step 3 of 8, from checkpoint step-2 with 0 steps made again (fp32 on cpu): loss nan" in err
    assert "in the run the loss was nan" in err
    module = r": the first module whose output is not finite is model\.language_model\.embed_tokens \(Embedding\)"
    assert re.search(rf"{culprit} \(.*\){module}.* its input: int64 \(1, \d+\) from \d+ to \d+", err)
    assert "32 of its own weights are not finite" in err
    assert contents(folder) == before


def test_a_rate_that_explodes(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step 3 is made again from the beginning, along the very same numbers; every sample is to blame, so none is."""
    changes = {"learning_rate": 1e30, "schedule": "constant"}
    recipe = tiny.make_recipe(
        workplace, checkpoint__save_every=0, **{f"optimization__{k}": v for k, v in changes.items()}
    )
    message = failed(recipe)
    before = contents(workplace / "run")
    rows, err = looked(capsys, workplace / "run")
    (step,) = re.findall(r"^step (\d):", message)
    assert f"step {step} of 8, from the beginning" in err
    assert f"{len(rows)} of {len(rows)} samples are not finite by themselves" in err
    assert "look at the learning rates and weights below rather than at the data" in err
    assert f"learning rates of step {step}: connector 1e+30, llm 0.01" in err
    assert re.search(r"largest weight of connector: \S+e\+30, in model\.multi_modal_projector", err)
    assert contents(workplace / "run") == before
    older = workplace / "run" / "failed" / "step-1-rank-0.json"
    write_json(older, {"step": 1, "rank": 0, "what": "loss", "value": "nan", "samples": []})
    os.utime(older, (1, 1))
    for arguments in ([], ["--step", 7]):  # steps that the run never made: it ends where the run did
        assert f"step {step} of 8, from the beginning" in looked(capsys, workplace / "run", *arguments)[1]


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        (
            1e25,
            r"only its gradient overflows: the largest is \d\S*e\+2\d, of model\S+\.up_proj\.lora_B\.default\.weight",
        ),
        (3e38, r"only its gradient is not finite; \w+Backward\d is first to return nan \(made in forward, .*:\d+\)"),
    ],
)
def test_only_the_gradient_is_not_finite(
    workplace: Path, capsys: pytest.CaptureFixture[str], scale: float, told: str
) -> None:
    """A branch that gives nothing forward and too much backward."""
    file = workplace / "llm" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(scale)
    save_file(tensors, file, {"format": "pt"})
    message = failed(tiny.make_recipe(workplace))
    assert re.match(r"step 1: the gradient norm is (nan|inf); stopped before the update\.", message)
    rows, err = looked(capsys, workplace / "run")
    every = read_json(workplace / "run" / "failed" / "step-1-rank-0.json")["samples"]
    assert ids(every) == ids([row["sample"] for row in rows])
    assert all(row["loss"] < 10 and row["grad_norm"] in ("nan", "inf") for row in rows)
    assert re.search(told, err), err


def test_what_does_not_show_again_is_said(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps made again are those of the run, bit for bit."""
    before = contents(finished)
    rows, err = looked(capsys, finished, "--step", 8)
    (recorded,) = [row for row in run.read_rows(finished / "metrics.jsonl") if row["step"] == 8 and "loss" in row]
    assert len(rows) == recorded["samples"]
    assert sum(row["tokens"] for row in rows) == recorded["tokens"]
    assert f"loss {recorded['loss']:.6g}, gradient norm {recorded['grad_norm']:.6g}" in err
    assert "from checkpoint step-6 with 1 steps made again" in err
    assert "nothing here would stop a run" in err
    assert "made again (bf16 on cpu)" in looked(capsys, finished, "--step", 8, "--precision", "bf16")[1]
    assert contents(finished) == before


def test_a_run_of_several_ranks(finished: Path) -> None:
    """One loader brings what each rank had, rank after rank."""
    recipe = load_recipe(finished / "recipe.yaml")
    assembly, sets = build(recipe), prepare(recipe)
    places = [Ranks(rank, 3, torch.device("cpu")) for rank in range(3)]
    ranks = [course_of(recipe, assembly, sets, None, place, 1).steps for place in places]
    reader, _ = readers_of(recipe, assembly, sets, None)
    steps = load_steps(replay.EveryRank(reader, plan_of(recipe, sets), 0, 3), 3, 0)
    for index in range(7 * 3):
        assert [batch.ids for batch in next(steps)] == [batch.ids for batch in next(ranks[index % 3])]
    assert next(steps, None) is None


def test_what_changed_is_refused_or_allowed(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("max_grad_norm: 1.0", "max_grad_norm: 2.0"))
    assert main(["replay", str(folder), "--step", "8"]) == 2
    assert "optimization.max_grad_norm: was 1.0, is 2.0" in capsys.readouterr().err
    assert "step 8 of 8" in looked(capsys, folder, "--step", 8, "--allow-change", "optimization.max_grad_norm")[1]


def test_what_cannot_be_looked_at(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        assert main(["replay", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "holds no recipe.yaml; name the folder of a run" in refused(tmp_path)
    assert "tells of no failed step; name one with --step N" in refused(finished)
    assert "--step 9: the run has steps 1 to 8" in refused(finished, "--step", 9)
    assert "needs a GPU; look at it with --precision bf16" in refused(finished, "--step", 2, "--precision", "fp16")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without a launcher" in refused(finished, "--step", 2)
    monkeypatch.delenv("WORLD_SIZE")

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(replay, "set_up", full)
    assert main(["replay", str(finished), "--step", "2"]) == 1
    assert "they do not fit; look with --device cpu" in capsys.readouterr().err
