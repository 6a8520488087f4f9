"""What of a recipe must not change while a run goes on."""

from __future__ import annotations

from typing import Any

from llava_train.recipe import Recipe


def constants_of(recipe: Recipe) -> dict[str, Any]:
    """Keys of a recipe without those that say where it runs, what it reports and how often it saves."""
    values = recipe.to_dict()
    for free in ("name", "output", "speed", "engine", "checkpoint", "monitor"):
        values.pop(free)
    for free in ("cache_dir", "prepare_workers", "num_workers"):
        values["data"].pop(free)
    return flatten(values)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, its keys joined by dots; an empty dict is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys whose values differ, in order. One that is newer than the checkpoint had its default."""
    known = {**constants_of(Recipe()), **before}
    return [key for key in sorted({*before, *now}) if known.get(key) != now.get(key)]
