"""Pictures by cross-attention: the same as the language model at gates of zero, and as the plain definition beyond."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers import (
    BloomConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
)

from llava_train.data.collate import Collated, pack, pad
from llava_train.data.encode import IGNORE
from llava_train.errors import CheckpointError, RecipeError
from llava_train.model.attention import Layout, use_packed_attention
from llava_train.model.cross.blocks import GatedBlock, Reading, pictures_seen
from llava_train.model.cross.fused import (
    CrossAttentionForConditionalGeneration,
    complete_blocks,
    decoder_inputs,
    plan_blocks,
)
from tests.tiny import LLMS

IMAGE = 90
WIDTH = 32
SIZES = {
    "vocab_size": 96,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def stock(text: PretrainedConfig | None = None) -> LlavaForConditionalGeneration:
    """A tiny Llava: CLIP, four positions a picture."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text or LlamaConfig(**SIZES), image_token_index=IMAGE, image_seq_length=1
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = 0
    return model.eval()


def add_cross_attention(
    model: LlavaForConditionalGeneration, options: dict[str, object], seed: int | None
) -> CrossAttentionForConditionalGeneration:
    """Blocks between the parts of a stock model."""
    model.config.cross_attention = plan_blocks(model.config.text_config, options)
    with torch.device("meta"):
        fused = CrossAttentionForConditionalGeneration(model.config)
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        setattr(fused.model, name, getattr(model.model, name))
    fused.lm_head, fused.generation_config = model.lm_head, model.generation_config
    complete_blocks(fused, seed)
    return fused.eval()


def fused(opened: bool = True, text: PretrainedConfig | None = None) -> CrossAttentionForConditionalGeneration:
    """The same with a block before layers 1 and 3, frozen but for connector and blocks."""
    model = add_cross_attention(stock(text), {"every": 2, "feed_forward": 2}, seed=5).requires_grad_(False)
    model.model.cross_attention.requires_grad_(True)
    model.model.multi_modal_projector.requires_grad_(True)
    for name, parameter in model.model.cross_attention.named_parameters():
        if opened and name.endswith("_gate"):
            torch.nn.init.constant_(parameter, 0.8)
        elif opened and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(count))


def states_of(model: CrossAttentionForConditionalGeneration, count: int) -> torch.Tensor:
    """What the connector makes of `count` pictures, (I, P, D)."""
    return torch.stack(model.get_image_features(pixels(count), return_dict=True).pooler_output)


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


TWO_ROWS = ids([7, 8, IMAGE, 9, 10, IMAGE, 11, 12], [IMAGE, 13, 14, 15, 16, 17, 18, 19])


@pytest.mark.parametrize("name", LLMS)
def test_gates_at_zero_leave_the_language_model_as_it_is(name: str) -> None:
    """Bit for bit, with pictures and without; and open ones do not."""
    kind, config, sizes = LLMS[name]
    torch.manual_seed(1)
    llm = kind(config(**{**sizes, "vocab_size": 96, "pad_token_id": 0})).eval()
    bare = llm.get_output_embeddings()(llm.get_decoder()(TWO_ROWS).last_hidden_state)
    plain = stock(llm.config)
    plain.model.language_model, plain.lm_head = llm.get_decoder(), llm.get_output_embeddings()
    model = add_cross_attention(plain, {"every": 2}, seed=5)
    assert torch.equal(model(TWO_ROWS, pixel_values=pixels(3)).logits, bare)
    assert torch.equal(model(TWO_ROWS).logits, bare)
    torch.nn.init.ones_(model.model.cross_attention[0].attention_gate)
    assert not torch.equal(model(TWO_ROWS, pixel_values=pixels(3)).logits, bare)


