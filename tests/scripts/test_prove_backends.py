"""The runner of the back ends, with scripts of a few lines in their place; what it runs is proved where it runs."""

import json
import os
import signal
import subprocess
import sys
import time
import venv
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Namespace:
    """`prove_backends` and `backends/common`; environments are made without pip, which takes seconds."""
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), str(SCRIPTS / "backends"), *sys.path])
    import common
    import prove_backends

    monkeypatch.setattr(prove_backends, "SCRIPTS", tmp_path)
    monkeypatch.setattr(common.venv, "create", lambda home, with_pip: venv.EnvBuilder().create(home))
    return Namespace(prove=prove_backends, common=common)


def test_what_fails_is_told_from_what_cannot_run(
    runner: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    says = {
        "good": 'print(\'noise\'); print(\'{"back_end": "good", "ok": true, "version": "1"}\')',
        "absent": 'print(\'{"ok": null, "reason": "no network"}\')',
        "broken": "raise SystemExit(3)",
    }
    for name, text in says.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(runner.prove, "BACK_ENDS", {name: (f"{name}.py",) for name in says})
    assert runner.prove.main(["--only", "good,absent"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"good": {"ok": True, "version": "1"}, "absent": {"ok": None, "reason": "no network"}}
    assert "not run" in err and "no network" in err
    assert runner.prove.main(["--only", "good,broken"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert found["broken"]["ok"] is False and "status 3" in found["broken"]["reason"]


def test_an_unknown_name_lists_the_choices(runner: Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        runner.prove.main(["--only", "vllm,vlm"])
    assert ended.value.code == 2
    assert "no back end 'vlm'; choose of transformers-oldest" in capsys.readouterr().err


def test_every_back_end_has_its_script(runner: Namespace) -> None:
    assert all((SCRIPTS / "backends" / file).is_file() for file, *_ in runner.prove.BACK_ENDS.values())


def test_an_environment_is_made_once_and_anew_where_it_is_not_finished(runner: Namespace, tmp_path: Path) -> None:
    made: list[Sequence[str]] = []

    def make(*pins: str) -> Path:
        return runner.common.environment(tmp_path, "one", pins, lambda python, wanted: made.append(wanted))

    python = make("a==1")
    assert python.exists() and make("a==1") == python and made == [("a==1",)]
    (tmp_path / "one" / "older").touch()
    make("a==2")
    assert made == [("a==1",), ("a==2",)] and not (tmp_path / "one" / "older").exists()
    (tmp_path / "one" / runner.common._STAMP).unlink()
    make("a==2")
    assert len(made) == 3


def test_what_pip_cannot_install_is_not_run_and_leaves_nothing(runner: Namespace, tmp_path: Path) -> None:
    def fill(python: Path, pins: Sequence[str]) -> None:
        # A folder instead of the network, with nothing in it.
        runner.common.pip(Path(sys.executable), "download", "--no-index", "--find-links", str(tmp_path), *pins)

    with pytest.raises(runner.common.NotRunError, match=r"pip download failed: .*No matching distribution.*no-such"):
        runner.common.environment(tmp_path, "one", ["no-such-package==1"], fill)
    assert not (tmp_path / "one").exists()


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {backends!r})
import common

def fill(python, pins):
    Path({sign!r}).touch()
    time.sleep(60)

common.venv.create = lambda home, with_pip: Path(home).mkdir()
sys.exit(common.main("slow", "", lambda work, kept: common.environment(kept, "slow", [], fill)))
"""


RUN = """
import signal, sys
from pathlib import Path
sys.path.insert(0, {scripts!r})
import prove_backends

signal.signal(signal.SIGTERM, signal.default_int_handler)
prove_backends.SCRIPTS = Path({here!r})
prove_backends.BACK_ENDS = {{"slow": ("slow.py",)}}
sys.exit(prove_backends.main(["--only", "slow", "--environments", {kept!r}]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_environment_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    sign, kept = tmp_path / "sign", tmp_path / "kept"
    (tmp_path / "slow.py").write_text(SLOW.format(backends=str(SCRIPTS / "backends"), sign=str(sign)))
    program = RUN.format(scripts=str(SCRIPTS), here=str(tmp_path), kept=str(kept))
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, env={**os.environ}) as process:
        until = time.monotonic() + 120
        while not sign.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert (kept / "slow").exists()
        process.send_signal(number)
        assert process.wait(60) == 130
    assert not (kept / "slow").exists()
