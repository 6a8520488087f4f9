"""The resampler: what its latents read, and what it costs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_train.errors import RecipeError
from tests.model.connectors.cases import fresh

OPTIONS = {"num_latents": 3, "depth": 2, "heads": 2, "hidden_size": 24}


def test_latents_attend_to_features_and_to_themselves() -> None:
    connector = fresh("resampler", OPTIONS)
    layer = connector.layers[0]
    features, latents = torch.randn(1, 4, 24), torch.randn(1, 3, 24)
    read = layer(latents, features)
    # By its definition, a head at a time.
    normed, media = layer.norm_latents(latents)[0], layer.norm_features(features)[0]
    seen = torch.cat([media, normed])
    query, (key, value) = layer.query(normed), layer.key_value(seen).chunk(2, -1)
    heads = []
    for part in (slice(0, 12), slice(12, 24)):
        weights = (query[:, part] @ key[:, part].T / 12**0.5).softmax(-1)
        assert weights.shape == (3, 4 + 3)
        heads.append(weights @ value[:, part])
    between = latents[0] + layer.out(torch.cat(heads, -1))
    torch.testing.assert_close(read[0], between + layer.mlp(layer.norm_mlp(between)))


def test_the_order_of_positions_is_the_towers_to_tell() -> None:
    connector = fresh("resampler", OPTIONS)
    features = torch.randn(2, 9, 32)
    torch.testing.assert_close(connector(features), connector(features.flip(1)), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(connector(features), connector(features + 1))


def test_products_are_counted_by_hand() -> None:
    connector = fresh("resampler", OPTIONS, llm=20)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        connector(torch.randn(1, 4, 32))
    layer = 3 * 24 * 24 + 7 * 24 * 48 + 2 * 3 * 7 * 24 + 3 * 24 * 24 + 3 * 8 * 24 * 24
    assert counter.get_total_flops() == 2 * (4 * 32 * 24 + 2 * layer + 3 * 24 * 20)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(RecipeError, match="hidden_size 24 must be a multiple of heads 5"):
        fresh("resampler", {**OPTIONS, "heads": 5})
    assert fresh("resampler", {"depth": 1}).projection.in_features == 32  # the features' own width
