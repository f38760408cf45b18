"""The public face: one sorted list, everything on it is there, and every callable says what its arguments are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

import stepspan
from stepspan.recording.scope import Scope
from stepspan.recording.steps import Steps
from stepspan.run import Run
from stepspan.testing import Recording

MODULES = [
    import_module(name)
    for name in (
        *("stepspan", "stepspan.callbacks", "stepspan.exporters", "stepspan.processors", "stepspan.stores"),
        *("stepspan.stormlog", "stepspan.testing", "stepspan.integrations.logging"),
    )
]


MADE_BY_OTHERS = (Run, Scope, Steps, Recording)
"""Classes that no user calls."""


def test_all_is_sorted() -> None:
    assert stepspan.__all__ == sorted(stepspan.__all__)


def test_every_name_can_be_imported() -> None:
    assert [name for name in stepspan.__all__ if getattr(stepspan, name, None) is None] == []


def public(module: ModuleType) -> Iterator[Any]:
    """The classes and functions of a public module."""
    for name in getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")]):
        found = getattr(module, name)
        home = getattr(found, "__module__", "")
        if callable(found) and (
            home == module.__name__ or (hasattr(module, "__all__") and home.startswith("stepspan"))
        ):
            yield found


def callables(found: Any) -> Iterator[tuple[str, Callable[..., Any], str]]:
    """(name, what is called, its documentation) of a function, or of a class and its public methods."""
    if inspect.isfunction(found):
        yield found.__name__, found, inspect.getdoc(found) or ""
    elif inspect.isclass(found) and not getattr(found, "_is_protocol", False):
        if found not in MADE_BY_OTHERS and not is_dataclass(found) and inspect.isfunction(vars(found).get("__init__")):
            yield found.__name__, found.__init__, inspect.getdoc(found) or ""
        for name, method in vars(found).items():
            if inspect.isfunction(method) and not name.startswith("_"):
                yield f"{found.__name__}.{name}", method, inspect.getdoc(getattr(found, name)) or ""


def unexplained(called: Callable[..., Any], text: str) -> list[str]:
    """The parameters that have no line `name: ...` in a docstring."""
    names = [name.lstrip("_") for name in inspect.signature(called).parameters if name not in {"self", "cls"}]
    return [name for name in names if not re.search(rf"^\s*\*{{0,2}}{name}: ", text, re.MULTILINE)]


ALL = {found for module in MODULES for found in public(module)} | {Scope, Steps}
CONTRACTS = {
    (name.rpartition(".")[2], parameter)
    for found in ALL
    for base in inspect.getmro(found if inspect.isclass(found) else type(found))
    for name, method in vars(base).items()
    if inspect.isfunction(method)
    for parameter in inspect.signature(method).parameters
    if parameter not in unexplained(method, inspect.getdoc(method) or "")
}
"""(method, parameter) that a class or a protocol explains, and its implementations need not again."""


@pytest.mark.parametrize(
    ("name", "called", "text"),
    [pytest.param(*row, id=row[0]) for found in sorted(ALL, key=lambda one: str(one)) for row in callables(found)],
)
def test_every_argument_is_explained(name: str, called: Callable[..., Any], text: str) -> None:
    missing = [one for one in unexplained(called, text) if (name.rpartition(".")[2], one) not in CONTRACTS]
    assert missing == [], f"Args of {name}"
