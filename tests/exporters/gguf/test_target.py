import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llava_train import export, load_model
from llava_train.errors import ExportError
from llava_train.exporters.gguf.llm import llama3_divisors, neighbours
from llava_train.exporters.gguf.read_back import halves
from llava_train.exporters.gguf.target import Gguf
from llava_train.exporters.gguf.tokenizer import _scores, pre_tokenizer
from llava_train.exporters.gguf.vision import vision_entries
from llava_train.exporters.gguf.writing import Entry
from llava_train.exporters.target import Request
from llava_train.exporters.verify import reference_of
from llava_train.model.checkpoint import merged

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def assembly(finished: Path):
    return merged(load_model(finished))


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(finished, tmp_path_factory.mktemp("gguf") / "out", to="gguf", dtype="float32")


def test_two_files_a_modelfile_and_equal_logits(exported: Path, assembly) -> None:
    names = {path.name for path in exported.iterdir()}
    assert {"model.gguf", "mmproj.gguf", "Modelfile", "export_report.json"} <= names
    report = json.loads((exported / "export_report.json").read_text())
    assert max(report["max_logit_difference"].values()) <= 1e-4
    assert report["greedy_tokens_equal"] == report["greedy_tokens"]
    assert any("25814" in note for note in report["notes"])  # CLIP
    reader = gguf.GGUFReader(exported / "model.gguf")
    rows = len(assembly.model.get_input_embeddings().weight)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == rows == len(set(tokens))
    assert tokens[assembly.tokenizer.convert_tokens_to_ids("<image>")] == "<image>"
    assert reader.fields["tokenizer.ggml.add_bos_token"].contents() is True
    modelfile = (exported / "Modelfile").read_text()
    assert "<s>" not in modelfile  # Ollama writes it
    assert all((exported / line.removeprefix("FROM ./")).exists() for line in modelfile.splitlines() if "FROM" in line)


def test_the_proof_finds_a_weight_that_is_off(exported: Path, assembly, tmp_path: Path) -> None:
    for name in ("model.gguf", "mmproj.gguf", "Modelfile"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    reader = gguf.GGUFReader(tmp_path / "mmproj.gguf", "r+")
    row = next(row for row in reader.tensors if row.name == "mm.2.bias")
    row.data[:] = row.data + np.float32(0.5)
    reader.data.flush()
    with pytest.raises(ExportError, match="image: logits differ"):
        Gguf().prove(reference_of(assembly), tmp_path, Request(torch.float32))


def test_positions_are_written_for_the_class_embedding_behind_the_patches(assembly) -> None:
    entry = next(entry for entry in vision_entries(assembly) if entry.name == "v.position_embd.weight")
    assert np.array_equal(np.roll(entry.values(), 1, axis=0), entry.tensor.float().numpy())


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("", "vision_feature_select_strategy", "full", "takes the patches"),
        ("", "vision_feature_layer", [-2, -3], "from the lowest layer up"),
        ("", "projector_hidden_act", "relu", "GELU between the connector's layers"),
        ("vision_config", "model_type", "dinov2", "not dinov2"),
        ("text_config", "model_type", "olmo2", "of the kind 'olmo2'; proven in llama.cpp: llama, mistral"),
        ("text_config", "hidden_act", "relu", "has relu layers"),
        ("text_config", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "scale rope as 'yarn'"),
        ("text_config", "sliding_window", 8, "looks back 8 tokens"),
    ],
)
def test_what_llama_cpp_does_not_have_is_refused(
    assembly, monkeypatch: pytest.MonkeyPatch, part: str, name: str, value: object, message: str
) -> None:
    assert Gguf().refusal(assembly) is None
    config = assembly.model.config
    monkeypatch.setattr(getattr(config, part) if part else config, name, value, raising=False)
    assert message in str(Gguf().refusal(assembly))


def test_other_families_are_refused(assembly) -> None:
    tiles = replace(assembly, spec=replace(assembly.spec, architecture="llava_next"))
    assert "one square picture" in str(Gguf().refusal(tiles))


def test_pre_tokenizers_are_known_by_their_definition() -> None:
    odd = {"type": "Whitespace"}
    assert pre_tokenizer({"pre_tokenizer": odd}) is None
    known = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert pre_tokenizer({"pre_tokenizer": known}) == "gpt-2"
    assert pre_tokenizer({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, known]}}) == "smollm"


def test_linear_layers_are_quantised_where_their_rows_are_whole_blocks() -> None:
    wide, narrow = torch.zeros(2, 64), torch.zeros(2, 48)
    request = Request(torch.bfloat16, "int4")
    kinds = [Entry("w", wide, linear=True), Entry("w", narrow, linear=True), Entry("w", wide), Entry("b", wide[0])]
    assert [entry.stored_as(request) for entry in kinds] == ["Q4_0", "BF16", "BF16", "F32"]


def test_rotary_pairs_there_and_back() -> None:
    rows = torch.arange(24.0).reshape(12, 2)
    assert torch.equal(halves(neighbours(rows, 3), 3), rows)
    assert not torch.equal(neighbours(rows, 3), rows)


def test_llama_3_frequencies_are_transformers() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=rope, max_position_embeddings=131072)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(plain / llama3_divisors(config), theirs, rtol=1e-5, atol=0)


def test_sentencepiece_scores_follow_the_merges() -> None:
    backend = {"model": {"merges": [["a", "b"], ["ab", "c"], ["a", "bc"]]}}
    scores = _scores(["a", "ab", "abc"], backend)
    assert scores[1] > scores[2] > scores[0]
