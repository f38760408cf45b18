"""Who may import whom in `stepspan`: only what is below, and never in a circle.

Every import statement counts, wherever it stands: at the top, under `if TYPE_CHECKING` and inside functions. An import
that waits for its call saves time at start-up; it needs what it imports all the same. Not counted are

- that importing `a.b.c` also runs `a/__init__.py` and `a/b/__init__.py`;
- names that `stepspan.__getattr__` looks up: its `if TYPE_CHECKING` block lists them, so they are counted there;
- modules that are named by a text: samplers and readers of other systems, which a table finds by a setting's word, and
  the deliverer, which is started as a process of its own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "stepspan"
FILES = {
    ".".join(("stepspan", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

LAYERS = (
    ("errors", "environment", "copying", "objects", "_version"),
    ("values", "identity"),
    ("conversion",),
    ("events",),
    ("journal",),
    ("mapping",),
    ("processors",),
    ("otlp",),
    ("exporters",),
    ("deliver",),
    ("reading",),
    ("config",),
    ("recording",),
    ("pipeline",),
    ("run",),
    ("samplers",),
    ("start",),
    ("integrations", "compat", "testing"),
    ("callbacks", "stores", "stormlog"),  # the public names of what is in compat
    ("",),  # `stepspan` itself, which names what is public
    ("cli",),
    ("__main__",),
)
"""From low to high. What shares a line may not import each other; within a package only circles are forbidden."""

HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}


def part(module: str) -> str:
    """The module or package directly below `stepspan`; "" for itself."""
    return (module + "..").split(".")[1]


def imported(module: str) -> Iterator[str]:
    """The modules of `stepspan` that this one imports anywhere."""
    for node in ast.walk(ast.parse(FILES[module].read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: an import is absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in FILES or node.module in FILES:
                    yield name if name in FILES else str(node.module)


IMPORTS = {module: set(imported(module)) for module in FILES}


def test_there_is_no_circle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


def test_an_import_only_points_down() -> None:
    assert not [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in sorted(others)
        if part(module) != part(other) and HEIGHT[part(module)] <= HEIGHT[part(other)]
    ]


def test_identity_needs_nothing_but_errors_and_how_variables_are_quoted() -> None:
    of_identity = {part(other) for module in FILES if part(module) == "identity" for other in IMPORTS[module]}
    assert of_identity <= {"identity", "errors", "environment"}
