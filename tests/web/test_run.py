import argparse
import importlib.metadata
import socket
from pathlib import Path

import pytest

from llava_train.cli import main
from llava_train.errors import LlavaTrainError
from llava_train.web import run
from llava_train.web.run import AUTH_VARIABLE, credentials, names_of, open_port


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AUTH_VARIABLE, raising=False)
    monkeypatch.setattr(run, "version", lambda name: "6.0.0")


def options(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**{"host": "127.0.0.1", "port": 0, "auth": None, **given})


def test_the_port_is_taken_before_a_model_is_loaded() -> None:
    with open_port(options()) as port:
        assert port.getsockname()[0] == "127.0.0.1"
        port.listen()
        with pytest.raises(LlavaTrainError, match=r"--port \d+: .*in use"):
            open_port(options(port=port.getsockname()[1]))


def test_the_public_is_let_in_with_a_password_only(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with pytest.raises(LlavaTrainError, match=rf"--host 0\.0\.0\.0: .* without a password; set {AUTH_VARIABLE}"):
        open_port(options(host="0.0.0.0"))
    assert main(["web", "nowhere", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "without a password" in capsys.readouterr().err  # and not that there is no such model
    with open_port(options(host="0.0.0.0", auth="me:secret")) as port:
        assert isinstance(port, socket.socket)
    monkeypatch.setenv(AUTH_VARIABLE, "you:se:cret")
    assert credentials(options()) == ("you", "se:cret")
    with open_port(options(host="0.0.0.0")):
        pass
    for wrong in ("me", "me:", ":secret", ""):
        with pytest.raises(LlavaTrainError, match="must be USER:PASSWORD"):
            credentials(options(auth=wrong))


def test_gradio_must_be_there_and_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(run, "version", missing)
    with pytest.raises(LlavaTrainError, match=r"gradio: not installed; pip install 'llava-train\[web\]'"):
        open_port(options())
    monkeypatch.setattr(run, "version", lambda name: "3.36.1")
    with pytest.raises(LlavaTrainError, match=r"gradio 3.36.1: too old"):
        open_port(options())


def test_models_are_called_by_their_last_names_where_these_differ(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for each in (first, second):
        each.mkdir(parents=True)
    assert names_of([str(first), "owner/model"]) == ["run", "owner/model"]
    assert names_of([str(first), str(second)]) == [str(first), str(second)]
