"""What the pages about the code name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "stepspan"
PATHS = {
    str(path.relative_to(PACKAGE)) + ("/" if path.is_dir() else "")
    for path in PACKAGE.rglob("*")
    if "__pycache__" not in path.parts
}


@pytest.mark.parametrize("page", ["architecture.md", "glossary.md", "events.md"])
def test_every_module_and_folder_that_a_page_names_is_there(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", text))
    assert named or page == "events.md"
    missing = {
        name
        for name in named
        if not (ROOT / name).exists() and not any(path == name or path.endswith(f"/{name}") for path in PATHS)
    }
    assert not missing


def test_the_glossary_is_sorted_and_says_each_word_once() -> None:
    rows = re.findall(r"^\| ([a-z][\w -]*) \| .* \|$", (ROOT / "docs" / "glossary.md").read_text(), flags=re.MULTILINE)
    words = [row for row in rows if row != "word"]
    assert words == sorted(set(words))
    assert len(words) >= 40
