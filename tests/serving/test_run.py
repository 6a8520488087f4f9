import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from openai import AuthenticationError, OpenAI

from llava_train import load_model
from llava_train.arguments import build_parser
from llava_train.cli import main
from llava_train.errors import LlavaTrainError
from llava_train.exporters.backends import vllm_command
from llava_train.serving.run import api_key, how_to_ask, open_port, served_name
from tests.serving.conftest import WAIT_S, expected, user


def options(*arguments: str):
    return build_parser().parse_args(["serve", "model", "--port", "0", *arguments])


def test_others_need_a_key(monkeypatch) -> None:
    monkeypatch.delenv("LLAVA_TRAIN_API_KEY", raising=False)
    with pytest.raises(LlavaTrainError, match=r"--host 0.0.0.0: others could use .* LLAVA_TRAIN_API_KEY"):
        open_port(options("--host", "0.0.0.0"))
    open_port(options("--host", "0.0.0.0", "--api-key", "x")).close()
    with open_port(options()) as port:
        assert port.getsockname()[0] == "127.0.0.1"
    monkeypatch.setenv("LLAVA_TRAIN_API_KEY", "from outside")
    assert api_key(options()) == "from outside"
    assert api_key(options("--api-key", "given")) == "given"
    open_port(options("--host", "0.0.0.0")).close()
    for wrong in ("", "a\nb", " x", "é"):
        with pytest.raises(LlavaTrainError, match="the API key must be"):
            api_key(options("--api-key", wrong))


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "nowhere", "--port", port]) == 2
    assert f"--port {port}: " in capsys.readouterr().err
    assert main(["serve", "nowhere", "--port", "0", "--host", "no.such.host.invalid"]) == 2
    assert main(["serve", "nowhere", "--port", "0"]) == 2


@pytest.mark.parametrize("wrong", ["--temperature=nan", "--temperature=-1", "--max-image-mb=0", "--max-image-mb=inf"])
def test_settings_out_of_range_are_refused_before_a_model_is_loaded(wrong: str, capsys) -> None:
    assert main(["serve", "nowhere", "--port", "0", wrong]) == 2
    assert "--temperature goes from 0 to 2" in capsys.readouterr().err


def test_the_packages_are_named(monkeypatch) -> None:
    monkeypatch.setattr("llava_train.serving.run.find_spec", lambda name: None)
    with pytest.raises(LlavaTrainError, match=r"fastapi and uvicorn: .*llava-train\[serve\]"):
        open_port(options())


def test_what_a_user_is_told(finished: Path, stock) -> None:
    with open_port(options()) as port:
        address = f"http://127.0.0.1:{port.getsockname()[1]}/v1"
        first, line = how_to_ask(port, "it's", key=True)
    assert address in first
    assert f"curl {address}/chat/completions" in line and '"Authorization: Bearer $LLAVA_TRAIN_API_KEY"' in line
    assert json.loads(shlex.split(line)[-1])["model"] == "it's"
    assert [served_name(str(finished)), served_name("org/model")] == [finished.name, "org/model"]
    ours = load_model(finished)
    exported = "llava-train export 'runs/a b' EXPORT, then vllm serve EXPORT --dtype bfloat16"
    assert vllm_command(ours, "runs/a b") == exported
    assert vllm_command(stock, "hf") == "vllm serve hf --dtype bfloat16"
    ours.model.model.multi_modal_projector = torch.nn.Identity()
    assert "vLLM cannot serve this model (connector 'mlp2x_gelu' has no place" in vllm_command(ours, "runs/a")


@pytest.mark.slow(reason="a process that imports torch")
def test_a_process_from_its_start_to_ctrl_c(finished: Path, parts: Path) -> None:
    command = [sys.executable, "-m", "llava_train", "serve", str(finished), "--port", "0", "--name", "it"]
    environment = {**os.environ, "LLAVA_TRAIN_API_KEY": "sesame", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            lines = iter(process.stderr.readline, "")
            address = next(line for line in lines if line.startswith("serving it at ")).split()[3]
            client = OpenAI(base_url=address, api_key="sesame", max_retries=0, timeout=WAIT_S)
            question = user(parts / "data" / "1.png", "What colour is it?")
            said = client.chat.completions.create(model="it", messages=[question], logprobs=True, max_tokens=6)
            with pytest.raises(AuthenticationError):
                client.with_options(api_key="other").models.list()
            client.close()
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
            assert process.wait(WAIT_S) == 130
        finally:
            process.kill()
    want = expected(load_model(finished), parts / "data", ["1.png"], "What colour is it?", 6)
    assert said.choices[0].message.content == want
    assert "chat 200" in rest and rest.rstrip().endswith("llava-train serve: stopped") and "Traceback" not in rest
