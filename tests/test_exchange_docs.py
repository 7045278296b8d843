"""The exactness table of docs/exchange.md is what the rules do today."""

from __future__ import annotations

import pytest

import exactness
from fedkeel import tables


def test_the_page_holds_the_table_as_it_is_now() -> None:
    assert exactness.PAGE.read_text(encoding="utf-8") == exactness.page()


@pytest.mark.parametrize("name", [name for name, rule in tables.RULES.items() if not rule.personal])
def test_a_rule_is_exact_where_it_says_so_and_only_there(name: str) -> None:
    assert (exactness.measured(name) < 1e-6) == tables.RULES[name].exact
