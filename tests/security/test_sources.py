"""S1 and S4 as the sources say it: nothing here reads pickles, runs text, or lets a library run a stranger's code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "marshal", "shelve", "dill", "joblib", "pickletools"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "np.fromregex",
    "pandas.read_pickle",
    "pd.read_pickle",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
    "yaml.full_load",
    "yaml.full_load_all",
}
RESTRICTED = "torch.load(.., weights_only=True)"
ALLOWED = {
    "originals/weights.py": [RESTRICTED],
    "exporters/stock_probe.py": ["'trust_remote_code': True"] * 2,
    "remote_code/target.py": ["trust_remote_code=True"],
    "backends/wheels.py": ["compile(..)", "exec(..)"],
}
"""Checkpoints of the original code are pickles: one place reads them, as tensors alone. A fresh process loads the
folder whose code we have just written. A script runs the loading code of back ends that have no engine for a CPU, out
of the wheels that pip fetched."""
SAFE_LOADERS = {"SafeLoader", "CSafeLoader"}
FLAGS = {"trust_remote_code": True, "shell": True, "allow_pickle": True, "weights_only": False}
"""Keyword -> the value that it must not be given."""


def faults(source: str) -> Iterator[str]:
    """What a module does that it must not, with its line."""
    tree = ast.parse(source)
    names = dict(_imported(tree))
    for node in ast.walk(tree):
        for fault in _faults_of(node, names):
            yield f"line {node.lineno}: {fault}"


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name here -> what it is in full, for `import a as b` and `from a import b as c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _faults_of(node: ast.AST, names: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in MODULES)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
        yield f"from {node.module} import ..."
    elif isinstance(node, ast.Dict):
        yield from (f"{key.value!r}: {value.value}" for key, value in zip(node.keys, node.values) if _flag(key, value))
    elif isinstance(node, ast.Call):
        called = _dotted(node.func, names)
        restricted = called == "torch.load" and any(map(_weights_only, node.keywords))
        if called in CALLS:
            yield f"{called}(..)" if not restricted else RESTRICTED
        if called.split(".")[-1] in ("__import__", "import_module") and any(map(_names_a_module, node.args[:1])):
            yield f"{called} of {ast.unparse(node.args[0])}"
        if called in ("yaml.load", "yaml.load_all") and not any(map(_safe_loader, [*node.args[1:], *node.keywords])):
            yield f"{called} without a safe loader"
        yield from (f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords if _flag(ast.Constant(k.arg), k.value))
        if called in ("np.load", "numpy.load") and len(node.args) > 2:
            yield "numpy.load with allow_pickle"
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        taken = node.args
        pairs = [*zip(taken.args[::-1], taken.defaults[::-1]), *zip(taken.kwonlyargs, taken.kw_defaults)]
        yield from (f"{a.arg} is {ast.unparse(d)} by default" for a, d in pairs if d and _flag(ast.Constant(a.arg), d))


def _flag(key: ast.expr | None, value: ast.expr) -> bool:
    known = isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and key.value in FLAGS
    return known and bool(value.value) is FLAGS[key.value] and value.value is not None


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _names_a_module(argument: ast.expr) -> bool:
    return isinstance(argument, ast.Constant) and str(argument.value).split(".")[0] in MODULES


def _safe_loader(argument: ast.expr | ast.keyword) -> bool:
    value = argument.value if isinstance(argument, ast.keyword) else argument
    return ast.unparse(value).split(".")[-1] in SAFE_LOADERS


def _weights_only(argument: ast.keyword) -> bool:
    return argument.arg == "weights_only" and ast.unparse(argument.value) == "True"


def modules() -> list[Path]:
    return sorted(p for folder in ("llava_train", "scripts", "data_prep") for p in (REPOSITORY / folder).rglob("*.py"))


def test_no_module_reads_pickles_or_runs_text() -> None:
    assert len(modules()) > 80
    found = [(path, fault) for path in modules() for fault in faults(path.read_text(encoding="utf-8"))]
    named: dict[str, list[str]] = {}
    for path, fault in found:
        named.setdefault("/".join(path.parts[-2:]), []).append(fault.partition(": ")[2])
    for each in named.values():
        each.sort()
    assert named == {name: sorted(each) for name, each in ALLOWED.items()}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import shelve, json",
        "def f():\n    from joblib import load",
        "import importlib\nimportlib.import_module('pickle')",
        "__import__('marshal')",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x', weights_only=True)",
        "from torch import load\nload('x')",
        "from torch import load as read\nread('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', 'r', True)",
        "import yaml\nyaml.load(x)",
        "import yaml\nyaml.load(x, Loader=yaml.Loader)",
        "import yaml\nyaml.load(x, yaml.UnsafeLoader)",
        "from yaml import unsafe_load\nunsafe_load(x)",
        "eval('1')",
        "exec(text)",
        "f(trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "def f(trust_remote_code=True): ...",
        "def f(*, trust_remote_code: bool = True): ...",
        "run('ls', shell=True)",
        "run('ls', shell=1)",
        "import os\nos.system('ls')",
        "from os import popen\npopen('ls')",
        "load(weights_only=False)",
    ],
)
def test_what_must_not_be_written_is_found(source: str) -> None:
    assert list(faults(source))


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "model.eval()",
        "import numpy as np\nnp.load('x')\nnp.load('x', allow_pickle=False)",
        "import yaml\nyaml.safe_load(x)\nyaml.load(x, Loader=yaml.SafeLoader)",
        "f(trust_remote_code=settings.trust_remote_code)\nf(trust_remote_code=False)",
        "import json\njson.load(x)",
        "def f(trust_remote_code=False): ...",
    ],
)
def test_what_may_be_written_is_not(source: str) -> None:
    assert not list(faults(source))
