"""The C-Abstractor: its sizes, its convolutions, pictures of another size."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_train.model.connectors import connector_tokens
from tests.model.connectors.cases import fresh


def test_products_are_counted_by_hand() -> None:
    connector = fresh("c_abstractor", {"depth": 2, "hidden_size": 12, "side": 2}, 16, vision=8, llm=20)
    with FlopCounterMode(display=False) as counter:
        connector(torch.randn(1, 16, 8))

    def block(inside: int, positions: int) -> int:
        shortcut = inside * 12 if inside != 12 else 0
        squeezed = inside // 4
        return positions * (inside * 12 + 9 * 12 + 12 * 12 + shortcut) + 2 * 12 * squeezed

    macs = block(8, 16) + block(12, 16) + 2 * block(12, 4) + 4 * 12 * 20
    assert counter.get_total_flops() == 2 * macs


def test_a_position_sees_its_neighbours_alone_but_for_the_gates() -> None:
    connector = fresh("c_abstractor", {"depth": 1, "side": 5}, 25)
    for block in (*connector.before, *connector.after):  # gates see the whole picture
        torch.nn.init.zeros_(block.excite.weight)
    features = torch.randn(1, 25, 32)
    changed = features.clone()
    changed[0, 0] += 1
    moved = (connector(features) != connector(changed)).any(-1).reshape(5, 5)
    # Two blocks of 3 x 3 reach two positions far.
    assert moved[:3, :3].all()
    assert not moved[3:].any() and not moved[:, 3:].any()


def test_learned_positions_are_interpolated_for_a_picture_of_another_size() -> None:
    connector = fresh("c_abstractor", {"depth": 1, "side": 2}, 16)
    assert connector.positions.shape == (1, 4, 4, 32)
    for side in (2, 4, 6):
        assert connector(torch.randn(1, side * side, 32)).shape == (1, 4, 32)
    with torch.no_grad():
        connector.positions.fill_(0.5)
    torch.testing.assert_close(connector._positions(6), torch.full((1, 6, 6, 32), 0.5))
    features = torch.randn(1, 36, 32)
    before = connector(features)
    with torch.no_grad():
        connector.positions.add_(1)
    assert not torch.equal(connector(features), before)


def test_without_a_side_a_quarter_of_the_positions_is_left() -> None:
    assert [connector_tokens("c_abstractor", side**2, {}) for side in (24, 16, 27)] == [144, 64, 196]