def test_training_leaves_text_alone_as_it_was() -> None:
    """Gates and adapters alone lower the loss; what the model says to text is the same, bit for bit."""
    model = fused(opened=False)
    before = model(TWO_ROWS).logits
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(8):
        loss = model(TWO_ROWS, pixel_values=pixels(3), labels=TWO_ROWS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    assert torch.equal(model(TWO_ROWS).logits, before)
    seeing = model(TWO_ROWS, pixel_values=pixels(3)).logits
    assert torch.equal(seeing[:1, :2], before[:1, :2]), "before the first picture"
    assert not torch.isclose(seeing[:, -1], before[:, -1]).all()


def naive(block: GatedBlock, hidden: torch.Tensor, states: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The definition: position by position, head by head."""
    made = hidden.clone()
    for row, place in itertools.product(*map(range, seen.shape)):
        if (number := int(seen[row, place])) < 0:
            continue
        own = hidden[row, place]
        picture = block.picture_norm(states[number])
        heads = []
        queries, keys, values = block.q_proj(block.input_norm(own)), block.k_proj(picture), block.v_proj(picture)
        size = len(queries) // block.heads
        for head in range(block.heads):
            part = slice(head * size, head * size + size)
            key = block.k_norm(keys[:, part])
            heads.append((key @ block.q_norm(queries[part]) / size**0.5).softmax(0) @ values[:, part])
        own = own + block.attention_gate.tanh() * block.o_proj(torch.cat(heads))
        wide = torch.nn.functional.gelu(block.up_proj(block.feed_forward_norm(own)))
        made[row, place] = own + block.feed_forward_gate.tanh() * block.down_proj(wide)
    return made


def test_a_block_is_the_plain_definition() -> None:
    block, seen = fused().model.cross_attention[0], ids([-1, 2, 2, 0, 0], [1, -1, 1, 1, 1])
    torch.manual_seed(2)
    hidden, states = torch.randn(2, 5, WIDTH), torch.randn(4, 6, WIDTH)  # nobody sees the last picture
    reading = Reading.of(seen, 4)
    assert reading is not None
    made = block(hidden, states, reading)
    torch.testing.assert_close(made, naive(block, hidden, states, seen), atol=1e-5, rtol=1e-5)
    assert torch.equal(made[seen < 0], hidden[seen < 0])


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Stretches of 1 (a picture) and 0, and their parents."""
    stretches, parents = [], []
    stretch = st.lists(st.integers(0, 1), min_size=1, max_size=5)
    for _ in range(draw(st.integers(1, 3))):
        stretches.append(draw(stretch))
        parents.append(-1)
        parent = len(parents) - 1
        for _ in range(draw(st.integers(0, 3))):
            stretches.append(draw(stretch))
            parents.append(parent)
    return stretches, parents


@given(packed_rows())
@settings(deadline=None, max_examples=60)
def test_a_stretch_goes_on_from_its_parent(row: tuple[list[list[int]], list[int]]) -> None:
    stretches, parents = row
    numbers = itertools.count()
    ends, expected = list[int](), list[int]()
    for tokens, parent in zip(stretches, parents):
        last = ends[parent] if parent >= 0 else -1
        for token in tokens:
            last = next(numbers) if token else last
            expected.append(last)
        ends.append(last)
    flat = torch.tensor([[*itertools.chain(*stretches)]])
    assert pictures_seen(flat, 1, [len(tokens) for tokens in stretches], parents).tolist() == [expected]


def test_a_padded_row_sees_its_own_pictures() -> None:
    rows = ids([5, IMAGE, 6, IMAGE, 7, 0], [6, 6, 6, 6, 6, 6], [IMAGE, 6, 6, 0, 0, 0])
    mask = (rows > 0).long()
    assert pictures_seen(rows, IMAGE, attention_mask_BT=mask).tolist() == [
        [-1, 0, 0, 1, 1, -1],
        [-1] * 6,
        [2, 2, 2, -1, -1, -1],
    ]
    assert pictures_seen(rows, IMAGE)[0, -1] == 1


class Sample:
    """Tokens of which the second half is supervised."""

    def __init__(self, *tokens: int) -> None:
        self.input_ids = np.array(tokens)
        self.labels = np.where(np.arange(len(tokens)) < len(tokens) // 2, IGNORE, self.input_ids)


def loss_and_gradients(batch: Collated, pictures: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model, device = fused(), torch.device("cpu")
    tokens, places = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    lengths, parents = batch.lengths.tolist(), batch.parents.tolist()
    mask = None if batch.attention_mask is None else torch.from_numpy(batch.attention_mask)
    inputs = decoder_inputs(model, states_of(model, pictures), pictures_seen(tokens, IMAGE, lengths, parents, mask))
    if lengths:
        use_packed_attention(model.model.language_model)
        inputs["layout"] = Layout(tuple(lengths), tuple(parents), device)
    embeddings = model.get_input_embeddings()(tokens)
    hidden = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=places, use_cache=False, **inputs
    ).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[torch.from_numpy(batch.predictors)])
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.targets))
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]


