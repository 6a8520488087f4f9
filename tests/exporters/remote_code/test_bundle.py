from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_train.errors import ExportError
from llava_train.exporters.remote_code.bundle import bundle, unbound

PARTS = '''\
"""Parts of things.

W is a width.
"""

from __future__ import annotations

import math as m
from dataclasses import dataclass

# What everything is
# multiplied by.
FACTOR = 3
"""A number."""


def area(width: int) -> float:
    """W -> its square."""
    return m.pow(width, 2) * FACTOR


def _unused() -> int:
    return 1


@dataclass
class Base:
    """A base."""

    width: int

    @classmethod
    def made(cls) -> Base:
        """One."""
        return cls(_unused())

    def size(self) -> float:
        """Its area."""
        return area(self.width)
'''
WHOLE = '''\
"""A whole."""

from __future__ import annotations

from typing import Any

from bundled_pack import parts
from bundled_pack.heavy import weight
from bundled_pack.parts import Base
from bundled_pack.parts import area as size_of


class Whole(Base):
    """More than its parts."""

    def size(self, kind: Any = None) -> float:
        """Twice."""
        return 2 * super().size() + weight(0)


def late() -> None:
    from bundled_pack.parts import area


def by_module() -> float:
    return parts.area(2)


def renamed() -> float:
    return size_of(2)


def area() -> float:
    return Base(2).size()


for name in (1, 2):
    pass


def looped() -> int:
    return name
'''
HEAVY = "def weight(x):\n    return x + 1000\n\n\ndef feather(x):\n    return x\n\n\nlight = weight\n"
FEATHER = {("bundled_pack.heavy", "weight"): ("bundled_pack.stand_ins", "weight")}


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "bundled_pack"
    folder.mkdir()
    stand_ins = "def weight(x):\n    return x\n"
    sources = {"__init__": "one = 1\n", "parts": PARTS, "whole": WHOLE, "heavy": HEAVY, "stand_ins": stand_ins}
    for name, text in sources.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "bundled_pack"]:
        del sys.modules[name]


def test_what_is_named_is_taken_in_and_nothing_else() -> None:
    text = bundle([("bundled_pack.whole", "Whole")], FEATHER, ["*.made"])
    assert "_unused" not in text
    assert "+ 1000" not in text
    assert "# From bundled_pack.parts\n# Parts of things.\n#\n# W is a width.\n" in text
    assert '# What everything is\n# multiplied by.\nFACTOR = 3\n"""A number."""\n' in text
    assert "import math as m\nfrom dataclasses import dataclass\nfrom typing import Any\n" in text
    assert "bundled_pack import" not in text
    path = Path(sys.path[0]) / "made_whole.py"
    path.write_text(text)
    from made_whole import Whole  # type: ignore[import-not-found]

    assert Whole(2).size() == 24
    del sys.modules["made_whole"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["late"], "late imports bundled_pack.parts where it runs"),
        (["by_module"], "parts is a module"),
        (["renamed"], "would lack size_of"),
        (["looped"], "name is no definition"),
        (["area"], "area is defined in bundled_pack.(parts|whole) and in bundled_pack.(parts|whole): rename"),
    ],
)
def test_what_no_file_can_be_made_of_is_said(names: list[str], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        bundle([("bundled_pack.whole", name) for name in names])


def test_a_class_without_a_source_is_said() -> None:
    with pytest.raises(ExportError, match="its source cannot be read"):
        bundle([("sys", "Thing")])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import a\ndef f(b):\n    c = 1\n    return a, b, c, len, d\n", {"d"}),
        ("class A:\n    x: B = 1\n    def f(self) -> C:\n        return self.x\n", {"B", "C"}),
        ("from __future__ import annotations\ndef f(x: D) -> None: ...\n", {"D"}),
        ("f = lambda e: e + g\n[h for h in (1,)]\n", {"g"}),
    ],
)
def test_names_that_nothing_binds(text: str, expected: set[str]) -> None:
    assert unbound(text) == expected
