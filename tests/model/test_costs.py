"""FLOPs on paper are those that were worked out by hand, and those that torch counts while a model really trains."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig

from llava_train.model.costs import Counts, costs_of, step_flops
from llava_train.training.objective import Objective
from tests.model.measured import batch, llava, tuned

STAGE_1 = {"vision": "frozen", "connector": "full", "llm": "frozen"}


def llava_7b(llm: str = "frozen"):
    """CLIP-L/14-336 and Vicuna-7B, without weights."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    with torch.device("meta"):
        return tuned(text, vision, {"connector": "full", "llm": llm}, rank=128)


@pytest.fixture(scope="module")
def plain_7b():
    return costs_of(llava_7b())


def teraflops(costs, tokens: int, supervised: int, **modes: str) -> float:
    counts = Counts(tokens, tokens * (tokens + 1) / 2, 1, supervised)
    return sum(step_flops(costs, counts, {**STAGE_1, **modes}).values()) / 1e12


def test_llava_7b_costs_what_was_worked_out_by_hand(plain_7b) -> None:
    assert plain_7b.image.forward / 1e12 == pytest.approx(0.366, rel=0.002)
    assert plain_7b.connector.forward / 1e12 == pytest.approx(0.024, rel=0.01)
    assert plain_7b.token.forward / 1e9 == pytest.approx(12.95, rel=0.001)
    assert teraflops(plain_7b, 600, 22) == pytest.approx(16.3, rel=0.005)
    assert teraflops(plain_7b, 800, 150, llm="full") == pytest.approx(32.1, rel=0.005)


def test_lora_costs_its_adapters_and_no_gradients_of_what_it_sits_on(plain_7b) -> None:
    costs = costs_of(llava_7b("lora"))
    assert costs.token.linear == plain_7b.token.linear
    assert costs.token.adapters / 2e9 == pytest.approx(0.32, rel=0.01)
    assert teraflops(costs, 800, 150, llm="lora") == pytest.approx(23.3, rel=0.005)


def test_for_planning_all_is_measured_in_tokens(plain_7b) -> None:
    assert plain_7b.image_in_tokens == pytest.approx(390 / 12.95, rel=0.01)
    assert plain_7b.pair_in_tokens == pytest.approx(4 * 4096 * 32 / 12.95e9, rel=0.001)


@pytest.mark.parametrize(
    ("modes", "parts"),
    [
        ({"connector": "full"}, {}),
        ({"connector": "full", "llm": "lora"}, {"llm": "qwen3"}),
        ({"connector": "full", "llm": "full"}, {"tower": "siglip", "connector": "linear"}),
        ({"vision": "full", "connector": "full", "llm": "full"}, {"tower": "dinov2", "vision_feature_layer": -1}),
        ({"vision": "full"}, {"connector": "mlp3x_gelu", "vision_feature_layer": [1, -2]}),
        ({"llm": "lora", "connector": "full"}, {"connector": "qformer", "llm": "gemma"}),
    ],
)
def test_torch_counts_the_same_when_it_trains(modes, parts) -> None:
    options = {"num_queries": 3, "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    parts = {**parts, "options": options if parts.get("connector") == "qformer" else None}
    model = llava(modes, **parts)
    objective = Objective(model, attention="dense").train()
    tokens, supervised, image_tokens = 30, 6, 3 if parts["options"] else 4
    made = batch(model, [tokens], supervised, image_tokens)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective(made).backward()
    # A dense mask has every pair computed.
    counts = Counts(tokens, tokens**2, 1, supervised)
    needed = step_flops(costs_of(model), counts, {"vision": "frozen", "connector": "frozen", "llm": "frozen", **modes})
    assert sum(needed.values()) - lowest(model, modes, counts) == counter.get_total_flops()


def lowest(model, modes, counts: Counts) -> int:
    """FLOPs of gradients by the inputs of the lowest layers that train, which nobody needs and we count."""
    if modes.get("vision") == "full":
        patches = model.model.vision_tower.get_submodule(
            "embeddings.patch_embeddings.projection"
            if model.config.vision_config.model_type == "dinov2"
            else "embeddings.patch_embedding"
        )
        return 2 * patches.weight.numel() * 4
    connector = model.model.multi_modal_projector
    if hasattr(connector, "qformer"):
        cross = [
            m for n, m in connector.named_modules() if n.endswith(("crossattention.attention.key", ".attention.value"))
        ]
        return 2 * sum(m.weight.numel() for m in cross if m.in_features == 32) * 4
    first = getattr(connector, "linear_1", None) or connector.linear
    return 2 * first.weight.numel() * 4


def test_a_qformer_reads_the_image_once_for_all_its_queries() -> None:
    options = {"num_queries": 3, "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = llava({"connector": "full"}, connector="qformer", options=options)
    # Two layers attend to the queries, the first to the image (4 positions, width 32), too.
    inside = 2 * (4 * 24 * 24 + 2 * 24 * 96) + 2 * 24 * 24 + 24 * 64
    cost = costs_of(model).connector
    assert cost.linear == 2 * (3 * inside + 4 * 2 * 32 * 24)
    assert cost.attention == 4 * 24 * (2 * 3 * 3 + 3 * 4)


def test_adapters_of_the_tower_are_counted_up_to_the_feature_layer() -> None:
    cost = costs_of(llava({"vision": "lora"})).image
    # Two of three layers, 5 positions: adapters of rank 4 on four 32 x 32 layers and two between 32 and 48.
    assert cost.adapters == 2 * 5 * 2 * 4 * (4 * (32 + 32) + 2 * (32 + 48))
    assert cost.linear == costs_of(llava({"vision": "full"})).image.linear


def test_a_larger_picture_costs_more() -> None:
    model = llava({"connector": "full"}, tower="dinov2")
    assert costs_of(model, 56).connector.forward == 4 * costs_of(model).connector.forward
    assert costs_of(model, 56).image.attention == pytest.approx(costs_of(model).image.attention * (17 / 5) ** 2)
