"""The loss and its gradients are the same whatever way a step takes through the model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_train import load_recipe
from llava_train.data.batch import BatchReader, ImageReader
from llava_train.data.collate import pad
from llava_train.data.micro_batches import Cut, deal
from llava_train.inference import shape_of
from llava_train.model.attention import ATTENTIONS, NAME, use_packed_attention
from llava_train.training import objective as room
from llava_train.training.material import prepare
from llava_train.training.objective import Objective
from llava_train.training.setup import build
from scripts import compare_reference
from tests import tiny
from tests.conftest import GOLDEN

NORMALIZATIONS = ["tokens", "samples", "micro_batch"]
HERE = [name for name in ATTENTIONS if name not in ("flex", "varlen")]
"""Attentions that give gradients on a CPU; the others are held to these in tests/model/test_attention.py."""


def test_the_original_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_reference.main([str(GOLDEN / "llava_reference")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["within_tolerance"]
    assert result["v1"]["records"] == result["v1_packed"]["records"] == 7


def test_a_disagreement_and_a_wrong_folder_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_reference.main([str(tmp_path)]) == 2
    differences = {"v1": {"record_loss": 2e-6, "batch_loss": 0, "projector_gradient": 0, "llm_gradient_norm": 0}}
    assert not compare_reference.within(differences)


def make_records(folder: Path) -> Path:
    """Several conversations about each of three pictures, some with two pictures, some of text alone."""
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (30, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{index}.png")
    records = []
    for index in range(16):
        turns = [
            {"from": "human", "value": f"<image>\nWhat colour is {'it ' * index}?"},
            {"from": "gpt", "value": "red"},
        ]
        if index % 3 == 1:
            turns += [{"from": "human", "value": "Is it blue?"}, {"from": "gpt", "value": "no " * (index + 1)}]
        record = {"id": f"s{index}", "image": f"p{index % 3}.png", "conversations": turns}
        if index % 5 == 4:
            record["image"] = [record["image"], "p0.png"]
            turns[0]["value"] = "<image>\n<image>\nWhich one?"
        if index % 8 == 7:
            record = {"id": f"s{index}", "conversations": [{"from": "human", "value": "Say it."}, turns[1]]}
        records.append(record)
    (folder / "several.json").write_text(json.dumps(records))
    return folder / "several.json"


@pytest.fixture(scope="module")
def material(parts: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("objective")
    for name in ("vision", "llm"):
        (folder / name).symlink_to(parts / name)
    (folder / "data").mkdir()
    data = [{"path": str(make_records(folder / "data"))}]
    recipe = load_recipe(tiny.make_recipe(folder, data__train=data, data__validation_fraction=0.0))
    assembly, prepared = build(recipe), prepare(recipe).train
    return assembly, prepared, ImageReader(shape_of(assembly.spec, assembly.image_processor))


def step(material, rows: list[int], cut: Cut, world: int = 1, attention: str = "auto"):
    """The step's loss, and the gradients of connector, embeddings and all of the decoder."""
    assembly, prepared, images = material
    language_model = assembly.model.model.language_model
    language_model.config._attn_implementation = "sdpa"
    if cut.budget is not None:
        use_packed_attention(language_model)
    objective = Objective(assembly.model, attention=attention)
    objective.zero_grad()
    reader = BatchReader(prepared, images, 0, cut)
    losses = [objective(reader(batch)) for rank in deal(rows, prepared.sizes, world, cut) for batch in rank]
    sum(losses).backward()
    trained = {n: p.grad.clone() for n, p in assembly.model.named_parameters() if p.grad is not None}
    return float(sum(losses).detach()), trained


