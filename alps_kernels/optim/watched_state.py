"""State dicts of an optimizer that count their changes, so that a step need not look at each entry."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any


class ParamState(dict):
    """The state of one parameter. That an entry of any was replaced shows in `ParamState.changes`."""

    __slots__ = ()
    changes = 0

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)  # copies and files hold plain dicts


class StateTable(defaultdict):
    """`Optimizer.state`: parameters and their states. Changes show in `ParamState.changes` too."""

    __slots__ = ()

    @classmethod
    def of(cls, state: dict) -> StateTable:
        return state if type(state) is cls else cls(dict, state)

    def __missing__(self, key: Any) -> Any:
        ParamState.changes += 1
        return super().__missing__(key)

    def __reduce__(self) -> tuple:
        return defaultdict, (dict,), None, None, iter(self.items())


def _counted(method: Callable) -> Callable:
    def change(self, *args, **kwargs):
        ParamState.changes += 1
        return method(self, *args, **kwargs)

    change.__name__ = method.__name__
    return change


for _class in (ParamState, StateTable):
    for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
        setattr(_class, _name, _counted(getattr(_class.__mro__[1], _name)))
