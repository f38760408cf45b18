"""Whatever stepspan logs or writes to stderr says that it comes from stepspan, whatever the reader's format is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "stepspan"
LOGGED = {f"log.{level}" for level in ("debug", "info", "warning", "error", "exception", "log")}


def first_text(node: ast.expr) -> str | None:
    """The beginning of a text or an f-string; None of anything else."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def messages(tree: ast.AST) -> Iterator[tuple[int, str | None]]:
    """What is logged, and what is printed to stderr."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            to_stderr = any(word.arg == "file" and ast.unparse(word.value) == "sys.stderr" for word in node.keywords)
            if called in LOGGED or called == "sys.stderr.write" or to_stderr:
                yield node.lineno, first_text(node.args[1 if called == "log.log" else 0])


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_message_begins_with_the_name(path: Path) -> None:
    found = list(messages(ast.parse(path.read_bytes())))
    assert [line for line, text in found if text is None or not text.startswith("stepspan: ")] == []


def test_messages_are_found_where_they_are() -> None:
    found = [text for path in PACKAGE.rglob("*.py") for _, text in messages(ast.parse(path.read_bytes()))]
    assert len(found) > 20
