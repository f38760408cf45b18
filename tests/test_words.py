"""One word has one meaning, and it is the field's. Words that no identifier of `stepspan` has, each with its term.

Every identifier is split at underscores and capitals: names, attributes, parameters, keywords, functions and classes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "stepspan"

TERMS = {
    "tell tells told teller": "warn, emit (a point, an event), export (to an SDK), write (a line)",
    "trouble troubles": "warnings, errors",
    "beside companion": "background",
    "aside": "detached",
    "forebears": "parents",
    "loose leaving outer": "abandoned, exit, parent",
    "lane lanes": "delivery task",
    "parcel": "batch",
    "shipper shippers": "scheduler",
    "survey tally": "status, counters",
    "untimely witness stubborn opaque": "out of window, known good, server errors, hidden",
    "gathering laid singles": "point buffer, added, single points",
    "twin": "duplicate",
    "copying fetched stamp": "async copy, blocking copy, written at",
    "asleep sleepers settled": "idle, with absolute paths",
    "patience seldom often": "timeout, interval",
    "deepest longest most": "max depth, limit, max",
    "ours whole foreign apart": "own, complete, SDK, partition",
    "joined": "attached",
}
FORBIDDEN = {word: term for words, term in TERMS.items() for word in words.split()}

NAMES = {
    "home": "session",
    "place": "path, directory, location",
    "late later": "deferred, pending",
    "book": "counters",
    "knows": "has seen",
    "abandoned": "receiver unreachable",
    "round": "run once",
    "turn in_turn give_turns": "eligible, dispatch",
    "lay put take": "add, flush",
    "source": "SDK scope",
    "met": "seen",
}
"""What no function, method or class is called."""
FUNCTIONS = {"text number short describe whole read": "what it returns: to_text, to_float, shorten"}
"""What no function of a module is called."""
TERMS_OF_NAMES = {word: term for words, term in NAMES.items() for word in words.split()}
TERMS_OF_FUNCTIONS = {word: term for words, term in FUNCTIONS.items() for word in words.split()}

OF_OTHERS = {"tell": "of a file"}
"""Attributes that other libraries named."""


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname", "rest"):
            name = getattr(node, field, None)
            if isinstance(name, str) and not (isinstance(node, ast.Attribute) and name in OF_OTHERS):
                yield name.rpartition(".")[2], getattr(node, "lineno", 0)
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            yield from ((name, node.lineno) for name in node.names)


def words(identifier: str) -> list[str]:
    """`maxSpans`, `MAX_SPANS` and `MaxSpans` are "max", "spans"."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)]


def test_no_identifier_has_a_word_of_a_private_dialect() -> None:
    assert not [
        f"{path.relative_to(PACKAGE)}:{line}: {name}: rather {FORBIDDEN[word]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name, line in identifiers(ast.parse(path.read_bytes()))
        for word in words(name)
        if word in FORBIDDEN
    ]


def defined(module: ast.Module) -> Iterator[tuple[str, int, str | None]]:
    """What a module defines, its line, and the term that would say more."""
    for node in ast.walk(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = node.name.strip("_").lower()
            is_function = node in module.body and not isinstance(node, ast.ClassDef)
            yield (
                node.name,
                node.lineno,
                TERMS_OF_NAMES.get(name) or (TERMS_OF_FUNCTIONS.get(name) if is_function else None),
            )


def test_what_is_defined_says_what_it_is() -> None:
    assert not [
        f"{path.relative_to(PACKAGE)}:{line}: {name}: rather {term}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name, line, term in defined(ast.parse(path.read_bytes()))
        if term
    ]