def test_packed_rows_train_as_padded_ones() -> None:
    """Several pictures a sample, none at all, and a beginning with two pictures that three samples share."""
    begin = (3, IMAGE, 4, IMAGE, 5)
    groups = [
        (0, [Sample(9, 8, 7, 6)]),
        (5, [Sample(*begin, 6, 7, 8), Sample(*begin, 9, IMAGE, 8, 6), Sample(*begin, 11, 12)]),
        (0, [Sample(3, 4, IMAGE, 5, 6, IMAGE, 7, 8)]),
    ]
    packed = loss_and_gradients(pack(groups, [1.0] * 5), 5)
    # Padded, a shared picture stands in each row: the rows after the first see their own copies.
    rows = [row for _, members in groups for row in members]
    each = [0, 1, 0, 1, 2, 0, 1, 3, 4]
    with pytest.MonkeyPatch.context() as patch:
        own = states_of
        patch.setitem(globals(), "states_of", lambda model, _: own(model, 5)[each])
        padded = loss_and_gradients(pad(rows, [1.0] * 5, 0), 9)
    torch.testing.assert_close(packed, padded, atol=1e-6, rtol=1e-6)


def test_recomputed_layers_and_blocks_give_the_same_gradients() -> None:
    runs: list[bool] = []

    def gradients(recompute: bool) -> list[torch.Tensor]:
        model = fused().train()
        model.model.language_model.requires_grad_(True)
        for layer in [*model.model.language_model.layers, *model.model.cross_attention]:
            layer.gradient_checkpointing = recompute
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        for block in model.model.cross_attention:
            block.q_proj.register_forward_hook(lambda *_: runs.append(recompute))
        model(TWO_ROWS, pixel_values=pixels(3), labels=TWO_ROWS, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)
    assert (runs.count(False), runs.count(True)) == (2, 4)


def test_text_alone_gives_gradients_of_zero() -> None:
    """And the same hidden states, to the bit."""
    model, text = fused(), ids([3, 4, 5, 6])
    nobody = torch.full_like(text, -1)
    assert decoder_inputs(model, states_of(model, 1), nobody) == {}
    embeddings = model.get_input_embeddings()(text)
    bare = model.model.language_model(inputs_embeds=embeddings).last_hidden_state
    inputs = decoder_inputs(model, states_of(model, 1), nobody, connected=True)
    made = model.model.language_model(inputs_embeds=embeddings, **inputs).last_hidden_state
    assert torch.equal(made, bare)
    made.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_training_and_inference_compute_the_same() -> None:
    """Also where a second model is made of the same parts: blocks run once."""
    model = fused()
    expected = model(TWO_ROWS, pixel_values=pixels(3)).logits
    inputs = decoder_inputs(model, states_of(model, 3), pictures_seen(TWO_ROWS, IMAGE))
    hidden = model.model.language_model(inputs_embeds=model.get_input_embeddings()(TWO_ROWS), **inputs)
    torch.testing.assert_close(model.lm_head(hidden.last_hidden_state), expected, atol=1e-6, rtol=1e-6)
    read = model.model.read(states_of(model, 3))
    assert torch.equal(model.model(TWO_ROWS, pictures=read).last_hidden_state @ model.lm_head.weight.T, expected)
    second = add_cross_attention(model, {"every": 2, "feed_forward": 2}, seed=None)
    second.model.cross_attention = model.model.cross_attention
    assert torch.equal(second(TWO_ROWS, pixel_values=pixels(3)).logits, expected)


def prompts() -> dict[str, torch.Tensor]:
    """Left-padded: two pictures, one, none."""
    rows = ids([0, 0, 7, IMAGE, 8, IMAGE, 9], [0, IMAGE, 10, 11, 12, 13, 14], [15, 16, 17, 18, 19, 20, 21])
    return {"input_ids": rows, "attention_mask": (rows > 0).long(), "pixel_values": pixels(3)}


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_is_greedy_decoding_by_full_passes(use_cache: bool) -> None:
    model, inputs = fused(), prompts()
    looked = []
    model.model.vision_tower.register_forward_hook(lambda *_: looked.append(1))
    made = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=use_cache, eos_token_id=None)
    assert len(looked) == 1
    blind = dict(inputs, input_ids=inputs["input_ids"].where(inputs["input_ids"] != IMAGE, 1))
    del blind["pixel_values"]
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(6):
        places = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(tokens, inputs["pixel_values"], mask, position_ids=places).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    assert made.tolist() == tokens.tolist()
    unseeing = model.generate(**blind, max_new_tokens=6, do_sample=False, use_cache=use_cache, eos_token_id=None)
    assert (made[:2, 7:] != unseeing[:2, 7:]).any() and torch.equal(made[2], unseeing[2])


def test_several_answers_to_a_prompt_see_its_pictures() -> None:
    model, inputs = fused(), prompts()
    one = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    torch.manual_seed(0)
    three = model.generate(**inputs, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=3)
    assert three.tolist() == one.repeat_interleave(3, dim=0).tolist()


