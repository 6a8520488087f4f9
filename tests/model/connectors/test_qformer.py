"""The Q-Former: from a BLIP-2 folder as that model computes it, and with an instruction."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Blip2Config, Blip2ForConditionalGeneration

from llava_train import load_model
from llava_train.errors import CheckpointError, RecipeError
from llava_train.model.checkpoint import save_model
from llava_train.model.connectors import connector_tokens, initialise_connector, lasting_options
from tests.model.connectors.cases import QFORMER, assembly_with, fresh, inputs

SIZES = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 40}


@pytest.fixture(scope="module")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BLIP-2 folder: vision width 32, LLM width 32, five queries."""
    folder = tmp_path_factory.mktemp("blip2")
    few = {"num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config={**few, "hidden_size": 32, "intermediate_size": 48, "image_size": 28, "patch_size": 14},
        qformer_config={**SIZES, "vocab_size": 64},
        text_config={**few, "model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
        | {"vocab_size": 64, "max_position_embeddings": 64},
        num_query_tokens=5,
    )
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(blip2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(blip2, tmp_path / "blip2"))


def change_config(folder: Path, change) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def test_it_computes_what_blip2_computes(blip2: Path) -> None:
    options = {"init_from": str(blip2)}
    assert connector_tokens("qformer", 4, options) == 5
    connector = fresh("qformer", options)
    assert initialise_connector("qformer", connector, options) == ()
    model = Blip2ForConditionalGeneration.from_pretrained(blip2).eval()
    features = torch.randn(2, 4, 32)
    queries = model.query_tokens.expand(2, -1, -1)
    with torch.no_grad():
        read = model.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        torch.testing.assert_close(connector(features), model.language_projection(read))


def test_a_model_made_of_it_needs_the_folder_no_more(workplace: Path, copy: Path, tmp_path: Path) -> None:
    options = {"init_from": str(copy)}
    lasting = lasting_options("qformer", options)
    assert lasting == {"num_queries": 5, "cross_attention_frequency": 2, **SIZES}
    assembly = assembly_with(workplace, "qformer", lasting)
    initialise_connector("qformer", assembly.model.model.multi_modal_projector, options)
    (tmp_path / "saved").mkdir()
    save_model(assembly, tmp_path / "saved")
    shutil.rmtree(copy)
    given = torch.randn(1, 4, 32)
    loaded = load_model(tmp_path / "saved").model.model.multi_modal_projector
    assert torch.equal(loaded(given), assembly.model.model.multi_modal_projector(given))


def test_another_llm_takes_all_but_the_projection(blip2: Path) -> None:
    options = {"init_from": str(blip2)}
    connector = fresh("qformer", options, llm=48)
    before = connector.projection.weight.clone()
    assert initialise_connector("qformer", connector, options) == ("projection.bias", "projection.weight")
    assert torch.equal(connector.projection.weight, before)
    stored = load_file(blip2 / "model.safetensors")
    assert torch.equal(connector.queries, stored["query_tokens"])


def test_another_encoder_is_refused_or_gets_fresh_projections(blip2: Path) -> None:
    with pytest.raises(RecipeError, match="reads features of width 32, this encoder gives 64; reset_cross_attention"):
        fresh("qformer", {"init_from": str(blip2)}, vision=64)
    options = {"init_from": str(blip2), "reset_cross_attention": True}
    connector = fresh("qformer", options, vision=64)
    prefix = "qformer.encoder.layer.0.crossattention.attention."
    left = sorted(f"{prefix}{layer}.{kind}" for layer in ("key", "value") for kind in ("weight", "bias"))
    assert initialise_connector("qformer", connector, options) == tuple(left)
    stored = load_file(blip2 / "model.safetensors")
    own = connector.state_dict()
    same = [name for name in own if name.startswith("qformer.") and name not in left]
    assert len(same) > 20
    assert all(torch.equal(own[name], stored[name]) for name in same)
    # Where all fits, all is taken.
    assert initialise_connector("qformer", fresh("qformer", options), options) == ()


def test_keys_that_do_not_fit_are_listed(copy: Path) -> None:
    options = {"init_from": str(copy)}
    connector = fresh("qformer", options)
    stored = load_file(copy / "model.safetensors")
    taken = stored.pop("qformer.layernorm.weight")
    stored["qformer.extra.weight"] = taken
    stored["query_tokens"] = torch.zeros(1, 4, 24)
    save_file(stored, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        initialise_connector("qformer", connector, options)
    assert "1 missing: qformer.layernorm.weight" in str(error.value)
    assert "1 unexpected: qformer.extra.weight" in str(error.value)
    assert "query_tokens (1, 4, 24) instead of (1, 5, 24)" in str(error.value)


def test_shards_are_read_and_pickles_are_not(blip2: Path, copy: Path) -> None:
    options = {"init_from": str(copy)}
    stored = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(stored)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, keys in parts.items():
        save_file({key: stored[key] for key in keys}, copy / part, metadata={"format": "pt"})
    index = {"weight_map": {key: part for part, keys in parts.items() for key in keys}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    connector = fresh("qformer", options)
    assert initialise_connector("qformer", connector, options) == ()
    assert torch.equal(connector.queries, stored["query_tokens"])
    for file in (*copy.glob("*.safetensors"), copy / "model.safetensors.index.json"):
        file.unlink()
    torch.save(stored, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="its weights are pickles"):
        initialise_connector("qformer", connector, options)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        initialise_connector("qformer", connector, options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: values.update(model_type="instructblip"), "model_type instructblip: init_from takes a BLIP-2"),
        (lambda values: values["qformer_config"].update(hidden_act="relu"), "qformer_config.hidden_act: relu"),
        (lambda values: values["qformer_config"].update(hidden_size="24"), "hidden_size: 24: is no size"),
        (lambda values: values.update(num_query_tokens=-1), "num_queries: -1: is no size"),
        (lambda values: values.update(vision_config=[1]), "vision_config: must be an object of keys"),
        (lambda values: values.update(auto_map={"AutoModel": "code.Model"}), "auto_map names code to run"),
    ],
)
def test_other_configurations_are_refused(copy: Path, change, said: str) -> None:
    change_config(copy, change)
    with pytest.raises(CheckpointError, match=said):
        connector_tokens("qformer", 4, {"init_from": str(copy)})


def test_options_that_contradict_each_other_are_refused(blip2: Path, tmp_path: Path) -> None:
    for options, said in (
        ({"init_from": str(blip2), "num_queries": 5, "hidden_size": 24}, "num_queries, hidden_size: init_from brings"),
        ({"init_from": str(blip2), "instruction": True}, "instruction: a BLIP-2 Q-Former has no weights for text"),
        ({"reset_cross_attention": True}, "reset_cross_attention: is for init_from"),
        ({"hidden_size": 32, "num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads"),
    ):
        with pytest.raises(RecipeError, match=said):
            connector_tokens("qformer", 4, options)
    with pytest.raises(CheckpointError, match=r"config.json: is missing"):
        connector_tokens("qformer", 4, {"init_from": str(tmp_path / "nowhere")})


def test_an_instruction_changes_the_tokens_and_padding_does_not() -> None:
    connector = fresh("qformer", {**QFORMER, "instruction": True})
    assert connector.reads_text and not fresh("qformer", QFORMER).reads_text
    features, text, mask = inputs(connector)
    read = connector(features, text, mask)
    assert read.shape == (2, 3, 32)
    torch.testing.assert_close(connector(features, text), read)
    other = text.clone()
    other[0, 2] = (other[0, 2] + 1) % 128
    changed = connector(features, other, mask)
    assert not torch.allclose(changed[0], read[0], atol=1e-4)
    torch.testing.assert_close(changed[1], read[1])
    assert not torch.allclose(connector(features), read, atol=1e-4)
    padding = torch.full((2, 3), 7)
    for order in ((text, padding), (padding, text)):
        padded = torch.cat(order, 1)
        seen = torch.cat([torch.zeros_like(each) if each is padding else mask for each in order], 1)
        torch.testing.assert_close(connector(features, padded, seen), read)
        assert not torch.allclose(connector(features, padded), read, atol=1e-4)


def test_without_text_the_weights_for_text_still_get_a_gradient() -> None:
    connector = fresh("qformer", {**QFORMER, "instruction": True})
    features, text, mask = inputs(connector)
    alone = connector(features)
    torch.testing.assert_close(connector(features, text[:, :0].float(), mask[:, :0]), alone)
    torch.testing.assert_close(connector(features, text, torch.zeros_like(mask)), alone)
    alone.sum().backward()
    assert [name for name, parameter in connector.named_parameters() if parameter.grad is None] == []
    assert not connector.qformer.embeddings.word_embeddings.weight.grad.any()


def test_a_long_instruction_shares_the_last_position() -> None:
    connector = fresh("qformer", {**QFORMER, "instruction": True})
    features, text, _ = inputs(connector, images=1)
    assert connector(features, text.repeat(1, 110)).isfinite().all()  # 550 tokens
    assert connector.qformer.embeddings.word_embeddings.num_embeddings == 128  # the LLM's vocabulary
