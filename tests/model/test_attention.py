"""Every attention over packed rows against the plain definition."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from llava_train.errors import RecipeError
from llava_train.model import attention
from llava_train.model.attention import ATTENTIONS, Layout, use_packed_attention

CPU = torch.device("cpu")
HEADS, KEY_HEADS, CHANNELS = 4, 2, 8


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """A few stretches, some of which follow a parent as branches."""
    lengths, parents = [], []
    for _ in range(draw(st.integers(1, 4))):
        lengths.append(draw(st.integers(1, 9)))
        parents.append(-1)
        parent = len(lengths) - 1
        for _ in range(draw(st.integers(0, 3))):
            lengths.append(draw(st.integers(1, 9)))
            parents.append(parent)
    return Layout(tuple(lengths), tuple(parents), CPU)


def plain_varlen(query, key, value, cu_query, cu_key, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch.nn.attention.varlen.varlen_attn computes on a GPU, sequence by sequence."""
    left, right = window_size
    assert right == 0
    made = []
    for (a, b), (c, d) in zip(itertools.pairwise(cu_query), itertools.pairwise(cu_key)):
        assert b - a <= max_q and d - c <= max_k
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        if left >= 0:  # so many keys before the query's own
            mask = mask.triu(d - c - (b - a) - left)
        q, k, v = (t.transpose(0, 1)[None] for t in (query[a:b], key[c:d], value[c:d]))
        made.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)[0])
    return torch.cat(made, dim=1).transpose(0, 1)


def tensors(size: int) -> list[torch.Tensor]:
    torch.manual_seed(size)
    return [torch.randn(1, heads, size, CHANNELS) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]


WINDOWS = st.none() | st.integers(1, 12)


@given(layout=layouts(), window=WINDOWS)
@settings(deadline=None, max_examples=30)
def test_who_sees_whom(layout: Layout, window: int | None) -> None:
    """The last positions of a parent's and of a stretch's own, counted one by one."""
    mask = layout.within(window).mask
    spans = [range(start, start + length) for start, length in zip(layout.starts, layout.lengths)]
    for number, own in enumerate(spans):
        parent = layout.parents[number]
        before = list(spans[parent]) if parent >= 0 else []
        for query in own:
            seen = [*before, *range(own.start, query + 1)]
            assert mask[query].nonzero().flatten().tolist() == seen[-(window or len(seen)) :]


@pytest.mark.parametrize("kind", ATTENTIONS)
@given(layout=layouts(), window=WINDOWS, softcap=st.sampled_from([None, 0.7]))
@settings(deadline=None, max_examples=10)
def test_every_attention_is_the_plain_one(kind: str, layout: Layout, window: int | None, softcap: float | None) -> None:
    if kind == "varlen":
        softcap = None
    layout = layout.within(window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
        given_tensors = tensors(sum(layout.lengths))
        made = ATTENTIONS[kind](*given_tensors, layout, 0.3, 0.0, softcap)
        plain = ATTENTIONS["dense"](*given_tensors, layout, 0.3, 0.0, softcap)
        torch.testing.assert_close(made, plain, atol=1e-6, rtol=1e-5)


def test_scores_are_capped_as_gemma_caps_them() -> None:
    query, key, value = tensors(6)
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // KEY_HEADS
    mask = torch.full((6, 6), -torch.inf).triu(1)[None, None]
    theirs, _ = eager_attention_forward(module, query, key, value, mask, scaling=0.3, softcap=0.7)
    made = ATTENTIONS["blocks"](query, key, value, Layout((6,), (-1,), CPU), 0.3, 0.0, 0.7)
    torch.testing.assert_close(made.transpose(1, 2), theirs, atol=1e-6, rtol=1e-5)
    assert (made - ATTENTIONS["blocks"](query, key, value, Layout((6,), (-1,), CPU), 0.3, 0.0)).abs().max() > 1e-3


def test_a_window_is_laid_out_once_and_not_where_all_fits_in() -> None:
    layout = Layout((5, 3), (-1, 0), CPU)
    assert layout.within(8) is layout.within(None) is layout
    assert layout.within(7) is layout.within(7) is not layout


def test_an_older_torch_is_given_a_key_head_for_each_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11's varlen attention knows no groups."""
    layout = Layout((3, 4, 2), (-1, 0, 0), CPU)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    monkeypatch.setattr(attention, "_varlen_takes", lambda: {"window_size"})
    made = ATTENTIONS["varlen"](*tensors(9), layout, 0.3, 0.0)
    torch.testing.assert_close(made, ATTENTIONS["dense"](*tensors(9), layout, 0.3, 0.0), atol=1e-6, rtol=1e-5)


def test_autocast_gives_attention_one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    monkeypatch.setitem(ATTENTIONS._rows, "spy", lambda q, k, v, *_: seen.extend((q.dtype, k.dtype, v.dtype)) or q)
    query, key, value = tensors(4)
    with torch.autocast("cpu", torch.bfloat16):
        attention._attend(torch.nn.Module(), query, key, value.bfloat16(), None, layout=Layout((4,), (-1,), CPU, "spy"))
    assert set(seen) == {torch.bfloat16}


@given(layout=layouts(), data=st.data())
@settings(deadline=None, max_examples=30)
def test_a_token_sees_its_beginning_and_itself_alone(layout: Layout, data: st.DataObject) -> None:
    """Another sample's tokens change nothing, bit for bit."""
    size = sum(layout.lengths)
    own = data.draw(st.integers(0, len(layout.lengths) - 1))
    seen = {own, layout.parents[own]}
    query, key, value = tensors(size)
    before = ATTENTIONS["blocks"](query, key, value, layout, 0.3, 0.0)
    for number, start in enumerate(layout.starts):
        if number not in seen:
            for tensor in (query, key, value):
                tensor[:, :, start : start + layout.lengths[number]] += 7.0
    after = ATTENTIONS["blocks"](query, key, value, layout, 0.3, 0.0)
    mine = slice(layout.starts[own], layout.starts[own] + layout.lengths[own])
    assert torch.equal(before[:, :, mine], after[:, :, mine])


@pytest.mark.parametrize(
    ("kind", "asked", "named"),
    [("flex", (0.1, None), "dropout"), ("varlen", (0.1, None), "dropout"), ("varlen", (0.0, 0.7), "softcap")],
)
def test_what_a_kernel_does_not_have_is_refused(kind: str, asked: tuple[float, float | None], named: str) -> None:
    with pytest.raises(RecipeError, match=f"{kind} has no {named}"):
        ATTENTIONS[kind](*tensors(3), Layout((3,), (-1,), CPU), 0.3, *asked)


SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_what_packed_rows_do_not_have_is_refused_by_name() -> None:
    layout = Layout((4,), (-1,), CPU)
    with pytest.raises(RecipeError, match=r"Module asks its attention for s_aux.*speed\.packing=false"):
        attention._attend(torch.nn.Module(), *tensors(4), None, layout=layout, s_aux=torch.zeros(HEADS))
    attention._attend(torch.nn.Module(), *tensors(4), None, layout=layout, s_aux=None)


def test_a_model_with_an_attention_of_its_own_is_refused() -> None:
    gemma = Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=16))
    gemma._supports_attention_backend = False
    with pytest.raises(RecipeError, match=r"speed\.packing=false"):
        use_packed_attention(gemma)
