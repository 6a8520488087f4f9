"""S3: hostile files in place of every part. Each is refused by name, soon, in little memory; nothing in it runs."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava_train import load_model, load_recipe
from llava_train.errors import CheckpointError
from llava_train.exporters.huggingface import HuggingFace
from llava_train.exporters.target import Request
from llava_train.files import sha256_file
from llava_train.model.checkpoint import merged
from llava_train.model.llm import load_llm, load_tokenizer
from llava_train.training.setup import build
from tests import tiny
from tests.security.attacks import CODE, CONFIGS, FOLDERS, GGUFS, WEIGHTS, Attack, change_json, hostile_pickle
from tests.security.guarded import refused

pytestmark = pytest.mark.timeout(60)  # a pipe that is opened waits for ever

Load = Callable[[], object]


@pytest.fixture(scope="session")
def stock(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run as a stock Llava folder."""
    folder = tmp_path_factory.mktemp("stock")
    HuggingFace().write(merged(load_model(finished)), folder, Request(torch.float32))
    return folder


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def place(parts: Path, finished: Path, stock: Path, tmp_path: Path) -> Callable[[str], tuple[Path, Load]]:
    """A part by name -> (a copy of its folder, how it is loaded)."""

    def copied(part: str) -> tuple[Path, Load]:
        source = {"llm": parts / "llm", "vision": parts / "vision", "stock": stock, "model": finished / "final"}[part]
        folder = tmp_path / part
        shutil.copytree(source, folder)
        if part in ("stock", "model"):
            return folder, lambda: load_model(folder)
        for other in ({"llm", "vision"} - {part}) | {"data"}:
            (tmp_path / other).symlink_to(parts / other)
        recipe = load_recipe(tiny.make_recipe(tmp_path))
        return folder, lambda: build(recipe)

    return copied


def sign(folder: Path) -> None:
    """Have the manifest of a model folder list what lies there now: who changes a file can change a hash."""

    def update(values: dict) -> None:
        files = [file for file in folder.iterdir() if file.is_file() and file.name != "llava_train.json"]
        values["files"] = {file.name: sha256_file(file) for file in files if "dev" not in str(file.resolve())}

    change_json(folder / "llava_train.json", update)


@pytest.mark.parametrize("attack", WEIGHTS, ids=lambda attack: attack.name)
@pytest.mark.parametrize("part", ["llm", "vision", "stock", "model"])
def test_weights(place, canary: Path, part: str, attack: Attack) -> None:
    folder, load = place(part)
    file = folder / ("weights.safetensors" if part == "model" else "model.safetensors")
    attack.place(file, canary)
    if part == "model":
        sign(folder)
    assert file.name in refused(load, canary)


@pytest.mark.parametrize("attack", CODE, ids=lambda attack: attack.name)
@pytest.mark.parametrize("part", ["llm", "vision", "stock", "model"])
def test_code_beside_a_configuration(place, canary: Path, part: str, attack: Attack) -> None:
    folder, load = place(part)
    attack.place(folder, canary)
    if part == "model":
        sign(folder)
    message = refused(load, canary)
    assert re.search(attack.says, message)
    assert "model.trust_remote_code" in message


@pytest.mark.parametrize("attack", CONFIGS, ids=lambda attack: attack.name)
@pytest.mark.parametrize("part", ["llm", "vision", "stock", "model"])
def test_configurations(place, canary: Path, part: str, attack: Attack) -> None:
    folder, load = place(part)
    attack.place(folder, canary)
    if part == "model":
        change_json(folder / "llava_train.json", lambda values: values["llm"].update(included=True))
        sign(folder)
    assert attack.says in refused(load, canary)


@pytest.mark.parametrize("attack", FOLDERS, ids=lambda attack: attack.name)
@pytest.mark.parametrize("part", ["llm", "vision", "stock"])
def test_other_weights(place, canary: Path, part: str, attack: Attack) -> None:
    folder, load = place(part)
    attack.place(folder, canary)
    if attack.name == "index of nothing":
        (folder / "model.safetensors").unlink()
    assert re.search(attack.says, refused(load, canary))


