"""A table of named things: exact names, no duplicates, and an unknown name lists the choices."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from llava_train.errors import RecipeError

T = TypeVar("T")


class Registry(Generic[T]):
    """Name -> thing. `kind` is the word that error messages use ("connector", "data format")."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._rows: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a row; raises ValueError on a name already taken."""

        def add(thing: T) -> T:
            if name in self._rows:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._rows[name] = thing
            return thing

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._rows:
            raise RecipeError(f"unknown {self.kind} {name!r}{suggest(name, self._rows)}")
        return self._rows[name]

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)


def suggest(name: str, choices: object) -> str:
    """The tail of an error about a wrong name: the nearest choice, or all of them."""
    names = sorted(str(choice) for choice in choices)  # type: ignore[attr-defined]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; choose one of {', '.join(names)}"
