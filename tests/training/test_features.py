"""Training from features that were made before is training with the tower, its features rounded to bf16."""

import json
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionModel

from llava_train import load_recipe, train
from llava_train.cli import main
from llava_train.data.features import PictureBatches
from llava_train.data.micro_batches import MicroBatch
from llava_train.errors import CheckpointError, RecipeError, RecordError
from llava_train.model.families import llava
from llava_train.model.towers.features import image_features
from llava_train.model.tuning import planned_dtypes
from llava_train.training import features
from llava_train.training.engines.base import cast
from llava_train.training.engines.ranks import Ranks
from llava_train.training.features import with_features
from llava_train.training.material import prepare, readers_of
from llava_train.training.objective import Objective
from llava_train.training.setup import build
from tests import tiny
from tests.training.engines.launching import run_jobs
from tests.training.engines.test_engines import assert_same_curve
from tests.training.test_objective import make_records
from tests.training.test_run import StoppedError as Died
from tests.training.test_run import rows_of, stop_after

ALONE = Ranks(0, 1, torch.device("cpu"))
CACHED = ["data.feature_cache=true"]


@pytest.fixture
def calls() -> Iterator[list[int]]:
    """Pictures of each forward pass of a tower, from now on."""
    found: list[int] = []

    def see(module: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        if isinstance(module, CLIPVisionModel) and type(inputs[0]) is torch.Tensor:
            found.append(len(inputs[0]))

    hook = nn.modules.module.register_module_forward_hook(see)
    yield found
    hook.remove()


def losses(folder: Path) -> list[float]:
    return [row.get("loss", row.get("eval/loss")) for row in rows_of(folder)]


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "prepared" / "features").iterdir()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_those_of_the_tower(workplace: Path, precision: str) -> None:
    """Bit for bit, with a set held out of its own, in the precision of the run; the model is left as it was.

    A connector that begins with a linear layer reads bf16 in bf16, so nothing is lost there.
    """
    data = workplace / "data"
    held_out = [{"path": str(make_records(data))}]
    overrides = [f"optimization.precision={precision}", *CACHED]
    recipe = load_recipe(
        tiny.make_recipe(workplace, data__validation=held_out, data__validation_fraction=0.0), overrides
    )
    assembly, prepared = build(recipe), prepare(recipe)
    before = {name: (value.data_ptr(), value.dtype) for name, value in assembly.model.state_dict().items()}
    made = with_features(recipe, prepared, assembly, ALONE)
    assert {name: (value.data_ptr(), value.dtype) for name, value in assembly.model.state_dict().items()} == before
    readers, plain = readers_of(recipe, assembly, made, None), readers_of(recipe, assembly, prepared, None)
    assembly.model.requires_grad_(False)
    loss = Objective(assembly.model)
    cast(loss, planned_dtypes(assembly.model, precision))
    dtype, whole = torch.bfloat16, MicroBatch(tuple(range(16)), (1.0,) * 16)
    for reader, pixels, features_of in zip(readers, plain, (made.train_features, made.validation_features)):
        assert reader.reader is features_of
        pictures = features_of.places
        batches = PictureBatches(reader.prepared, pictures, np.arange(len(pictures)), pixels.reader, 2)
        with torch.autocast("cpu", dtype, enabled=precision == "bf16"):
            expected = [image_features(assembly.model, batches[item]) for item in range(len(batches))]
            tolerance = 1e-6 if precision == "bf16" else 1e-4
            assert float(loss(reader(whole))) == pytest.approx(float(loss(pixels(whole))), rel=tolerance)
        assert len(pictures) in (20, 3)
        assert torch.equal(features_of.store.read(np.arange(len(pictures))), torch.cat(expected).to(dtype))


