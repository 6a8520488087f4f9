from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from llava_train import load_recipe
from llava_train.errors import CheckpointError, LlavaTrainError
from llava_train.model.joining import fingerprint
from llava_train.model.llm import add_image_token, grow_vocabulary, load_llm, load_tokenizer
from llava_train.training.setup import build
from tests import tiny


def recipe_of(folder: Path, *overrides: str, llm: str = "llama", tower: str = "clip"):
    tiny.make_llm(folder / "llm", llm)
    tiny.make_tower(folder / "vision", tower)
    select = "full" if tower == "siglip" else "default"
    return load_recipe(tiny.make_recipe(folder), [f"model.vision_feature_select_strategy={select}", *overrides])


@pytest.mark.parametrize("family", tiny.LLMS)
def test_text_logits_equal_the_bare_llm(tmp_path: Path, family: str) -> None:
    assembly = build(recipe_of(tmp_path, llm=family))
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    ids = torch.randint(5, 300, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = assembly.model(input_ids=ids).logits, bare(input_ids=ids).logits
    assert type(assembly.model) is LlavaForConditionalGeneration
    assert torch.equal(ours[..., : theirs.shape[-1]], theirs)
    assert ours.shape[-1] % 64 == 0
    assert assembly.tokenizer.convert_tokens_to_ids("<image>") == assembly.model.config.image_token_id


@pytest.mark.parametrize("tower", tiny.TOWERS)
@pytest.mark.parametrize("layer", [-2, [-3, -2]])
def test_towers_give_the_announced_tokens(tmp_path: Path, tower: str, layer: object) -> None:
    assembly = build(recipe_of(tmp_path, f"model.vision_feature_layer={layer}", tower=tower))
    features = assembly.model.get_image_features(torch.rand(2, 3, 28, 28)).pooler_output
    assert assembly.spec.image_tokens == 4
    assert [tuple(f.shape) for f in features] == [(4, 32), (4, 32)]


def test_keeping_cls_gives_one_token_more(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "model.vision_feature_select_strategy=full")
    assert build(recipe).spec.image_tokens == 5


def test_dinov2_takes_another_image_size(tmp_path: Path) -> None:
    assembly = build(recipe_of(tmp_path, "model.image_size=42", tower="dinov2"))
    assert assembly.spec.image_tokens == 9
    assert assembly.model.get_image_features(torch.rand(1, 3, 42, 42)).pooler_output[0].shape == (9, 32)


@pytest.mark.parametrize(
    ("overrides", "tower", "expected"),
    [
        (["model.vision_feature_layer=7"], "clip", "hidden states 0 to 3"),
        (["model.vision_feature_select_strategy=default"], "siglip", "drops the CLS position"),
        (["model.image_size=42"], "clip", "only DINOv2 interpolates"),
        (["model.image_size=30"], "dinov2", "not a multiple of the patch size"),
        (["model.vision=nowhere"], "clip", "no vision encoder can be read"),
        (["model.llm=nowhere"], "clip", "no tokenizer can be read"),
        (["model.llm=nowhere.gguf"], "clip", "no such file"),
        (["model.vision={llm}"], "clip", "not a vision encoder we know"),
        (["model.connector=mlp3x_gleu"], "clip", "unknown connector"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, overrides: list[str], tower: str, expected: str) -> None:
    overrides = [override.replace("{llm}", str(tmp_path / "llm")) for override in overrides]
    with pytest.raises(LlavaTrainError, match=expected):
        build(recipe_of(tmp_path, *overrides, tower=tower))


def test_missing_weights_are_an_error_that_lists_them(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    recipe = recipe_of(tmp_path)
    for part, expected in (("llm", "model.norm.weight"), ("vision", "pre_layrnorm")):
        path = tmp_path / part / "model.safetensors"
        tensors = load_file(path)
        kept = {key: value for key, value in tensors.items() if expected not in key}
        save_file(kept, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"missing: .*{expected}"):
            build(recipe)
        save_file(tensors, path, metadata={"format": "pt"})


def test_new_rows_follow_the_published_converter(tmp_path: Path) -> None:
    tiny.make_llm(tmp_path)
    model = load_llm(str(tmp_path), "sdpa")
    known = model.get_input_embeddings().weight.detach().clone()
    tokenizer = load_tokenizer(str(tmp_path))
    add_image_token(tokenizer)
    old = grow_vocabulary(model, len(tokenizer), seed=1)
    grown = model.get_input_embeddings().weight.detach()
    assert torch.equal(grown[:old], known)
    assert len(grown) % 64 == 0
    # Distributed as the old rows, a thousandth of a standard deviation wide (sqrt(1e-5) of it).
    assert (grown[old:] - known.mean(0)).abs().max() < 5 * 1e-5**0.5 * known.std()
    assert (grown[old:] - known.mean(0)).std() > 0.5 * 1e-5**0.5 * known.std()
    assert torch.equal(model.get_output_embeddings().weight[old:], grown[old:])
    assert grow_vocabulary(model, len(tokenizer), seed=1) == len(grown)


def test_an_llm_comes_from_a_gguf_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    plain = tiny.make_llm(tmp_path / "llm")
    model, tokenizer = load_llm(str(plain), "sdpa"), load_tokenizer(str(plain))
    path = tmp_path / "model.gguf"
    tiny.write_gguf(gguf, path, model, tokenizer)
    loaded = load_llm(str(path), "sdpa")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert load_tokenizer(str(path)).encode("What is it?") == tokenizer.encode("What is it?")
    assert loaded.config.to_dict().get("quantization_config") is None


def test_a_fingerprint_sees_one_changed_weight(tmp_path: Path) -> None:
    tiny.make_llm(tmp_path)
    model = load_llm(str(tmp_path), "sdpa")
    before = fingerprint(model)
    assert fingerprint(load_llm(str(tmp_path), "sdpa")) == before
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] += 1e-3
    assert fingerprint(model) != before


def test_trust_remote_code_is_off(tmp_path: Path) -> None:
    import json

    recipe = recipe_of(tmp_path)
    path = tmp_path / "llm" / "config.json"
    values = json.loads(path.read_text())
    canary = tmp_path / "canary"
    (tmp_path / "llm" / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass C: pass\n")
    values |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}
    path.write_text(json.dumps(values))
    with pytest.raises(LlavaTrainError):
        build(recipe)
    assert not canary.exists()
