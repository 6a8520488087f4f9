"""Models in 8 and 4 bits, on other devices, with another attention."""

from pathlib import Path

import pytest
import torch

from llava_train import Conversation, load_model
from llava_train.data.pictures.images import open_image
from llava_train.errors import LlavaTrainError
from llava_train.inference import Prompt, batch_inputs, message, read_pictures
from llava_train.model.assemble import Assembly
from llava_train.model.checkpoint import merged
from llava_train.model.placement import Placement, load_placed
from llava_train.model.tuning import linear_layers


@pytest.fixture(scope="module")
def stock(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run in transformers' layout."""
    folder = tmp_path_factory.mktemp("stock")
    assembly = merged(load_model(finished))
    assembly.tokenizer.chat_template = assembly.template
    for part in (assembly.model, assembly.tokenizer, assembly.image_processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(params=["adapters", "stock"])
def folder(request: pytest.FixtureRequest, finished: Path, stock: Path) -> Path:
    return finished if request.param == "adapters" else stock


def logits(assembly: Assembly, parts: Path) -> torch.Tensor:
    """(T, vocabulary) of a question about a picture."""
    picture = open_image(parts / "data", "1.png")
    prompt = Prompt((message("user", "What colour is it?", 1),), read_pictures(assembly, [picture]))
    with torch.inference_mode():
        return assembly.model(**batch_inputs(assembly, [prompt])).logits[0].float()


def said(assembly: Assembly, parts: Path) -> list[str]:
    return list(Conversation(assembly, max_new_tokens=4).start(parts / "data" / "1.png", "What colour is it?"))


@pytest.mark.parametrize(("load_in", "within"), [("8bit", 0.02), ("4bit", 0.2)])
def test_quantised_layers_answer_nearly_alike(folder: Path, parts: Path, load_in: str, within: float) -> None:
    pytest.importorskip("bitsandbytes")
    whole = merged(load_model(folder))
    assembly = load_placed(folder, Placement(device="cpu", load_in=load_in))
    assert assembly.spec.lora is None
    names = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}
    kinds = {name: type(each).__name__ for name, each in assembly.model.named_modules()}
    quantised = {name for name, kind in kinds.items() if kind in names.values()}
    assert {kinds[name] for name in quantised} == {names[load_in]}
    assert quantised == {*linear_layers(assembly.model, "llm")}
    assert {name.split(".")[1] for name in quantised} == {"language_model"}
    stored = sum(assembly.model.get_submodule(name).weight.nbytes for name in quantised)
    full = sum(whole.model.get_submodule(name).weight.nbytes for name in quantised)
    assert stored * (4 if load_in == "8bit" else 8) == full
    expected = logits(whole, parts)
    difference = (logits(assembly, parts) - expected).norm() / expected.norm()
    assert within / 20 < difference < within
    assert len(said(assembly, parts)) > 1


def test_eager_attention_is_sdpa(folder: Path, parts: Path) -> None:
    sdpa, eager = (load_placed(folder, Placement("cpu", attn_implementation=each)) for each in ("sdpa", "eager"))
    assert eager.model.model.language_model.config._attn_implementation == "eager"
    assert torch.allclose(logits(sdpa, parts), logits(eager, parts), atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine with a CPU only")
@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_a_map_of_one_cpu_is_the_cpu(folder: Path, parts: Path, device_map: str) -> None:
    assembly = load_placed(folder, Placement(device_map=device_map))
    assert assembly.spec.lora is None
    assert {parameter.device.type for parameter in assembly.model.parameters()} == {"cpu"}
    assert torch.allclose(logits(assembly, parts), logits(load_model(folder), parts), atol=1e-5)


def test_precision(stock: Path) -> None:
    assert load_placed(stock, Placement("cpu")).model.dtype == torch.float32
    assert load_placed(stock, Placement("cpu", "bfloat16")).model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("placement", "reason"),
    [
        (Placement(device="tpu"), "choose auto, cpu, cuda or cuda:N"),
        (Placement(device="cuda"), "torch sees no GPU"),
        (Placement(dtype="int8"), "dtype: 'int8' is not known"),
        (Placement(load_in="2bit"), "load_in: '2bit' is not known"),  # type: ignore[arg-type]
        (Placement(device_map="all"), "device_map: 'all' is not known"),  # type: ignore[arg-type]
        (Placement(attn_implementation="flash"), "choose from sdpa, eager, flash_attention_2"),
        (Placement(device="cpu", attn_implementation="flash_attention_2"), "runs on GPUs only"),
        (Placement(device="cpu", device_map="auto"), "leave one of the two out"),
        (Placement(load_in="4bit", device_map="auto"), "device_map with 4bit: torch sees no GPU"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(placement: Placement, reason: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LlavaTrainError, match=reason) as caught:
        load_placed("no such folder", placement)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("placement", "reason"),
    [
        (Placement(device="cuda:3"), "torch sees only 1 GPUs"),
        (Placement(attn_implementation="flash_attention_2", dtype="float32"), "bfloat16 or float16 only"),
        (Placement(attn_implementation="flash_attention_2"), "flash-attn, not installed"),
        (Placement(load_in="8bit"), r"pip install 'llava-train\[bitsandbytes\]'"),
    ],
)
def test_what_a_machine_with_a_gpu_refuses(placement: Placement, reason: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LlavaTrainError, match=reason):
        load_placed("no such folder", placement)
