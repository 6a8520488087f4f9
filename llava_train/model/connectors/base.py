"""What every connector says of itself, its options, and the registry."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any, ClassVar

from torch import nn
from transformers import LlavaConfig

from llava_train.errors import RecipeError
from llava_train.model.screening import shown
from llava_train.registry import Registry


@dataclass(frozen=True)
class Widths:
    """Input and output width of a connector."""

    vision: int
    llm: int


@dataclass(frozen=True)
class Option:
    """A key of `model.connector_options`.

    Attributes:
        kind: the type of its value; integers are 1 or more.
        default: None where it follows from the model (or where it may be left out).
        choices: the only values that it takes.
    """

    kind: type[int] | type[bool] | type[str]
    default: int | bool | str | None
    choices: tuple[int, ...] = ()

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, or None."""
        if value is None and self.default is None:
            return None
        if type(value) is not self.kind:
            return f"must be of type {self.kind.__name__}"
        if self.choices and value not in self.choices:
            return f"choose one of {', '.join(str(choice) for choice in self.choices)}"
        return "must be 1 or more" if self.kind is int and int(value) < 1 else None


class Connector(nn.Module):
    """What a connector says of itself besides `forward`."""

    row: ClassVar[str]
    """Its name in the registry"""
    options: ClassVar[dict[str, Option]] = {}
    reads_text: bool = False
    """Whether `forward` wants the text beside the features: (features_NPV, text_NL, text_mask_NL)"""

    @classmethod
    @abstractmethod
    def build(cls, name: str, widths: Widths, config: LlavaConfig, options: dict[str, Any]) -> nn.Module:
        """The module with fresh weights; RecipeError for options that do not suit."""

    @classmethod
    def settings(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Options and defaults together. RecipeError, naming it, for one that is unknown or of a wrong value."""
        for name, value in options.items():
            if name not in cls.options:
                raise cls.fault(f"unknown option {name}; it takes {', '.join(cls.options) or 'none'}")
            if fault := cls.options[name].fault(value):
                raise cls.fault(f"{name}: {shown(value)}: {fault}")
        return {name: options.get(name, option.default) for name, option in cls.options.items()}

    @classmethod
    def tokens(cls, positions: int, options: dict[str, Any]) -> int:
        """Tokens an image in the LLM, for `positions` features of the tower. RecipeError where they do not suit."""
        cls.settings(options)
        return positions

    @classmethod
    def grid(cls, positions: int, options: dict[str, Any]) -> tuple[int, int] | None:
        """Rows and columns of the tokens, which follow row by row; None where they lie on no grid."""
        return None

    @classmethod
    def initialise(cls, connector: nn.Module, options: dict[str, Any]) -> tuple[str, ...]:
        """See `initialise_connector`."""
        return ()

    @classmethod
    def lasting(cls, options: dict[str, Any]) -> dict[str, Any]:
        """See `lasting_options`."""
        return options

    @classmethod
    def fault(cls, text: str) -> RecipeError:
        """The error that says what is wrong with this connector in a recipe."""
        return RecipeError(f"connector {cls.row!r}: {text}")


CONNECTORS: Registry[type[Connector]] = Registry("connector")


def register(name: str) -> Callable[[type[Connector]], type[Connector]]:
    """Decorator that gives a class its row."""

    def add(connector: type[Connector]) -> type[Connector]:
        connector.row = name
        return CONNECTORS.register(name)(connector)

    return add


def square(positions: int) -> tuple[int, int] | None:
    """Rows and columns of a square of so many positions, or None."""
    side = isqrt(positions)
    return (side, side) if side * side == positions else None
