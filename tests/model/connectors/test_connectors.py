"""What holds for every row of the registry."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_train import load_model
from llava_train.errors import RecipeError
from llava_train.model.checkpoint import save_model
from llava_train.model.connectors import (
    CONNECTORS,
    connector_class,
    connector_grid,
    connector_tokens,
    initialise_connector,
    lasting_options,
)
from llava_train.model.costs import costs_of
from llava_train.training.objective import Objective
from tests.model.connectors import cases
from tests.model.connectors.cases import CASES, assembly_with, every_case, fresh, inputs
from tests.model.measured import batch, llava


@every_case
def test_every_weight_gets_a_gradient(name: str, options) -> None:
    connector = fresh(name, options)
    given = inputs(connector)
    given[0].requires_grad_()
    connector(*given).square().sum().backward()
    without = [key for key, parameter in connector.named_parameters() if parameter.grad is None]
    assert without == []
    still = [k for k, p in connector.named_parameters() if p.ndim > 1 and not float(p.grad.abs().sum()) > 0]
    assert still == []
    assert all(float(row.abs().sum()) > 0 for row in given[0].grad[0])


@every_case
@pytest.mark.parametrize("positions", [1, 4, 9, 25, 36])
def test_tokens_and_their_grid_are_known_before(name: str, options, positions: int) -> None:
    try:
        tokens = connector_tokens(name, positions, options)
    except RecipeError as error:
        assert positions == 1, error
        assert "grid of 1 x 1 patches" in str(error)
        return
    connector = fresh(name, options, positions)
    assert connector(*inputs(connector, positions)).shape == (2, tokens, 32)
    grid = connector_grid(name, positions, options)
    assert (grid is None) == (name in ("qformer", "resampler"))
    assert grid is None or grid[0] * grid[1] == tokens


@every_case
def test_a_model_comes_back_bit_for_bit(workplace: Path, tmp_path: Path, name: str, options) -> None:
    assembly, again = (assembly_with(workplace, name, options) for _ in range(2))
    (tmp_path / "saved").mkdir()
    save_model(assembly, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert loaded.spec == assembly.spec
    assert loaded.spec.image_tokens == connector_tokens(name, 4, options)
    own, same, back = (a.model.model.multi_modal_projector.state_dict() for a in (assembly, again, loaded))
    assert own.keys() == same.keys() == back.keys()
    assert all(torch.equal(own[key], same[key]) for key in own)  # by the seed
    assert all(torch.equal(own[key], back[key]) for key in own)
    projector = loaded.model.model.multi_modal_projector
    given = inputs(projector)
    assert torch.equal(projector(*given), assembly.model.model.multi_modal_projector(*given))


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] != "identity"])
def test_stage_1_lowers_the_loss(name: str, options) -> None:
    loud = {"initializer_range": 0.3}  # or the picture moves the logits by next to nothing
    tokens = connector_tokens(name, 4, options)
    model = llava({"connector": "full"}, connector=name, options=options, text=loud, image_seq_length=tokens)
    objective = Objective(model, attention="dense").train()
    made = batch(model, [tokens + 12, tokens + 9], image_tokens=tokens)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(20):
        loss = objective(made)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]


@every_case
def test_its_flops_are_those_of_a_real_pass(name: str, options) -> None:
    model = llava({"llm": "full"}, connector=name, options=options, text={})
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.model.multi_modal_projector(torch.randn(1, 4, 32))
    assert costs_of(model).connector.forward == counter.get_total_flops()
    assert (counter.get_total_flops() == 0) == (name == "identity")


@every_case
def test_it_computes_in_bf16(name: str, options) -> None:
    connector = fresh(name, options)
    given = inputs(connector)
    exact = connector(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # training: weights in float32, features in bf16
        near = connector(given[0].bfloat16(), *given[1:])
        near.float().sum().backward() if name != "identity" else None
    assert near.dtype == (torch.float32 if name == "qformer" else torch.bfloat16)
    assert float((near.float() - exact).norm() / exact.norm()) < 0.02
    half = connector.to(torch.bfloat16)(given[0].bfloat16(), *given[1:])  # inference
    assert half.dtype == torch.bfloat16
    assert float((half.float() - exact).norm() / exact.norm()) < 0.05


@every_case
def test_options_are_checked_by_name(name: str, options) -> None:
    row = connector_class(name)
    for ask in (lambda given: connector_tokens(name, 4, given), lambda given: fresh(name, given)):
        with pytest.raises(RecipeError, match=f"connector '{row.row}': unknown option colour; it takes "):
            ask({**options, "colour": 3})
        for key, option in row.options.items():
            for wrong in [1.5, [2], "two" if option.kind is not str else 2, *([0, -1, True] * (option.kind is int))]:
                with pytest.raises(RecipeError, match=f"{key}: "):
                    ask({**options, key: wrong})


def test_names_are_checked() -> None:
    for name in ("mlp", "mlp0x_gelu", "mlp2x_relu", "Linear"):
        with pytest.raises(RecipeError):
            connector_class(name)
    for depth in (1, 2, 3):
        assert sum(isinstance(m, nn.Linear) for m in fresh(f"mlp{depth}x_gelu", {}).modules()) == depth
    with pytest.raises(RecipeError, match="the encoder gives width 64, the LLM takes 32"):
        fresh("identity", {}, vision=64)


@every_case
def test_without_a_file_nothing_is_initialised(name: str, options) -> None:
    connector = fresh(name, options)
    before = {key: tensor.clone() for key, tensor in connector.state_dict().items()}
    assert initialise_connector(name, connector, options) == ()
    assert all(torch.equal(before[key], tensor) for key, tensor in connector.state_dict().items())
    assert lasting_options(name, options) == options


def test_every_row_has_tiny_options() -> None:
    assert set(cases.TINY) == set(CONNECTORS)
