import json
from pathlib import Path

import pytest
import torch

from llava_train import load_recipe
from llava_train.data.batch import BatchReader, ImageReader
from llava_train.data.plan import deal
from llava_train.training.material import prepare
from llava_train.training.objective import Objective
from llava_train.training.setup import build
from scripts import compare_reference
from tests import tiny
from tests.conftest import GOLDEN


def test_the_original_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_reference.main([str(GOLDEN / "llava_reference")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["within_tolerance"]
    assert result["v1"]["records"] == 7


def test_a_disagreement_and_a_wrong_folder_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_reference.main([str(tmp_path)]) == 2
    differences = {"v1": {"record_loss": 2e-6, "batch_loss": 0, "projector_gradient": 0, "llm_gradient_norm": 0}}
    assert not compare_reference.within(differences)


@pytest.fixture(scope="module")
def material(parts: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("objective")
    for name in ("vision", "llm", "data"):
        (folder / name).symlink_to(parts / name)
    recipe = load_recipe(tiny.make_recipe(folder))
    assembly, prepared = build(recipe), prepare(recipe).train
    assembly.model.requires_grad_(False)
    assembly.model.model.multi_modal_projector.requires_grad_(True)
    return assembly, prepared, BatchReader(prepared, ImageReader(assembly.image_processor), 0)


def step_loss(material, rows: list[int], world: int, micro: int, normalization: str) -> tuple[float, torch.Tensor]:
    assembly, prepared, reader = material
    objective = Objective(assembly.model)
    objective.zero_grad()
    dealt = deal(rows, prepared.lengths, prepared.supervised, world, micro, normalization)
    losses = [objective(reader(batch)) for rank in dealt for batch in rank]
    sum(losses).backward()
    gradient = assembly.model.model.multi_modal_projector.linear_1.weight.grad.clone()
    return float(sum(losses).detach()), gradient


@pytest.mark.parametrize("normalization", ["tokens", "samples"])
def test_loss_and_gradients_do_not_depend_on_the_cut(material, normalization: str) -> None:
    rows = list(range(13))
    loss, gradient = step_loss(material, rows, 1, 13, normalization)
    for world, micro in ((1, 1), (2, 3), (5, 2)):
        other, other_gradient = step_loss(material, rows, world, micro, normalization)
        assert other == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(other_gradient, gradient, atol=1e-7, rtol=1e-5)


def test_token_normalization_is_the_stock_loss(material) -> None:
    assembly, prepared, reader = material
    loss, _ = step_loss(material, list(range(8)), 1, 8, "tokens")
    (batches,) = deal(range(8), prepared.lengths, prepared.supervised, 1, 8, "tokens")
    batch = reader(batches[0])
    with torch.no_grad():
        stock = assembly.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=batch.pixel_values,
            labels=batch.labels,
        ).loss
    assert loss == pytest.approx(float(stock), rel=1e-6)


def test_micro_batch_normalization_is_the_mean_of_means(material) -> None:
    rows = list(range(9))
    loss, _ = step_loss(material, rows, 1, 3, "micro_batch")
    _, prepared, _ = material
    (batches,) = deal(rows, prepared.lengths, prepared.supervised, 1, 3, "micro_batch")
    means = [step_loss(material, list(batch.samples), 1, 3, "tokens")[0] for batch in batches]
    assert loss == pytest.approx(sum(means) / len(means), rel=1e-6)


def test_text_alone_gives_the_connector_zero_gradients_not_none(material) -> None:
    _, gradient = step_loss(material, [4, 9], 1, 2, "tokens")
    assert torch.count_nonzero(gradient) == 0
