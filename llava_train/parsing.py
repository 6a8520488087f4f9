"""YAML layers -> typed dataclasses, remembering where each value stood.

Nothing here knows what a recipe holds: it follows the annotations of the dataclass it is given.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llava_train.errors import RecipeError
from llava_train.registry import suggest

Key = tuple[str, ...]


@dataclass(frozen=True)
class Fault:
    """One thing wrong at one key."""

    key: Key
    message: str


@dataclass
class Places:
    """Dotted key -> `file:line` of the value (or of the nearest parent that was written)."""

    known: dict[Key, str] = field(default_factory=dict)

    def of(self, key: Key) -> str:
        """Where `key` was written; its parent's place where it was left out."""
        while key and key not in self.known:
            key = key[:-1]
        return self.known.get(key, "recipe")


def read_layers(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], Places]:
    """Merge a YAML file over its `base:` chain, then `key=value` overrides; mappings merge, lists replace."""
    places = Places()
    values = _read_file(path, places, ())
    for override in overrides:
        dotted, separator, text = override.partition("=")
        if not separator or not dotted:
            raise RecipeError(f"override {override!r}: write it as dotted.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"override {override!r}: the value is not YAML: {error}") from error
        key = tuple(dotted.split("."))
        _set(values, key, value)
        places.known[key] = f"override {dotted}"
    return values, places


def _read_file(path: Path, places: Places, chain: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve() if chain else path
    if path in chain:
        raise RecipeError(f"{path}: base files form a circle")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    base = values.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise RecipeError(f"{path}: base: must be one path, relative to this file")
    below = _read_file(path.parent / base, places, (*chain, path.resolve())) if base else {}
    _mark(node, (), path, places)
    return _merge(below, values)


def _mark(node: yaml.Node | None, key: Key, path: Path, places: Places) -> None:
    if node is None:
        return
    places.known[key] = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            _mark(child, (*key, str(name.value)), path, places)
            places.known[(*key, str(name.value))] = f"{path}:{name.start_mark.line + 1}"
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _mark(child, (*key, str(index)), path, places)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _set(values: dict[str, Any], key: Key, value: Any) -> None:
    target: Any = values
    for name in key[:-1]:
        if isinstance(target, list) and name.isdigit() and int(name) < len(target):
            target = target[int(name)]
        elif isinstance(target, dict):
            target = target.setdefault(name, {})
        else:
            raise RecipeError(f"override {'.'.join(key)}: {name!r} is not a section")
    if isinstance(target, list) and key[-1].isdigit() and int(key[-1]) < len(target):
        target[int(key[-1])] = value
    elif isinstance(target, dict):
        target[key[-1]] = value
    else:
        raise RecipeError(f"override {'.'.join(key)}: there is no such section")


def build(kind: Any, value: Any, key: Key, places: Places, faults: list[Fault]) -> Any:
    """`value` as an instance of the annotation `kind`; every mismatch is added to `faults`."""
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, key, places, faults, default=None)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _build_union(arguments, value, key, places, faults)
    if origin is typing.Literal:
        if value in arguments:
            return value
        faults.append(Fault(key, f"{value!r} is none of {', '.join(map(str, arguments))}"))
    elif origin is list:
        if isinstance(value, list):
            (item,) = arguments
            return [build(item, each, (*key, str(i)), places, faults) for i, each in enumerate(value)]
        faults.append(Fault(key, f"must be a list, not {_said(value)}"))
    elif origin is dict:
        if isinstance(value, dict):
            return value
        faults.append(Fault(key, f"must be a mapping, not {_said(value)}"))
    else:
        return _build_scalar(kind, value, key, faults)
    return value


def _build_dataclass(kind: Any, value: Any, key: Key, places: Places, faults: list[Fault], default: Any) -> Any:
    """A section. `default` is its parent's default for it, which what is written here changes field by field."""
    if not isinstance(value, dict):
        faults.append(Fault(key, f"must be a mapping of keys to values, not {_said(value)}"))
        return None
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            faults.append(Fault((*key, str(name)), f"unknown key{suggest(str(name), fields)}"))
    arguments = {}
    for name, f in fields.items():
        if name in value:
            below = (*key, name)
            if dataclasses.is_dataclass(hints[name]) and f.default_factory is not dataclasses.MISSING:
                own = f.default_factory()
                arguments[name] = _build_dataclass(hints[name], value[name], below, places, faults, own)
            else:
                arguments[name] = build(hints[name], value[name], below, places, faults)
        elif default is None and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            faults.append(Fault((*key, name), "is missing"))
            return None
    return kind(**arguments) if default is None else dataclasses.replace(default, **arguments)


def _build_union(choices: tuple[Any, ...], value: Any, key: Key, places: Places, faults: list[Fault]) -> Any:
    for choice in choices:
        attempt: list[Fault] = []
        result = build(choice, value, key, places, attempt)
        if not attempt:
            return result
    faults.append(Fault(key, f"must be {' or '.join(map(_choice, choices))}, not {_said(value)}"))
    return value


def _choice(kind: Any) -> str:
    if kind is type(None):
        return "nothing"
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(map(str, typing.get_args(kind)))
    return _wanted(kind) if kind in _NAMES else getattr(kind, "__name__", str(kind))


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _build_scalar(kind: Any, value: Any, key: Key, faults: list[Fault]) -> Any:
    if kind is type(None) and value is None:
        return None
    if kind is float:
        # YAML 1.1 reads 1e-3 as text; nobody means text by it.
        try:
            if not isinstance(value, bool) and value is not None and math.isfinite(float(value)):
                return float(value)
        except (TypeError, ValueError):
            pass
    elif kind is Any or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    faults.append(Fault(key, f"must be {_wanted(kind)}, not {_said(value)}"))
    return value


def _wanted(kind: Any) -> str:
    return _NAMES.get(kind, str(kind))


def _said(value: Any) -> str:
    return "nothing" if value is None else f"{value!r}"
