"""Pixel shuffle and pooling give the patches that they say."""

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from llava_train.errors import RecipeError
from llava_train.model.connectors import connector_grid, connector_tokens
from llava_train.model.connectors.grids import adaptive_windows, means
from tests.model.connectors.cases import assembly_with, fresh


@pytest.mark.parametrize(("side", "r"), [(4, 2), (6, 3), (4, 4), (5, 2), (7, 3)])
def test_a_token_of_pixel_shuffle_holds_its_neighbours(side: int, r: int) -> None:
    connector = fresh("pixel_shuffle", {"r": r}, side * side, vision=2)
    connector.layers = torch.nn.Identity()
    grid = torch.arange(1.0, side * side + 1).reshape(side, side)
    tokens = connector(torch.stack([grid, -grid], -1).reshape(1, -1, 2))[0]
    count = -(-side // r)
    assert connector_grid("pixel_shuffle", side * side, {"r": r}) == (count, count)
    assert tokens.shape == (count * count, r * r * 2)
    filled = torch.zeros(count * r, count * r)
    filled[:side, :side] = grid
    for number, token in enumerate(tokens):
        row, column = divmod(number, count)
        block = filled[row * r : row * r + r, column * r : column * r + r]
        assert torch.equal(token.reshape(r, r, 2)[..., 0], block)
        assert torch.equal(token.reshape(r, r, 2)[..., 1], -block)


@pytest.mark.parametrize(("side", "count"), [(4, 2), (24, 12), (7, 3), (5, 5), (6, 4), (3, 1)])
def test_adaptive_means_are_torchs(side: int, count: int) -> None:
    grid = torch.randn(2, side, side, 3)
    wanted = adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), count).permute(0, 2, 3, 1)
    torch.testing.assert_close(means(grid, adaptive_windows(side, count)), wanted)


@pytest.mark.parametrize(("side", "r"), [(4, 2), (5, 2), (7, 3), (3, 3)])
def test_means_of_neighbours_are_torchs(side: int, r: int) -> None:
    connector = fresh("avg_pool", {"r": r}, side * side)
    features = torch.randn(2, side * side, 32)
    grid = features.reshape(2, side, side, 32).permute(0, 3, 1, 2)
    pooled = avg_pool2d(grid, r, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)
    assert pooled.shape[1] == connector_tokens("avg_pool", side * side, {"r": r})
    torch.testing.assert_close(connector(features), connector.layers(pooled))


def test_a_pooled_picture_of_another_size_has_the_tokens_asked_for() -> None:
    connector = fresh("adaptive_pool", {"side": 2}, 16)
    for side in (2, 4, 5):
        assert connector(torch.randn(1, side * side, 32)).shape[1] == 4
        assert connector_tokens("adaptive_pool", side * side, {"side": 2}) == 4
    assert connector_grid("adaptive_pool", 25, {}) == (3, 3)


@pytest.mark.parametrize("name", ["pixel_shuffle", "avg_pool", "adaptive_pool", "c_abstractor"])
def test_a_grid_that_does_not_suit_is_refused(workplace, name: str) -> None:
    for positions in (5, 577):
        with pytest.raises(RecipeError, match=f"{name}.*a square grid of patches, and {positions} positions are none"):
            connector_tokens(name, positions, {})
    key = "r" if name in ("pixel_shuffle", "avg_pool") else "side"
    with pytest.raises(RecipeError, match=f"{name}.*{key}: 3: the encoder gives a grid of 2 x 2 patches"):
        connector_tokens(name, 4, {key: 3})
    with pytest.raises(RecipeError, match=r"model\.vision_feature_select_strategy: default"):
        assembly_with(workplace, name, {}, "model.vision_feature_select_strategy=full")


def test_pixel_shuffle_takes_three_factors() -> None:
    for r in (1, 5):
        with pytest.raises(RecipeError, match=f"r: {r}: choose one of 2, 3, 4"):
            connector_tokens("pixel_shuffle", 576, {"r": r})
    assert [connector_tokens("pixel_shuffle", 576, {"r": r}) for r in (2, 3, 4)] == [144, 64, 36]


def test_products_are_counted_by_hand() -> None:
    # 4 x 4 positions of width 8 to 4 tokens of width 16.
    from torch.utils.flop_counter import FlopCounterMode

    for name, inside in (("pixel_shuffle", 32), ("avg_pool", 8), ("adaptive_pool", 8)):
        connector = fresh(name, {}, 16, vision=8, llm=16)
        with FlopCounterMode(display=False) as counter:
            connector(torch.randn(1, 16, 8))
        assert counter.get_total_flops() == 2 * 4 * (inside * 16 + 16 * 16), name