def assert_same(one, other) -> None:
    """Losses to 1e-6, gradients to 1e-6 of the largest of their weight."""
    assert other[0] == pytest.approx(one[0], rel=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(other[1][name], gradient, atol=max(1e-6 * scale, 1e-9), rtol=1e-5, msg=name)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("attention", HERE)
def test_packed_is_padded(material, normalization, share: bool, attention: str) -> None:
    rows = list(range(16))
    expected = step(material, rows, Cut(4, normalization), world=2)
    for world, budget in ((2, 300), (2, 120)):
        made = step(material, rows, Cut(4, normalization, budget, share), world, attention)
        assert_same(expected, made)


@pytest.mark.parametrize("normalization", ["tokens", "samples"])
def test_loss_and_gradients_do_not_depend_on_the_cut(material, normalization) -> None:
    rows = list(range(13))
    expected = step(material, rows, Cut(13, normalization))
    for world, cut in ((1, Cut(1, normalization)), (2, Cut(3, normalization)), (5, Cut(2, normalization, 200, True))):
        assert_same(expected, step(material, rows, cut, world))


def test_a_shared_picture_is_encoded_once(material) -> None:
    _, prepared, images = material
    rows = [0, 3, 6, 1, 13]  # three about one picture, two about another
    share, plain = (Cut(8, "tokens", 1000, share) for share in (True, False))
    (once,), (each,) = (deal(rows, prepared.sizes, 1, cut)[0] for cut in (share, plain))
    shared, alone = BatchReader(prepared, images, 0, share)(once), BatchReader(prepared, images, 0, plain)(each)
    assert (len(shared.pixel_values), len(alone.pixel_values)) == (2, 5)
    saved = sum(int(prepared.sizes.prefixes[row]) for row in (3, 6, 13))
    assert alone.counts["positions"] - shared.counts["positions"] == saved > 0
    assert shared.counts["tokens"] == alone.counts["tokens"] == alone.counts["positions"]


def test_logits_made_part_by_part_are_the_same(material, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step(material, list(range(8)), Cut(8))
    vocabulary = material[0].model.lm_head.weight.shape[0]
    monkeypatch.setattr(room, "LOGITS_BYTES", 5 * 4 * vocabulary)
    assert_same(expected, step(material, list(range(8)), Cut(8)))


@pytest.mark.parametrize("family", tiny.LLMS)
def test_every_language_model_reads_packed_rows(material, family: str, tmp_path: Path) -> None:
    """Not the fixture's model: a text-only batch through another decoder, alone and packed."""
    _, prepared, _ = material
    model_class, config_class, sizes = tiny.LLMS[family]
    torch.manual_seed(0)
    llm = model_class(config_class(vocab_size=450, **sizes, pad_token_id=0))
    rows = [prepared.row(sample) for sample in (2, 7, 15)]
    grid = pad(rows, [1.0] * 3, 0)
    layout = room.Layout(tuple(len(row.input_ids) for row in rows), (-1, -1, -1), torch.device("cpu"))
    alone = llm(torch.from_numpy(grid.input_ids), attention_mask=torch.from_numpy(grid.attention_mask)).logits
    use_packed_attention(llm.get_decoder())
    assert llm.config._attn_implementation == NAME
    ids = torch.cat([torch.from_numpy(row.input_ids) for row in rows])[None]
    places = torch.cat([torch.arange(length) for length in layout.lengths])[None]
    packed = llm(ids, position_ids=places, layout=layout).logits[0].split(layout.lengths)
    for number, part in enumerate(packed):
        torch.testing.assert_close(part, alone[number, : len(part)], atol=2e-6, rtol=1e-5)


def test_token_normalization_is_the_stock_loss(material) -> None:
    assembly, prepared, images = material
    loss, _ = step(material, list(range(8)), Cut(8))
    (batches,) = deal(range(8), prepared.sizes, 1, Cut(8))
    batch = BatchReader(prepared, images, 0, Cut(8))(batches[0])
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.predictors + 1] = batch.targets
    with torch.no_grad():
        stock = assembly.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=batch.pixel_values,
            labels=labels,
        ).loss
    assert loss == pytest.approx(float(stock), rel=1e-6)


def test_micro_batch_normalization_is_the_mean_of_means(material) -> None:
    _, prepared, _ = material
    rows, cut = list(range(9)), Cut(3, "micro_batch")
    (batches,) = deal(rows, prepared.sizes, 1, cut)
    means = [step(material, list(batch.samples), Cut(3))[0] for batch in batches]
    assert step(material, rows, cut)[0] == pytest.approx(sum(means) / len(means), rel=1e-6)


@pytest.mark.parametrize("trained", ["features", "pixels", "nothing"])
def test_text_alone_gives_zero_gradients_not_none(material, trained: str) -> None:
    """And runs the tower only where its gradients or weights are waited for."""
    assembly, _, _ = material
    model = assembly.model.model
    model.vision_tower.requires_grad_(trained == "pixels")
    model.multi_modal_projector.requires_grad_(trained != "nothing")
    looked: list[int] = []
    hook = model.vision_tower.register_forward_hook(lambda *_: looked.append(1))
    try:
        assert Objective(assembly.model).blank == trained
        _, gradients = step(material, [7, 15], Cut(2, budget=300))
    finally:
        hook.remove()
        assembly.model.requires_grad_(True)
    assert bool(looked) == (trained == "pixels")
    connector = [grad for name, grad in gradients.items() if "projector" in name]
    assert len(connector) == (0 if trained == "nothing" else 4)
    assert not any(torch.count_nonzero(grad) for grad in connector)
