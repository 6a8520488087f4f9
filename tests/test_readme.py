"""The README's commands run, and its tree is the tree. Hub models are replaced by tiny local ones."""

import re
import shlex
from pathlib import Path

import pytest

from llava_train.cli import build_parser, main
from tests import tiny
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
COMMANDS = [line for line in LINES if line.startswith("llava-train")]


def test_the_readme_opens_with_the_two_commands() -> None:
    assert LINES[:2] == ["bash scripts/demo.sh", "bash scripts/test.sh"]
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses_and_names_files_that_exist(line: str) -> None:
    options = build_parser().parse_args(shlex.split(line)[1:])
    if hasattr(options, "recipe"):
        assert (REPOSITORY / options.recipe).is_file()


def test_the_commands_run_in_their_order(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The commands of "A run of your own", on tiny parts under the names that the README uses."""
    monkeypatch.chdir(workplace)
    stage1 = tiny.make_recipe(workplace, output="runs/llava-1.5-7b-stage1", optimization__max_steps=2)
    folder = workplace / "configs" / "llava-1.5"
    folder.mkdir(parents=True)
    stage1.rename(folder / "7b-stage1.yaml")
    tiny.make_recipe(workplace, init_from="runs/llava-1.5-7b-stage1", optimization__max_steps=2).rename(
        folder / "7b-stage2-lora.yaml"
    )
    (workplace / "test.json").write_text((workplace / "data" / "data.json").read_text())
    (workplace / "data").rename(workplace / "images")
    (workplace / "data").symlink_to(workplace / "images")
    (workplace / "picture.png").write_bytes((workplace / "images" / "0.png").read_bytes())
    monkeypatch.setattr("builtins.input", lambda: "/quit")
    ran = [line for line in COMMANDS if "runs/demo" not in line]
    for line in ran:
        assert main(shlex.split(line)[1:]) == 0, line
    assert (workplace / "exported" / "export_report.json").is_file()
    assert len(ran) == 8


def test_the_python_example_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(workplace)
    recipe = tiny.make_recipe(workplace, optimization__max_steps=2)
    (workplace / "test.json").write_text((workplace / "data" / "data.json").read_text())
    (workplace / "images").symlink_to(workplace / "data")
    namespace: dict = {}
    exec(code.replace("configs/demo/stage1.yaml", str(recipe)), namespace)
    assert namespace["figures"]["records"] == 24
    assert (workplace / "exported" / "config.json").is_file()


def test_the_fault_example_is_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (shown,) = re.findall(r"```\n(llava-train train: mine.*?)```", README, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(
        "model:\n  vision: v\n  llm: l\n  conector: linear\noptimization:\n  learning_rate: fast\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["train", "mine.yaml"]) == 2
    assert capsys.readouterr().err == shown


def test_the_tree_is_the_tree() -> None:
    (tree,) = re.findall(r"```\n(llava_train/\n.*?)```", README, re.DOTALL)
    inside = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    package = REPOSITORY / "llava_train"
    real = {
        p.name for p in package.iterdir() if p.name not in ("__init__.py", "__main__.py", "errors.py", "registry.py")
    }
    assert inside == {name for name in real if not name.startswith("__")}
    top = {line.split()[0].rstrip("/") for line in tree.splitlines() if not line.startswith(" ")}
    assert all((REPOSITORY / name).is_dir() for name in top)


def test_links_lead_somewhere() -> None:
    for document in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
            assert target.startswith("http") or (document.parent / target).exists(), (document.name, target)
