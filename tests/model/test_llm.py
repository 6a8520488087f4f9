"""What an LLM must be made of, and its head."""

from pathlib import Path

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, Gemma2ForCausalLM, OPTConfig, OPTForCausalLM

from llava_train.errors import CheckpointError
from llava_train.model.llm import Head, grow_vocabulary, head_of, load_llm
from tests import tiny

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_decoder_without_layers_of_its_own_is_refused(tmp_path: Path) -> None:
    """OPT's decoder stands one level below its base model."""
    OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="OPTForCausalLM is not made as Llava needs it"):
        load_llm(str(tmp_path), "sdpa")


def test_a_head_that_is_not_known_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CohereForCausalLM(CohereConfig(**SMALL, intermediate_size=48, logit_scale=0.3)).save_pretrained(tmp_path)
    assert load_llm(str(tmp_path), "sdpa").config.logit_scale == 0.3
    monkeypatch.delitem(load_llm.__globals__["_AFTER_HEAD"], "logit_scale")
    with pytest.raises(CheckpointError, match="CohereForCausalLM does something to its head's logits"):
        load_llm(str(tmp_path), "sdpa")


def test_a_head_keeps_the_weights_of_its_llm(tmp_path: Path) -> None:
    tiny.make_llm(tmp_path, "gemma2")
    llm = load_llm(str(tmp_path), "sdpa")
    assert isinstance(llm, Gemma2ForCausalLM)
    assert llm.config._attn_implementation == "eager"  # sdpa would leave out the cap
    grow_vocabulary(llm, 500, seed=0)
    head = head_of(llm)
    assert isinstance(head, Head)
    assert head.weight is llm.get_input_embeddings().weight
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(head(hidden), 0.5 * torch.tanh(hidden @ head.weight.T / 0.5))


def test_a_plain_head_is_left_as_it_is(tmp_path: Path) -> None:
    tiny.make_llm(tmp_path, "gemma3")
    llm = load_llm(str(tmp_path), "sdpa")
    assert head_of(llm) is llm.lm_head
    assert llm.config._attn_implementation == "sdpa"