@pytest.mark.parametrize("attack", GGUFS, ids=lambda attack: attack.name)
def test_gguf(canary: Path, attack: Attack) -> None:
    pytest.importorskip("gguf")
    file = canary.with_name("model.gguf")
    attack.place(file, canary)
    for load in (lambda: load_llm(str(file), "sdpa"), lambda: load_tokenizer(str(file))):
        assert file.name in refused(load, canary)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "", ".", "pipe"])
def test_files_a_manifest_lists(place, canary: Path, name: str) -> None:
    folder, load = place("model")
    (folder.parent / "outside").write_text("x")
    change_json(folder / "llava_train.json", lambda values: values["files"].update({name: "0" * 64}))
    if name == "pipe":
        os.mkfifo(folder / "pipe")
    assert "llava_train.json" in refused(load, canary)


MANIFESTS = {
    "files is a list": {"files": ["config.json"]},
    "a hash that is a number": {"files": {"config.json": 5}},
    "unknown connector": {"connector": "os.system"},
    "connector options": {"connector_options": {"__class__": "x"}},
    "lora of 10^12": {"lora": {"r": 10**12, "alpha": 1, "dropout": 0.0, "targets": ["model.language_model.layers.0"]}},
    "lora on a pattern": {"lora": {"r": 1, "alpha": 1, "dropout": 0.0, "targets": ["(a+)+$"]}},
    "a source that is no folder": {"llm": {"path": "/dev/zero", "revision": None, "kind": "hf"}},
    "an unknown kind of source": {"llm": {"path": "x", "revision": None, "kind": "pickle"}},
    "text for a number": {"image_size": "__import__('os')", "image_tokens": []},
}


@pytest.mark.parametrize("values", MANIFESTS.values(), ids=MANIFESTS)
def test_what_a_manifest_says(place, canary: Path, values: dict) -> None:
    folder, load = place("model")
    change_json(folder / "llava_train.json", lambda now: now.update(values))
    refused(load, canary)


def test_a_folder_of_the_hubs_cache_is_read(parts: Path, place, tmp_path: Path) -> None:
    """Its files are links to `blobs`; pickles that lie beside safetensors are left alone."""
    folder, _ = place("llm")
    blobs = folder / "blobs"
    snapshot = folder / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (parts / "llm").iterdir():
        shutil.move(folder / file.name, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (snapshot / "pytorch_model.bin").write_bytes(b"never read")
    build(load_recipe(tmp_path / "recipe.yaml", [f"model.llm={snapshot}"]))


def test_code_is_run_where_the_recipe_says_so(
    parts: Path, place, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model.trust_remote_code` is off by default; on, it lets the language model's folder alone run code."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(canary.with_name("modules")))
    folder, _ = place("llm")
    recipe, tower = canary.with_name("recipe.yaml"), canary.with_name("tower")
    assert load_recipe(recipe).model.trust_remote_code is False
    shutil.copytree(parts / "vision", tower)
    CODE[0].place(tower, canary)
    with pytest.raises(CheckpointError, match="the language model only"):
        build(load_recipe(recipe, ["model.trust_remote_code=true", f"model.vision={tower}"]))
    assert not canary.exists()
    CODE[0].place(folder, canary)
    with pytest.raises(CheckpointError, match=r"no tokenizer|no language model"):  # it is not worth loading
        build(load_recipe(recipe, ["model.trust_remote_code=true"]))
    assert canary.exists()


def test_the_attacks_would_harm(tmp_path: Path, parts: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by what they were made for, hostile files do make the canary."""
    from transformers import AutoConfig, dynamic_module_utils

    for how in ("system", "resolve"):
        pickle.loads(hostile_pickle(canary, how))
        canary.unlink()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(parts / "llm", tmp_path / "llm")
    CODE[0].place(tmp_path / "llm", canary)
    AutoConfig.from_pretrained(tmp_path / "llm", trust_remote_code=True)
    assert canary.exists()
