"""The two commands for a fresh machine: what they check before they install anything."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.parametrize("script", sorted((REPOSITORY / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_valid_shell(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_an_old_or_missing_python_is_told() -> None:
    done = subprocess.run(
        ["bash", str(REPOSITORY / "scripts" / "demo.sh")],
        env={"PYTHON": "/nowhere/python", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Python 3.10 or newer is needed" in done.stderr


def test_nothing_in_the_project_names_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    names = [
        n for n in listed.stdout.splitlines() if n.endswith((".py", ".md", ".yaml", ".toml", ".sh", ".txt", ".json"))
    ]
    if not names:
        pytest.skip("not a git checkout")
    for name in names:
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        for word in ("/wor" + "k/", "/ro" + "ot/", "/ho" + "me/", "file" + ":///o"):
            assert word not in text, (name, word)