def test_places_and_pictures_must_be_as_many() -> None:
    for call in (fused(), fused().generate):
        with pytest.raises(ValueError, match="3 places for pictures, 2 were given"):
            call(input_ids=TWO_ROWS, pixel_values=pixels(2))


def test_a_saved_model_is_the_same(tmp_path: Path) -> None:
    model = fused()
    model.save_pretrained(tmp_path)
    loaded, report = CrossAttentionForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = model(TWO_ROWS, pixel_values=pixels(3)).logits
    assert torch.equal(loaded.eval()(TWO_ROWS, pixel_values=pixels(3)).logits, expected)
    assert LlavaConfig.from_pretrained(tmp_path).cross_attention == {
        "layers": [1, 3],
        "num_attention_heads": 2,
        "head_dim": 16,
        "feed_forward": 2,
    }
    empty = add_cross_attention(stock(), {"every": 2, "feed_forward": 2}, seed=None)
    names = [name for name, parameter in empty.named_parameters() if parameter.is_meta]
    assert names and all(name.startswith("model.cross_attention.") for name in names)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(TWO_ROWS, pixel_values=pixels(3)).logits, expected)


def test_a_seed_gives_the_same_blocks_and_a_copy_is_its_own() -> None:
    first, second = fused(opened=False), fused(opened=False)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    other_seed = add_cross_attention(stock(), {"every": 2, "feed_forward": 2}, seed=6).model.cross_attention[0]
    assert not torch.equal(other_seed.q_proj.weight, first.model.cross_attention[0].q_proj.weight)
    twin = copy.deepcopy(fused())
    torch.nn.init.zeros_(twin.model.cross_attention[0].attention_gate)
    seeing = [model(TWO_ROWS, pixel_values=pixels(3)).logits for model in (fused(), twin)]
    assert not torch.equal(*seeing)


def test_blocks_stand_where_flamingo_has_them() -> None:
    llama = LlamaConfig(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32)
    plan = {"layers": [3, 7, 11, 15, 19, 23, 27, 31], "num_attention_heads": 32, "head_dim": 128, "feed_forward": 4}
    assert plan_blocks(llama, {}) == plan
    assert plan_blocks(llama, {"num_attention_heads": 8})["num_attention_heads"] == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"evry": 2}, "unknown option evry; it takes every, num_attention_heads, feed_forward"),
        ({"every": 5}, "every: 5: the language model has 4 layers"),
        ({"every": 0}, "every: 0: must be a whole number"),
        ({"feed_forward": 1.5}, "feed_forward: 1.5"),
        ({"num_attention_heads": True}, "num_attention_heads: True"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        add_cross_attention(stock(), options, seed=0)


class Deaf(LlamaModel):
    """A decoder that takes any argument and hands on none."""

    def forward(self, inputs_embeds: torch.Tensor, **others: object) -> torch.Tensor:
        return super().forward(inputs_embeds=inputs_embeds, use_cache=False)


class Strict(LlamaModel):
    """One that takes no further argument."""

    def forward(self, inputs_embeds: torch.Tensor, use_cache: bool) -> torch.Tensor:
        return super().forward(inputs_embeds=inputs_embeds, use_cache=use_cache)


@pytest.mark.parametrize("decoder", [Deaf, Strict])
def test_a_decoder_that_keeps_pictures_from_its_layers_is_refused(decoder: type[LlamaModel]) -> None:
    model = stock()
    model.model.language_model = decoder(model.config.text_config)
    with pytest.raises(RecipeError, match=rf"model\.fusion: {decoder.__name__} "):
        add_cross_attention(model, {}, seed=0)


@pytest.mark.parametrize("layers", [[1, 4], [3, 1], [1, 1], [-1]])
def test_layers_that_the_decoder_does_not_have_are_refused(layers: list[int]) -> None:
    config = stock().config
    config.cross_attention = {**plan_blocks(config.text_config, {}), "layers": layers}
    with pytest.raises(CheckpointError, match=r"cross_attention: layers: "):
        CrossAttentionForConditionalGeneration(config)


def test_a_decoder_without_layers_is_refused() -> None:
    """As transformers names them."""
    bloom = BloomConfig(vocab_size=96, hidden_size=WIDTH, n_layer=4, n_head=2, tie_word_embeddings=False)
    with pytest.raises(RecipeError, match=r"model\.fusion: BloomModel "):
        add_cross_attention(stock(bloom), {}, seed=0)
