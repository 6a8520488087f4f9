"""Folders that bring their code: the same ids, pixels, logits and answers as the model they were made of."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from llava_train import export, load_model, load_recipe, train
from llava_train.errors import CheckpointError
from llava_train.exporters.remote_code import target as target_module
from llava_train.exporters.remote_code.target import RemoteCode
from llava_train.exporters.verify import TOLERANCE, reference_of
from llava_train.inference import Prompt, batch_inputs, message, read_pictures, render
from llava_train.model.assemble import with_spec
from llava_train.model.spec import PartSource
from llava_train.model.towers.trunk import OpenClipTrunk
from tests import tiny
from tests.exporters.remote_code.carried import FUSED, assembly_of, compared, load, write
from tests.model.connectors.cases import CASES, QFORMER

INSTRUCTED = ("model.connector=qformer", f"model.connector_options={json.dumps({**QFORMER, 'instruction': True})}")
LONG = "data.max_length=1024"
CARRIED: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    # Every connector; encoders, heads that do something to logits, and shapes of pictures are met on the way.
    *[
        (
            llm,
            (tower,),
            (
                f"model.connector={name}",
                f"model.connector_options={json.dumps(options)}",
                f"model.image_aspect_ratio={shape}",
            ),
        )
        for (name, options), tower, llm, shape in zip(
            CASES,
            cycle(tiny.TOWERS),
            cycle(("llama", "gemma2", "phi", "granite", "gpt-neox")),
            cycle(("pad", "square", "crop", "pad")),
        )
    ],
    ("llama", ("clip", "dinov2", "siglip"), ("model.connector=pixel_shuffle",)),
    ("llama", ("siglip", "dinov2-registers"), ("model.vision_feature_layer=[-1, -2]",)),
    *[(llm, ("clip",), FUSED) for llm in ("llama-tied", "qwen3", "gemma2", "phi")],
    ("llama", ("clip", "dinov3"), (*FUSED, "model.connector=resampler", "model.connector_options={heads: 2}")),
    ("gemma2", ("clip",), ("model.image_aspect_ratio=anyres", LONG)),
    ("llama", ("clip", "dinov2"), ("model.image_aspect_ratio=anyres_max_2", LONG)),
]


def _name(value: Any) -> str:
    return value if isinstance(value, str) else "+".join(value).replace("model.", "")


def _pictures(count: int) -> list[Image.Image]:
    noise = np.random.default_rng(3).integers(0, 256, (count, 31, 45, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in noise]


@pytest.mark.parametrize(("llm", "towers", "overrides"), CARRIED, ids=_name)
def test_every_kind_of_model_is_the_same_in_its_folder(
    tmp_path: Path, llm: str, towers: tuple[str, ...], overrides: tuple[str, ...]
) -> None:
    assembly = assembly_of(tmp_path, llm, towers, *overrides)
    reference = reference_of(assembly)
    folder = write(assembly, tmp_path / "out")
    report = compared(reference, folder, 1e-5)
    assert report["greedy_tokens_equal"] == report["greedy_tokens"]
    sources = sorted(folder.glob("*.py"))
    assert [path.name for path in sources] == ["modeling_llava_train.py", "processing_llava_train.py"]
    for path in sources:
        assert _imported(path) <= {"torch", "transformers", *sys.stdlib_module_names}
    linter = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F", *map(str, sources)]
    done = subprocess.run(linter, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def _imported(path: Path) -> set[str]:
    """Top-level packages of all imports of a source, those in functions, too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.append(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("overrides", [INSTRUCTED, FUSED], ids=_name)
def test_half_precisions(tmp_path: Path, dtype: torch.dtype, overrides: tuple[str, ...]) -> None:
    assembly = assembly_of(tmp_path, "llama", ("clip", "dinov2"), *overrides)
    reference = reference_of(assembly)
    folder = write(assembly, tmp_path / "out", dtype)
    assert {weight.dtype for weight in load(folder)[0].parameters()} == {dtype}
    compared(reference, folder, TOLERANCE[dtype])


@pytest.mark.parametrize("overrides", [("model.connector=identity",), FUSED, INSTRUCTED], ids=_name)
def test_prompts_of_several_lengths_and_numbers_of_pictures_go_together(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    assembly = assembly_of(tmp_path, "llama", ("clip",), *overrides)
    pictures = _pictures(3)
    turns = [
        [message("user", "What?", 1)],
        [message("user", "What is in the picture?", 1), message("assistant", "A circle."), message("user", "And?", 1)],
    ]
    prompts = [
        Prompt(tuple(each), read_pictures(assembly, shown)) for each, shown in zip(turns, (pictures[:1], pictures[1:]))
    ]
    texts = [render(assembly, each) for each in turns]
    with torch.inference_mode():
        inputs = batch_inputs(assembly, prompts)
        expected = assembly.model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, -8:]
    model, processor = load(write(assembly, tmp_path / "out"))
    assert [processor.apply_chat_template(each, add_generation_prompt=True) for each in turns] == texts
    asked = processor(
        text=texts,
        images=[pictures[:1], pictures[1:]],
        return_tensors="pt",
        padding=True,
        add_special_tokens=False,
    )
    with torch.inference_mode():
        found = model.generate(**asked, max_new_tokens=8, do_sample=False)
    assert torch.equal(found[:, : asked["input_ids"].shape[1]], asked["input_ids"])
    assert torch.equal(found[:, -8:], expected)


def test_each_picture_has_its_own_question(tmp_path: Path) -> None:
    assembly = assembly_of(tmp_path, "llama", ("clip",), *INSTRUCTED)
    _, processor = load(write(assembly, tmp_path / "out"))
    turns = [message("user", "What?", 2), message("assistant", "A circle."), message("user", "And what colour?", 1)]
    asked = processor(text=render(assembly, turns), images=_pictures(3), return_tensors="pt", add_special_tokens=False)
    assert asked["question_ids"].shape[0] == 3
    texts = [
        processor.tokenizer.decode(ids[mask == 1]) for ids, mask in zip(asked["question_ids"], asked["question_mask"])
    ]
    assert texts == ["\n\nWhat? ASSISTANT:", "\nWhat? ASSISTANT:", "\nAnd what colour? ASSISTANT:"]


def test_a_question_changes_what_the_connector_reads(tmp_path: Path) -> None:
    assembly = assembly_of(tmp_path, "llama", ("clip",), *INSTRUCTED)
    model, processor = load(write(assembly, tmp_path / "out"))
    text = render(assembly, [message("user", "What?", 1)])
    asked = processor(text=text, images=_pictures(1), return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        told = model(**asked).logits
        asked["question_ids"] = asked["question_ids"].flip(1)
        assert not torch.allclose(model(**asked).logits, told, atol=1e-4)
    with pytest.raises(ValueError, match="6 places for tokens of pictures, there are 3"):
        model(input_ids=asked["input_ids"].repeat(2, 1), pixel_values=asked["pixel_values"])


@pytest.mark.slow(reason="a training run and a fresh process")
@pytest.mark.parametrize(
    ("towers", "overrides"), [(("clip",), INSTRUCTED), (("clip", "dinov2-registers"), FUSED)], ids=_name
)
def test_an_export_of_a_run_is_proved_without_our_package(
    tmp_path: Path, towers: tuple[str, ...], overrides: tuple[str, ...]
) -> None:
    paths = [str(tiny.make_tower(tmp_path / tower, tower)) for tower in towers]
    chosen = [f"model.vision={json.dumps(paths)}", "optimization.max_steps=2", "checkpoint.save_every=0", *overrides]
    run = train(load_recipe(tiny.make_recipe(tmp_path), chosen))
    out = export(run, tmp_path / "out", to="remote-code", dtype="float32")
    report = json.loads((out / "export_report.json").read_text())
    assert max(report["max_logit_difference"].values()) <= 1e-5
    assert report["greedy_tokens_equal"] == report["greedy_tokens"]
    assert "ForConditionalGeneration in a fresh process" in report["loaded_with"]
    stops = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert load_model(run).tokenizer.eos_token_id in stops


def test_large_weights_come_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "SHARD", "100KB")
    assembly = assembly_of(tmp_path, "llama-tied", ("clip",), "model.connector=avg_pool")
    reference = reference_of(assembly)
    folder = write(assembly, tmp_path / "out")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert (folder / "model.safetensors.index.json").is_file()
    compared(reference, folder, 1e-5)


def test_the_model_without_its_head(tmp_path: Path) -> None:
    folder = write(assembly_of(tmp_path, "llama", ("clip",), *FUSED), tmp_path / "out")
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "LlavaTrainCrossModel"


def test_what_is_refused(tmp_path: Path) -> None:
    refusal = RemoteCode().refusal
    assembly = assembly_of(tmp_path, "llama", ("clip",), *INSTRUCTED)
    part = PartSource("somewhere", kind="llava")
    published = with_spec(assembly, architecture="qwen2_vl", llm=part)
    assert refusal(published) == "a qwen2_vl model is of a class of transformers as it is: take target 'hf'"
    assert "reads the question" in str(refusal(with_spec(assembly, architecture="llava_cross_attention")))
    silent = "{% for m in messages %}{% generation %}{{ m['content'] + '\\n' }}{% endgeneration %}{% endfor %}"
    object.__setattr__(assembly, "template", silent)
    assert "where a question ends" in str(refusal(assembly))
    decoder = type(assembly.model.model.language_model)
    other = assembly_of(tmp_path / "other")
    assert refusal(other) is None
    other.model.model.language_model.__class__ = type("MyModel", (decoder,), {"__module__": "transformers_modules.x"})
    assert refusal(other) == "MyModel is code of the language model's own folder"
    other.model.model.language_model.__class__ = decoder
    other.model.model.vision_tower.__class__ = type("Trunk", (OpenClipTrunk,), {})
    assert "open_clip's own code" in str(refusal(other))


def test_our_own_loader_says_what_such_a_folder_is(tmp_path: Path) -> None:
    folder = write(assembly_of(tmp_path, "llama", ("clip",), "model.connector=avg_pool"), tmp_path / "out")
    with pytest.raises(CheckpointError, match="is an export of target remote-code, for others; load the run"):
        load_model(folder)
