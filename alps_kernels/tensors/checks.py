"""Argument checks, the names in error messages, and the numbers that JSON allows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def check_type(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """Raises TypeError where `value` is no `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}; expected {expected}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ValueError where `value` is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {choices}")


def first_of(names: Iterable[str]) -> str:
    """The first name, and how many more there are."""
    first, *more = names
    return first + (f" (and {len(more)} more)" if more else "")


def refuse_constant(name: str) -> float:
    """For `json.loads(parse_constant=...)`: NaN and infinities are errors."""
    raise ValueError(f"{name} is not a number JSON allows")
