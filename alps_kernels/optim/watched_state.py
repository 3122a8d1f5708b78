"""State dicts of an optimizer that count their changes, so that a step need not look at each entry."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any


class Changes:
    """How often a table of states, or a state in it, was changed."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class ParamState(dict):
    """The state of one parameter; changes of its entries are counted with those of its table."""

    __slots__ = ("changes",)

    @classmethod
    def of(cls, entry: dict, changes: Changes) -> ParamState:
        if type(entry) is cls and entry.changes is changes:
            return entry
        state = cls(entry)
        state.changes = changes
        return state

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)  # copies and files hold plain dicts


class StateTable(defaultdict):
    """`Optimizer.state`: parameters and their states."""

    __slots__ = ("changes",)

    @classmethod
    def of(cls, state: dict) -> StateTable:
        if type(state) is cls:
            return state
        table = cls(dict, state)
        table.changes = Changes()
        return table

    def __missing__(self, key: Any) -> Any:
        self.changes.count += 1
        return super().__missing__(key)

    def __reduce__(self) -> tuple:
        return defaultdict, (dict,), None, None, iter(self.items())


def _counted(method: Callable) -> Callable:
    def change(self, *args, **kwargs):
        self.changes.count += 1
        return method(self, *args, **kwargs)

    change.__name__ = method.__name__
    return change


for _class in (ParamState, StateTable):
    for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
        setattr(_class, _name, _counted(getattr(_class.__mro__[1], _name)))
