"""Each claim of docs/security.md names a test that there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[^`\s]+)`", PAGE)))
LINES = 116


def named_tests(path: Path) -> set[str]:
    """The names of the tests of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("named", NAMED)
def test_a_named_test_exists(named: str) -> None:
    file, _, name = named.partition("::")
    assert (ROOT / file).is_file()
    assert name in named_tests(ROOT / file)


def threats() -> list[list[str]]:
    """The cells of every line of the tables of threats."""
    part = PAGE.partition("## Threats, by party")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|") and "---" not in line and "want" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_what_is_said_to_be_protected_names_its_test() -> None:
    assert len(threats()) > 20
    for wants, protected, by, test in threats():
        assert wants
        assert by
        assert protected.strip("*") in ("yes", "if", "no")
        assert test == "–" or test.startswith("`tests/"), wants
        if protected.strip("*") != "no":
            assert test != "–", wants


def test_every_party_has_its_table() -> None:
    heads = re.findall(r"^\*\*([^*]+)\*\*", PAGE.partition("## Threats, by party")[2].partition("\n## ")[0], re.MULTILINE)
    for party in ("A site", "A coordinator", "The network", "Who gets the adapter", "Who can write to a run's folder"):
        assert any(head.startswith(party) for head in heads), party


def test_the_page_stays_short() -> None:
    assert len(PAGE.splitlines()) <= LINES
