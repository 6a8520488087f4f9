import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_train import export, load_model
from llava_train.errors import CheckpointError, ExportError
from llava_train.exporters import quantize
from llava_train.exporters.huggingface import HuggingFace
from llava_train.exporters.quantize import Packing, packable, packed, scales, to_precision
from llava_train.exporters.target import Request
from llava_train.exporters.verify import Reference, reference_of
from llava_train.model.assemble import Assembly
from llava_train.model.checkpoint import merged


def written(model: Path, folder: Path, kind: str, dtype: torch.dtype) -> Assembly:
    """The model as it was rounded when its folder was written."""
    assembly = merged(load_model(model))
    to_precision(assembly.model, dtype)
    folder.mkdir()
    HuggingFace().write(assembly, folder, Request(dtype, kind))
    return assembly


@pytest.fixture(scope="module")
def int4(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    folder = tmp_path_factory.mktemp("quantised") / "int4"
    return folder, reference_of(written(finished, folder, "int4", torch.bfloat16))


def rows_of_one_group(weight: torch.Tensor, scale: torch.Tensor, highest: int) -> torch.Tensor:
    return (weight / scale).round().clamp(-highest - 1, highest) * scale


@pytest.mark.parametrize("packing", [quantize.PACKINGS["int4"], Packing(8, None)])
def test_scales_give_no_more_error_than_the_largest_weight_would_and_groups_of_zeros_none(packing: Packing) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    weight[0] = 0.0
    weight[1, 3] = 20.0
    found = scales(weight, packing, torch.bfloat16)
    highest, groups = 2 ** (packing.bits - 1) - 1, weight.unflatten(1, (-1, packing.group or 64))
    assert found.shape == groups.shape[:2]
    assert torch.equal(found, found.bfloat16().float())
    plain = (groups.abs().amax(-1, keepdim=True) / highest).bfloat16().float()
    plain = torch.where(plain == 0, 1.0, plain)
    ours, theirs = (
        (groups - rows_of_one_group(groups, s, highest)).square().sum(-1) for s in (found.unsqueeze(-1), plain)
    )
    assert (ours <= theirs).all()
    assert (ours < theirs).any() == (packing.bits == 4)
    assert (ours[0] == 0).all()


def test_only_linear_layers_of_the_language_model_are_packed(int4: tuple[Path, Reference]) -> None:
    folder, _ = int4
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    stems = {key.removesuffix("_packed") for key in tensors if key.endswith(".weight_packed")}
    assert stems == {
        f"language_model.model.layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in ("mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{each}_proj" for each in "qkvo"))
    }
    assert not stems & tensors.keys()
    # 48 wide, which is no multiple of 32
    assert tensors["language_model.model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
    key = "language_model.model.layers.0.mlp.up_proj.weight"
    assert tensors[f"{key}_shape"].tolist() == [48, 32]
    assert (tensors[f"{key}_packed"].shape, tensors[f"{key}_packed"].dtype) == ((48, 4), torch.int32)
    assert (tensors[f"{key}_scale"].shape, tensors[f"{key}_scale"].dtype) == ((48, 1), torch.bfloat16)
    said = config["quantization_config"]
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", "pack-quantized")
    assert said["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert [name for name in said["ignore"] if "down_proj" in name] == [
        rf"re:.*\blayers\.{layer}\.mlp\.down_proj$" for layer in (0, 1)
    ]


@pytest.mark.parametrize(("kind", "bits", "most"), [("int8", 8, 0.007), ("int4", 4, 0.1)])
def test_what_is_loaded_is_what_was_rounded(finished: Path, tmp_path: Path, kind: str, bits: int, most: float) -> None:
    rounded = written(finished, tmp_path / kind, kind, torch.float32)
    before, after = merged(load_model(finished)).model, load_model(tmp_path / kind).model
    assert not hasattr(after.config, "quantization_config")
    assert not hasattr(rounded.model.config, "quantization_config")
    weights, changed = dict(before.named_parameters()), 0
    for name, weight in after.named_parameters():
        assert torch.equal(weight, rounded.model.get_parameter(name)), name
        difference = float((weight - weights[name]).detach().norm() / weights[name].detach().norm().clamp_min(1e-9))
        assert difference <= most, name
        changed += difference > 0
    assert changed == len(packable(before, quantize.PACKINGS[kind]))
    layer = after.model.language_model.layers[0].self_attn.q_proj.weight
    assert len(layer[0].unique()) <= min(32, 2**bits)


def test_the_export_of_a_quantised_export_is_plain(int4: tuple[Path, Reference], tmp_path: Path) -> None:
    folder, _ = int4
    assembly = load_model(folder)
    (tmp_path / "plain").mkdir()
    HuggingFace().write(assembly, tmp_path / "plain", Request(torch.float32))
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not any("packed" in key for key in load_file(tmp_path / "plain" / "model.safetensors"))


def test_an_export_says_what_rounding_cost(finished: Path, tmp_path: Path) -> None:
    out = export(finished, tmp_path / "hf", quantize="int4")
    report = json.loads((out / "export_report.json").read_text())
    assert (report["quantize"], report["verified"], report["tolerance"]) == ("int4", True, quantize.TOLERANCE)
    assert 1e-3 < max(report["rounding"]["max_logit_difference"].values()) < 1
    held_out = report["held_out"]
    assert (held_out["metric"], held_out["records"]) == ("exact_match", 5)
    assert math.isclose(held_out["drop"], held_out["before"] - held_out["after"])
    assert held_out["loss"]["rise"] != 0


def test_a_wrongly_packed_weight_is_found(int4: tuple[Path, Reference]) -> None:
    folder, reference = int4
    file = folder / "model.safetensors"
    good = file.read_bytes()
    tensors = load_file(file)
    packed_weight = tensors["language_model.model.layers.1.self_attn.v_proj.weight_packed"]
    packed_weight[0, 0] ^= 0x7
    save_file(tensors, file, metadata={"format": "pt"})
    try:
        with pytest.raises(ExportError, match="logits differ by"):
            HuggingFace().prove(reference, folder, Request(torch.bfloat16, "int4"))
    finally:
        file.write_bytes(good)


def test_precision_leaves_frequencies_alone(finished: Path) -> None:
    model = load_model(finished).model
    to_precision(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_model_without_a_fitting_layer_is_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantize.PACKINGS, "int4", Packing(4, 128))
    with pytest.raises(ExportError, match="no linear layer"), packed(merged(load_model(finished)).model, "int4"):
        pass


def test_a_missing_library_is_named_with_its_extra(
    finished: Path, int4: tuple[Path, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(finished).model
    for name in [name for name in sys.modules if name.partition(".")[0] == "compressed_tensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(ExportError, match=r"pip install 'llava-train\[quantize\]'"), packed(model, "int8"):
        pass
    with pytest.raises(CheckpointError, match=r"quantised: pip install 'llava-train\[quantize\]'"):
        load_model(int4[0])


def test_other_ways_of_quantising_are_refused_by_name(int4: tuple[Path, Reference], tmp_path: Path) -> None:
    for path in int4[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantised by 'bitsandbytes'; only compressed-tensors is read"):
        load_model(tmp_path)
