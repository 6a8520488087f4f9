"""What is measured without values is what lies in memory once a model really ran."""

import pytest
import torch

from llava_train.model.memory import Conditions, Kept, measure_kept
from llava_train.model.tuning import planned_dtypes
from llava_train.training.engines.base import cast
from llava_train.training.objective import Objective
from tests.model.measured import SIZES, Live, batch, llava

LENGTHS = [60, 40, 50, 50]


def run_of(model, precision: str) -> Conditions:
    autocast = torch.bfloat16 if precision == "bf16" else None
    return Conditions(planned_dtypes(model, precision), autocast, "cpu", 50)


def estimate(model, kept: Kept, positions: int, supervised: int) -> float:
    """Bytes after a forward pass; of the loss, log-probabilities are kept."""
    per_token = len(model.model.language_model.layers) * kept.layer + kept.rest
    logits = 4 * model.lm_head.weight.shape[0]
    return kept.copies + positions * per_token + len(LENGTHS) * (kept.image + supervised * logits)


def really(model, run: Conditions, supervised: int) -> tuple[int, int]:
    """Bytes alive after a forward pass, and positions of the decoder in it."""
    made = batch(model, LENGTHS, supervised)
    objective = Objective(model).train()
    cast(objective, dict(run.dtypes))
    with Live() as live, torch.autocast("cpu", torch.bfloat16, enabled=run.autocast is not None):
        loss = objective(made)
    assert loss.requires_grad
    return live.now, made.input_ids.numel()


@pytest.mark.parametrize(
    ("llm", "packed", "precision"),
    [
        ("frozen", True, "fp32"),
        ("frozen", False, "bf16"),
        ("lora", True, "fp32"),
        ("lora", True, "bf16"),
        ("full", False, "fp32"),
        ("full", True, "bf16"),
    ],
)
def test_the_measure_is_what_lies_in_memory(llm: str, packed: bool, precision: str) -> None:
    model = llava({"connector": "full", "llm": llm}, packed=packed, dropout=0.1)
    run = run_of(model, precision)
    kept = measure_kept(model, run)
    alive, positions = really(model, run, supervised=5)
    # Padded, the mask of all layers is alive, too, and the samples are not of one length.
    assert estimate(model, kept, positions, 5) == pytest.approx(alive, rel=0.005 if packed else 0.02)


@pytest.mark.parametrize("family", ["qwen3", "gemma", "phi", "phi3"])
def test_other_language_models_are_measured(family: str) -> None:
    model = llava({"connector": "full", "llm": "lora"}, family, text={**SIZES, "num_hidden_layers": 2})
    run = run_of(model, "bf16")
    kept = measure_kept(model, run)
    alive, positions = really(model, run, supervised=5)
    assert estimate(model, kept, positions, 5) == pytest.approx(alive, rel=0.02)


def test_a_tower_that_trains_keeps_its_layers() -> None:
    frozen = llava({"connector": "full"})
    kept = measure_kept(frozen, run_of(frozen, "bf16"))
    assert 0 < kept.image == kept.image_entry
    model = llava({"vision": "full", "connector": "full"})
    run = run_of(model, "bf16")
    kept = measure_kept(model, run)
    alive, positions = really(model, run, supervised=5)
    assert estimate(model, kept, positions, 5) == pytest.approx(alive, rel=0.002)
    assert kept.image_entry < kept.image / 4


def test_a_decoder_whose_path_depends_on_values_is_measured_all_the_same() -> None:
    model = llava({"connector": "full", "llm": "lora"}, dropout=0.1)
    run = run_of(model, "bf16")
    plain = measure_kept(model, run)
    paths = []
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, inputs: paths.append(bool(inputs[0].any()))
    )
    state = torch.get_rng_state()
    measured = measure_kept(model, run)
    assert len(paths) == 4
    assert torch.equal(torch.get_rng_state(), state)
    # It is measured with plain attention, which needs no copy of its blocks.
    assert 0.8 * plain.layer < measured.layer < 1.05 * plain.layer
    assert (measured.copies, measured.image, measured.entry) == (plain.copies, plain.image, plain.entry)


def test_a_model_without_weights_can_be_measured_and_is_left_as_it_was() -> None:
    real = llava({"connector": "full", "llm": "lora"}, dropout=0.1)
    with torch.device("meta"):
        empty = llava({"connector": "full", "llm": "lora"}, dropout=0.1)
    before = {name: weight.clone() for name, weight in real.state_dict().items()}
    config = real.model.language_model.config._attn_implementation
    real.eval()
    state = torch.get_rng_state()
    assert measure_kept(real, run_of(real, "bf16")) == measure_kept(empty, run_of(empty, "bf16"))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in real.modules())
    assert len(real.model.language_model.layers) == SIZES["num_hidden_layers"]
    assert real.model.language_model.config._attn_implementation == config
    assert all(torch.equal(weight, before[name]) for name, weight in real.state_dict().items())
