"""Folders in the original LLaVA layout: what is read from them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llava_train.data.encode import Encoder, encode
from llava_train.data.sample import ImageRef, Sample, Turn
from llava_train.data.templates.fit import resolve_template
from llava_train.errors import CheckpointError, RecipeError
from llava_train.model.checkpoint import WEIGHTS, load_model, save_model
from llava_train.model.llm import load_llm
from llava_train.model.originals.loading import is_original, load_original, original_facts, require_frame
from llava_train.model.towers.features import image_features
from llava_train.training.objective import Objective
from scripts import compare_reference
from tests import tiny
from tests.conftest import GOLDEN
from tests.model.originals.made import TOWER, projector, write_config, write_full, write_lora, write_weights

REFERENCE = GOLDEN / "llava_reference"


def logits(assembly: Any) -> torch.Tensor:
    ids = torch.tensor([[1, *[assembly.model.config.image_token_id] * assembly.spec.image_tokens, 5, 6, 7]])
    pixels = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
    with torch.no_grad():
        return assembly.model(input_ids=ids, pixel_values=pixels).logits


def again(assembly: Any, folder: Path) -> Any:
    folder.mkdir()
    save_model(assembly, folder)
    return load_model(folder)


def linears(assembly: Any) -> list[nn.Linear]:
    return [each for each in assembly.model.model.multi_modal_projector.modules() if isinstance(each, nn.Linear)]


@pytest.mark.parametrize(("kind", "tower"), [("shards", False), ("old shards", True), ("safetensors", True)])
def test_losses_are_those_of_the_original_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tower: bool
) -> None:
    llm, vision, folder = tmp_path / "llm", tmp_path / "vision", tmp_path / "any name"
    shutil.copytree(REFERENCE / "llm", llm)
    shutil.copytree(REFERENCE / "vision", vision)
    parts = json.loads((REFERENCE / "expected.json").read_text()).values()
    free = max(set(range(800)) - {token for part in parts for each in part["records"] for token in each["input_ids"]})
    tokenizer = tiny.make_tokenizer(llm)
    tokenizer.pad_token = "<unk>"  # as published; so that nothing but `<image>` is new
    tokenizer.add_tokens([f"<filler{number}>" for number in range(free - len(tokenizer))])
    tokenizer.save_pretrained(llm)
    tensors = write_full(folder, llm, vision, kind, tower, mm_hidden_size=48)
    published = load_file(REFERENCE / "mm_projector.safetensors")
    tensors |= {
        f"model.mm_projector.{key.split('.', key.count('.') - 1)[-1]}": value for key, value in published.items()
    }
    for file in [*folder.glob("pytorch*"), *folder.glob("model*")]:
        file.unlink()
    write_weights(folder, tensors, kind)
    if tower:  # its weights are in the folder, so those of the part cannot matter
        (vision / "model.safetensors").unlink()
    assembly = load_original(folder)
    assert assembly.model.config.image_token_id == free
    assert assembly.spec.vision.included is tower
    monkeypatch.setattr(compare_reference, "build", lambda *_: Objective(assembly.model))
    assert compare_reference.within(compare_reference.compare(REFERENCE))


@pytest.mark.parametrize("tower", [False, True])
def test_a_full_checkpoint_stands_alone_when_saved(workplace: Path, tower: bool) -> None:
    write_full(workplace / "o", workplace / "llm", workplace / "vision", tower=tower)
    assembly = load_original(workplace / "o")
    before = logits(assembly)
    (workplace / "saved").mkdir()
    save_model(assembly, workplace / "saved")
    shutil.rmtree(workplace / "o")
    shutil.rmtree(workplace / "llm")
    if tower:
        shutil.rmtree(workplace / "vision")
    loaded = load_model(workplace / "saved")
    assert torch.equal(logits(loaded), before)
    assert loaded.spec == assembly.spec
    spec = assembly.spec
    assert (spec.template, spec.image_tokens, spec.image_aspect_ratio) == ("chatml", 4, "pad")  # as the tokenizer says
    assert assembly.image_processor.do_pad


def test_stage_1_brings_the_projector_alone(workplace: Path) -> None:
    folder, tensors = workplace / "o", projector([32, 32, 32])
    write_config(folder, workplace / "llm", workplace / "vision")
    torch.save({key: value.bfloat16() for key, value in tensors.items()}, folder / "mm_projector.bin")
    assembly = load_original(folder)
    first, second = linears(assembly)
    assert torch.equal(first.weight, tensors["model.mm_projector.0.weight"].bfloat16().float())
    assert torch.equal(second.bias, tensors["model.mm_projector.2.bias"].bfloat16().float())
    loaded = again(assembly, workplace / "saved")
    assert torch.equal(logits(loaded), logits(assembly))
    assert (workplace / "saved" / WEIGHTS).stat().st_size < 60_000  # projector and new rows: no LLM, no tower
    shutil.move(workplace / "llm", workplace / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model\.llm: name the language model"):
        load_original(folder)
    moved = load_original(folder, llm=str(workplace / "elsewhere"))
    assert torch.equal(logits(moved), logits(assembly))


@pytest.mark.parametrize("on", ["llm", "original"])
@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_are_merged_exactly(workplace: Path, on: str, rslora: bool) -> None:
    llm, vision, folder = workplace / "llm", workplace / "vision", workplace / "o"
    if on == "original":
        write_full(workplace / "base", llm, vision)
    adapters = write_lora(folder, llm, vision, workplace / "base" if on == "original" else None, use_rslora=rslora)
    assembly = load_original(folder)
    found = assembly.model.model.language_model.state_dict()
    for key, tensor in load_file(llm / "model.safetensors").items():
        name = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{name}.lora_A.weight" in adapters:
            product = adapters[f"{name}.lora_B.weight"] @ adapters[f"{name}.lora_A.weight"]
            tensor = tensor + (12 / 2 if rslora else 12 / 4) * product
        if key.startswith("model.layers."):
            torch.testing.assert_close(found[key.removeprefix("model.")], tensor, atol=1e-6, rtol=1e-6)
    assert torch.equal(linears(assembly)[0].bias, projector([32, 32])["model.mm_projector.0.bias"] + 1)
    assert torch.equal(logits(again(assembly, workplace / "saved")), logits(assembly))


@pytest.mark.parametrize("family", ["llama-tied", "mistral", "qwen2"])
def test_families_give_the_text_logits_of_their_llm(workplace: Path, family: str) -> None:
    llm = tiny.make_llm(workplace / family, family)
    write_full(workplace / "o", llm, workplace / "vision")
    assembly, bare = load_original(workplace / "o"), load_llm(str(llm), "sdpa")
    ids = torch.tensor([[1, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        ours, theirs = assembly.model(input_ids=ids).logits, bare(input_ids=ids).logits
    rows = bare.lm_head.weight.shape[0]
    assert torch.equal(ours[..., :rows], theirs)
    tied = assembly.model.lm_head.weight is assembly.model.get_input_embeddings().weight
    assert tied is (family == "llama-tied")
    assert torch.equal(logits(again(assembly, workplace / "saved")), logits(assembly))


def test_the_old_way_to_write_rope_counts(workplace: Path) -> None:
    scaled = {"rope_theta": 500_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    write_full(workplace / "o", workplace / "llm", workplace / "vision", **scaled)
    assembly = load_original(workplace / "o")
    for each in (assembly, again(assembly, workplace / "saved")):
        found = each.model.model.language_model.rotary_emb.inv_freq
        torch.testing.assert_close(found, 500_000.0 ** -(torch.arange(0, 16, 2) / 16) / 2)


def test_other_projectors(workplace: Path) -> None:
    linear = {"model.mm_projector.weight": torch.randn(32, 32), "model.mm_projector.bias": torch.randn(32)}
    for name, tensors, count in (("linear", linear, 1), ("mlp3x_gelu", projector([32] * 4), 3)):
        folder = workplace / name
        write_config(folder, workplace / "llm", workplace / "vision", mm_projector_type=name)
        torch.save(tensors, folder / "mm_projector.bin")
        assembly = load_original(folder)
        features = torch.randn(1, 4, 32)
        expected = features
        for number, (weight, bias) in enumerate(zip(list(tensors.values())[::2], list(tensors.values())[1::2])):
            expected = nn.functional.linear(nn.functional.gelu(expected) if number else expected, weight, bias)
        assert len(linears(assembly)) == count
        torch.testing.assert_close(assembly.model.model.multi_modal_projector(features), expected)


def test_siglip_without_its_last_layer(workplace: Path) -> None:
    vision, folder = tiny.make_tower(workplace / "siglip", "siglip"), workplace / "o"
    tensors = write_full(folder, workplace / "llm", vision, "bin", tower=True)
    gone = (f"{TOWER}vision_model.head.", f"{TOWER}vision_model.encoder.layers.2.")
    write_weights(folder, {key: value for key, value in tensors.items() if not key.startswith(gone)}, "bin")
    whole = workplace / "whole"
    write_config(whole, workplace / "llm", vision, image_aspect_ratio=None)
    torch.save(projector([32, 32, 32]), whole / "mm_projector.bin")
    pixels = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
    short, long = load_original(folder), load_original(whole)
    assert short.spec.image_tokens == long.spec.image_tokens == 4
    assert torch.equal(image_features(short.model, pixels), image_features(long.model, pixels))
    assert (short.spec.image_aspect_ratio, long.spec.image_aspect_ratio) == ("pad", "square")
    assert torch.equal(logits(again(short, workplace / "saved")), logits(short))


def test_features_and_pictures_as_the_configuration_says(workplace: Path) -> None:
    changes = {"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1, "image_aspect_ratio": None}
    write_full(workplace / "o", workplace / "llm", workplace / "vision", **changes)
    config = load_original(workplace / "o", torch.bfloat16).model.config
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-1, "full")
    tokenizer, processor, spec = original_facts(workplace / "o")
    assert (spec.image_tokens, spec.image_aspect_ratio) == (5, "crop")
    assert processor.do_center_crop
    assert tokenizer.convert_ids_to_tokens(config.image_token_id) == "<image>"
    assert tokenizer.model_max_length == 2048


def test_tiles_become_llava_next(workplace: Path) -> None:
    grid = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    grid["image_grid_pinpoints"] = [[28, 56], [56, 28], [84, 28]]
    folder = workplace / "o"
    tensors = write_full(folder, workplace / "llm", workplace / "vision", "bin", **grid)
    with pytest.raises(CheckpointError, match=r"1 missing: tiles\.image_newline"):
        load_original(folder)
    tensors["model.image_newline"] = torch.randn(32)
    write_weights(folder, tensors, "bin")
    assembly = load_original(folder)
    assert assembly.spec.architecture == "llava_next"
    assert torch.equal(assembly.model.model.image_newline, tensors["model.image_newline"])
    # Width first in the original, height first in transformers.
    assert assembly.model.config.image_grid_pinpoints == [[56, 28], [28, 56], [28, 84]]
    assert assembly.image_processor.image_grid_pinpoints == [[56, 28], [28, 56], [28, 84]]
    loaded = again(assembly, workplace / "saved")
    assert torch.equal(loaded.model.model.image_newline, tensors["model.image_newline"])


def test_pictures_in_a_frame(workplace: Path) -> None:
    llm = workplace / "llm"
    rows = json.loads((llm / "config.json").read_text())["vocab_size"]
    grown = load_llm(str(llm), "sdpa")
    grown.resize_token_embeddings(rows + 2, mean_resizing=False)
    grown.save_pretrained(llm)
    write_full(workplace / "o", llm, workplace / "vision", mm_use_im_start_end=True)
    assembly = load_original(workplace / "o")
    name, template = resolve_template("tokenizer", assembly.tokenizer)
    require_frame(assembly.tokenizer, template)
    with pytest.raises(RecipeError, match=r"data\.template: tokenizer, which writes that"):
        require_frame(assembly.tokenizer, resolve_template("vicuna_v1", assembly.tokenizer)[1])
    assert (assembly.spec.template, assembly.template) == (name, template)
    sample = Sample("a", (Turn("user", (ImageRef("0.png"), "\nWhat?")), Turn("assistant", ("A dot.",))))
    encoded = encode(sample, Encoder(assembly.tokenizer, template, 4, 512))
    text = assembly.tokenizer.decode(encoded.input_ids)
    assert "user\n<im_start><image><im_end>\nWhat?<|im_end|>" in text
    assert assembly.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"]) == [rows, rows + 1]


def test_a_sentencepiece_model_is_converted(workplace: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.TEXTS * 20),
        model_writer=made,
        vocab_size=330,
        byte_fallback=True,
        model_type="bpe",
        character_coverage=1.0,
        minloglevel=2,
    )
    folder = workplace / "o"
    write_full(folder, workplace / "llm", workplace / "vision")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": False, "pad_token": "<unk>"}))
    tokenizer, _, spec = original_facts(folder)
    text = "What is in the picture? A red circle."
    expected = spm.SentencePieceProcessor(model_proto=made.getvalue()).encode(text)
    assert tokenizer(text, add_special_tokens=False).input_ids == expected
    assert spec.template == "vicuna_v1"
    (folder / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="pip install sentencepiece protobuf"):
        original_facts(folder)


def test_what_is_original_is_told_by_content(workplace: Path) -> None:
    llm, vision = workplace / "llm", workplace / "vision"
    write_full(workplace / "full", llm, vision)
    write_lora(workplace / "lora", llm, vision)
    write_config(workplace / "stage1", llm, vision)
    (workplace / "stage1" / "mm_projector.bin").touch()
    (workplace / "llava-v1.5-7b").mkdir()
    stock = workplace / "stock"
    stock.mkdir()
    assembly = load_original(workplace / "full")
    assembly.model.save_pretrained(stock)
    again(assembly, workplace / "ours")
    found = {path.name: is_original(path) for path in workplace.iterdir() if path.is_dir()}
    assert {name for name, original in found.items() if original} == {"full", "lora", "stage1"}
    assert {"llava-v1.5-7b", "stock", "llm", "ours"} <= found.keys()
