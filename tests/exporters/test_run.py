"""What `export` leaves behind, whatever the target, and what it says when it cannot."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava_train import load_model
from llava_train.cli import main
from llava_train.errors import CheckpointError, ExportError, StorageError
from llava_train.exporters.huggingface import HuggingFace
from llava_train.exporters.run import export
from llava_train.files import sha256_file


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(finished, tmp_path_factory.mktemp("exported") / "hf", dtype="float32")


def test_a_folder_says_what_it_is(exported: Path) -> None:
    report = json.loads((exported / "export_report.json").read_text())
    assert report["verified"]
    assert report["files"] == {
        path.name: sha256_file(path) for path in exported.iterdir() if path.name != "export_report.json"
    }
    assert {row["name"] for row in report["back_ends"]} >= {"transformers", "vLLM", "SGLang", "LMDeploy"}
    assert "# hf" in (exported / "README.md").read_text()
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1  # weights, too, are for others to read
    here = [
        path.name for path in exported.iterdir() if path.suffix != ".safetensors" and "/pytest-" in path.read_text()
    ]
    assert not here


def test_the_command_says_who_reads_it(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(finished), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "out")
    assert "vLLM: vllm serve out" in said.err
    assert "not SGLang: " in said.err
    assert main(["export", str(finished), str(tmp_path / "out")]) == 2
    assert "exists; choose another folder, or --overwrite" in capsys.readouterr().err


def test_only_an_export_is_overwritten_and_never_what_is_exported(
    exported: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path / "out")
    with pytest.raises(ExportError, match="holds what is exported"):
        export(tmp_path / "out", tmp_path / "out", overwrite=True)
    for folder in (finished, finished.parent, tmp_path):
        with pytest.raises(ExportError, match="is no export, and --overwrite replaces exports alone"):
            export(finished, folder, overwrite=True)
    export(finished, tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out" / "export_report.json").read_text())["dtype"] == "bfloat16"


def test_the_targets_that_fit_are_those_of_the_merged_model_and_those_that_keep_adapters(
    finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"targets that can: hf, gguf, remote-code, llava, llava-lora$"):
        export(finished, tmp_path / "out", to="adapter")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}", "{tmp}/out"], "is no model"),
        (["{tmp}/nothing", "{tmp}/out"], "no such folder"),
        (["{run}", "{tmp}/out", "--to", "guff"], "did you mean 'gguf'?"),
        (["{run}", "{tmp}/out", "--dtype", "int3"], "dtype 'int3': choose one of"),
        (["{run}", "{tmp}/out", "--quantize", "int3"], "invalid choice: 'int3'"),
        (["{run}", "{tmp}/out", "--to", "llava", "--quantize", "int4"], "targets that can: hf, gguf"),
        (["{run}", "{run}/recipe.yaml/out"], "is a file, not a folder"),
        (["{run}", "{tmp}/out", "--quantize", "int4", "--held-out", "{tmp}/none.json"], "none.json"),
        (["{run}", "{tmp}/out", "--image-root", "{tmp}"], "are for --quantize"),
        (["{run}", "{tmp}/out", "--quantize", "int4", "--image-root", "{tmp}"], "is for --held-out"),
    ],
)
def test_a_wrong_request_is_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        status = main(["export", *(each.format(tmp=tmp_path, run=finished) for each in arguments)])
    except SystemExit as stopped:  # argparse
        status = int(str(stopped.code))
    said = capsys.readouterr().err.strip()
    assert status == 2
    assert message in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (ExportError("no"), ExportError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), StorageError),
    ],
)
def test_what_stops_in_the_middle_leaves_nothing(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    kind: type[BaseException],
) -> None:
    def fail(*_: Any) -> None:
        assert list(tmp_path.glob(".hf.*.tmp/model.safetensors"))  # it was half done
        raise failure

    monkeypatch.setattr(HuggingFace, "prove", fail)
    with pytest.raises(kind):
        export(finished, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "quantize", "extra"), [("gguf", None, "gguf"), ("hf", "int4", "quantize")])
def test_a_package_that_is_missing_is_told_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, quantize: str | None, extra: str
) -> None:
    for module in ("llava_train.exporters.gguf.target", "llava_train.exporters.huggingface"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=rf"not installed: pip install 'llava-train\[{extra}\]'"):
        export(tmp_path / "nothing", tmp_path / "out", to=to, quantize=quantize)


def test_a_gguf_folder_is_for_others(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"holds GGUF files, which are for llama\.cpp"):
        load_model(tmp_path)


def test_what_a_killed_export_left_goes_with_the_next(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, other = tmp_path / ".hf.1-abcd.tmp", tmp_path / ".mine.tmp"
    for folder in (left, other):
        folder.mkdir()
        os.utime(folder, (0, 0))
    monkeypatch.setattr(HuggingFace, "prove", lambda *_: {"max_logit_difference": {}})
    export(finished, tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", ".mine.tmp"}


def test_a_tampered_shard_is_refused(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    weights = bytearray((exported / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: does not match its sha256 in export_report\.json"):
        load_model(tmp_path)
