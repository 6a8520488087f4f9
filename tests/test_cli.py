"""The command line as a user meets it: results on stdout, one clear message and exit 2 for a wrong request."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_train.arguments import build_parser
from llava_train.cli import COMMANDS, main
from tests import tiny


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([command, "--help"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out) > 400


def test_prepare_inspect_train_evaluate_export_chat(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(tiny.make_recipe(workplace))

    def result(*arguments: str) -> str:
        assert main([str(a) for a in arguments]) == 0
        return capsys.readouterr().out

    assert json.loads(result("prepare", recipe))["samples"] == 24
    rows = [json.loads(line) for line in result("inspect", recipe, "--jsonl").splitlines()]
    assert len(rows) == 24
    assert set(rows[0]) == {"id", "input_ids", "labels", "image_token_id", "image_tokens"}
    assert rows[0]["input_ids"].count(rows[0]["image_token_id"]) == rows[0]["image_tokens"] == 4
    shown = result("inspect", recipe, "--n", "1")
    assert "[image x1: 4 tokens each]" in shown
    assert ">> It is red.</s><<" in shown
    run = result("train", recipe, "optimization.max_steps=2").strip()
    assert run == str(workplace / "run")
    data = str(workplace / "data" / "data.json")
    figures = json.loads(
        result("evaluate", run, "--data", data, "--max-new-tokens", "2", "--out", f"{workplace}/a.jsonl")
    )
    assert figures["records"] == len((workplace / "a.jsonl").read_text().splitlines()) == 24
    out = result("export", run, f"{workplace}/hf", "--dtype", "float32").strip()
    image = f"{workplace}/data/0.png"
    answers = [
        result(
            "chat",
            model,
            "--image",
            image,
            "--prompt",
            "What colour is it?",
            "--max-new-tokens",
            "4",
            "--device",
            "cpu",
        )
        for model in (run, out)
    ]
    assert answers[0] == answers[1]


def wrong(workplace: Path, name: str) -> list[str]:
    recipe = str(tiny.make_recipe(workplace))
    run = str(workplace / "nothing")
    (workplace / "not.png").write_text("x")
    (workplace / "empty.json").write_text("")
    (workplace / "turns.json").write_text('[{"id": "a", "conversations": []}]')
    (workplace / "typo.yaml").write_text("sed: 1\n")
    turns = [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "y"}]
    (workplace / "image.json").write_text(json.dumps([{"id": "a", "image": "not.png", "conversations": turns}]))
    data = "data.train=[{path: '%s'}]"
    return {
        "no recipe": ["train", "nowhere.yaml"],
        "a typo": ["train", str(workplace / "typo.yaml")],
        "an override": ["train", recipe, "sed=1"],
        "no data": ["prepare", recipe, data % "nowhere.json"],
        "an empty file": ["prepare", recipe, data % (workplace / "empty.json")],
        "no turns": ["train", recipe, data % (workplace / "turns.json")],
        "no image": ["train", recipe, data % (workplace / "image.json")],
        "inspect no turns": ["inspect", recipe, data % (workplace / "turns.json")],
        "no model": ["chat", run, "--prompt", "x"],
        "an empty folder": ["export", str(workplace / "data"), str(workplace / "out")],
        "evaluate no model": ["evaluate", run, "--data", str(workplace / "data" / "data.json")],
        "no template": ["train", recipe, "data.template=vicuna"],
        "output is a file": ["train", recipe, f"output={workplace}/not.png/run"],
        "no encoder": ["train", recipe, f"model.vision={workplace}/data"],
        "no deepspeed config": ["train", recipe, "engine.deepspeed_config=none.json"],
    }[name]


WRONG = {
    "no recipe": "nowhere.yaml: cannot be read",
    "a typo": "typo.yaml:1: sed: unknown key; did you mean 'seed'?",
    "an override": "override sed: sed: unknown key",
    "no data": "nowhere.json: no such file",
    "an empty file": "empty.json: holds no record",
    "no turns": "turns.json[0] (id a): has no turns",
    "no image": "not.png: not a readable image",
    "inspect no turns": "has no turns",
    "no model": "no such folder",
    "an empty folder": "is no model",
    "evaluate no model": "no such folder",
    "no template": "did you mean 'vicuna_v1'?",
    "output is a file": "is a file, not a folder",
    "no encoder": "no vision encoder can be read",
    "no deepspeed config": "none.json: cannot be read",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_gets_one_message_and_exit_2(
    workplace: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(wrong(workplace, name)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert WRONG[name] in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(Exception, match="cannot be read"):
        main(["train", "nowhere.yaml", "--debug"])


def test_arguments_that_do_not_parse() -> None:
    for arguments in ([], ["fly"], ["train"], ["export", "x"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2


def test_importing_the_package_or_asking_for_help_loads_no_torch() -> None:
    code = "import sys, llava_train.cli; llava_train.cli.build_parser(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow(reason="real processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_loses_nothing(workplace: Path, finished: Path, number: int) -> None:
    """The step in flight is finished and saved, though the recipe saves no checkpoints of its own."""
    from tests.training.test_run import rows_of

    recipe = str(tiny.make_recipe(workplace, checkpoint__save_every=0))
    command = [sys.executable, "-m", "llava_train", "train", recipe]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = workplace / "run" / "metrics.jsonl"
    deadline = time.time() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.time() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert "with a checkpoint; the same command goes on" in err
    stopped_at = rows_of(workplace / "run")[-1]["step"]
    assert (workplace / "run" / "checkpoints" / f"step-{stopped_at}" / "manifest.json").is_file()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert rows_of(workplace / "run") == rows_of(finished)