def test_a_run_is_that_of_rounded_features(workplace: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed, with samples held out and samples of text alone; the second run finds what the first one made.

    Without dropout: where a picture costs less, a step is cut in another way.
    """
    path = tiny.make_recipe(workplace, tune__lora={"dropout": 0})
    once = train(load_recipe(path, [*CACHED, "data.num_workers=1"]))
    assert calls == [2] * 10
    before = stored(workplace)
    again = train(load_recipe(path, [*CACHED, f"output={workplace}/again"]))
    assert calls == [2] * 10
    assert stored(workplace) == before
    assert rows_of(again) == rows_of(once)
    live = train(load_recipe(path, [f"output={workplace}/live"]))
    monkeypatch.setattr(llava, "image_features", lambda *given: image_features(*given).bfloat16().float())
    rounded = train(load_recipe(path, [f"output={workplace}/rounded"]))
    assert losses(once) == pytest.approx(losses(rounded), rel=1e-5)
    assert losses(once) == pytest.approx(losses(live), rel=1e-2)
    assert losses(live) != pytest.approx(losses(rounded), rel=1e-8)


@pytest.mark.parametrize("again", [2, 3])
def test_what_was_made_before_ctrl_c_is_not_made_again(
    workplace: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch, again: int
) -> None:
    """Nor does anything change if another number of pictures goes through the tower at a time."""
    recipe = load_recipe(tiny.make_recipe(workplace), [*CACHED, "data.num_workers=1"])
    given = (prepare(recipe), build(recipe), ALONE)
    with_features(recipe, *given)
    expected = stored(workplace)
    for path in (workplace / "prepared" / "features").iterdir():
        path.unlink()
    calls.clear()

    def interrupted(*inputs: Any) -> torch.Tensor:
        if len(calls) == 6:
            raise KeyboardInterrupt
        return image_features(*inputs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as _held:
        patch.setattr(features, "image_features", interrupted)
        with_features(recipe, *given)
    assert not active_children()
    (note,) = (workplace / "prepared" / "features").glob("*.done")
    assert json.loads(note.read_text())["done"] == [[0, 12]]
    calls.clear()
    with_features(replace(recipe, optimization=replace(recipe.optimization, micro_batch_size=again)), *given)
    assert sum(calls) == 8
    assert stored(workplace).keys() == expected.keys()
    if again == 2:
        assert stored(workplace) == expected


def test_another_tower_layer_or_precision_is_another_file(workplace: Path) -> None:
    capped = [{"path": str(workplace / "data" / "data.json"), "cap": 9}]
    options: list[dict[str, Any]] = [
        {},
        {"optimization__precision": "bf16"},
        {"model__vision_feature_layer": -1},
        {"model__image_aspect_ratio": "square"},
        {"data__train": capped},
        {"data__train": capped, "seed": 6},  # others, but as many
        {"optimization__learning_rate": 0.1, "seed": 4, "model__connector": "linear", "data__max_length": 256},
    ]
    for number, changes in enumerate(options):
        recipe = load_recipe(tiny.make_recipe(workplace, **changes), CACHED)
        with_features(recipe, prepare(recipe), build(recipe), ALONE)
        assert len(stored(workplace)) == 2 * min(number + 1, 6)
    tower = workplace / "vision" / "model.safetensors"
    tensors = load_file(tower)
    tensors["embeddings.class_embedding"] += 1
    save_file(tensors, tower, {"format": "pt"})
    with_features(recipe, prepare(recipe), build(recipe), ALONE)
    assert len(stored(workplace)) == 14


def test_a_run_stays_with_its_features(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], calls: list[int]
) -> None:
    """A resumed run must have them as before; a look at a step reads them, in another precision the tower."""
    path = tiny.make_recipe(workplace, optimization__max_steps=4, checkpoint__save_every=2)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Died):
            train(load_recipe(path, CACHED))
    with pytest.raises(CheckpointError, match=r"data\.feature_cache: was True, is False"):
        train(load_recipe(path))
    calls.clear()
    run = train(load_recipe(path, CACHED))
    (row,) = [row for row in rows_of(run) if row["step"] == 4 and "loss" in row]
    assert main(["replay", str(run), "--step", "4"]) == 0
    assert f"loss {row['loss']:.6g}, gradient norm {row['grad_norm']:.6g}" in capsys.readouterr().err
    assert not calls
    before = stored(workplace)
    assert main(["replay", str(run), "--step", "4", "--precision", "bf16"]) == 0
    assert calls
    assert stored(workplace) == before


def test_no_micro_batch_needs_the_tower(workplace: Path) -> None:
    """Not even one of text alone, where every rank must gather the weights that the others use."""
    model = build(load_recipe(tiny.make_recipe(workplace))).model
    for spread, trained, blank in ((True, False, "features"), (False, True, "features"), (False, False, "nothing")):
        model.model.multi_modal_projector.requires_grad_(trained)
        model.model.vision_tower.requires_grad_(False)
        made = Objective(model, spread, made_features=True)
        assert made.blank == blank
        assert len(made.idle_layers) == 3
        assert len(Objective(model, spread).idle_layers) == 1


def test_a_picture_that_is_gone_is_named(workplace: Path) -> None:
    recipe = load_recipe(tiny.make_recipe(workplace), [*CACHED, "data.num_workers=1"])
    prepare(recipe)
    (workplace / "data" / "10.png").unlink()
    with pytest.raises(RecordError, match=r"data\.json\[10\] \(id r10\): .*10\.png: no such image"):
        train(recipe)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_an_encoder_that_trains_has_no_features_to_keep(workplace: Path, mode: str) -> None:
    with pytest.raises(RecipeError, match=rf"data\.feature_cache: .* tune\.vision\.mode is {mode}"):
        load_recipe(tiny.make_recipe(workplace), [*CACHED, f"tune.vision.mode={mode}"])


@pytest.mark.slow(reason="starts a launcher with two processes")
@pytest.mark.timeout(400)
def test_two_processes_make_and_read_what_one_does(workplace: Path) -> None:
    """Each its share of the pictures; no rank waits for another to gather a tower that neither runs."""
    path = tiny.make_recipe(workplace, tune__lora={"dropout": 0})
    common = [*CACHED, "optimization.max_steps=4", "checkpoint.save_every=0", "monitor.eval_every=2"]
    kinds = ["ddp", "fsdp2", "deepspeed_zero3"]
    jobs = [
        {"recipe": str(path), "overrides": [f"output={workplace}/{kind}", f"engine.kind={kind}", *common]}
        for kind in kinds
    ]
    assert run_jobs(jobs, 2, workplace) == ["done"] * 3
    made = stored(workplace)
    for name in made:
        (workplace / "prepared" / "features" / name).unlink()
    alone = train(load_recipe(path, [*common, f"output={workplace}/alone"]))
    assert stored(workplace) == made
    for kind in kinds:
        assert_same_curve(rows_of(alone), rows_of(workplace / kind))
