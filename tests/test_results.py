"""The published numbers are those of the committed rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean

import pytest

import results_page

ROOT = Path(__file__).parent.parent


def test_docs_and_readme_are_generated_from_the_rows() -> None:
    assert (ROOT / "docs" / "results.md").read_text() == results_page.page()
    assert (ROOT / "README.md").read_text() == results_page.readme()


@pytest.mark.parametrize("name", results_page.committed())
def test_scores_recomputed_from_rows_by_hand(name: str) -> None:
    """Apart from the report's code: the mean over tasks of each method, from the raw lines, stands in the page."""
    lines = (ROOT / "results" / "main-job" / name / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    section = results_page.page().split(f"## {name}\n")[1].split("\n## ")[0]
    for method in ("base", "federated", "centralised"):
        scores = [
            r["value"]
            for r in rows
            if (r["method"], r["name"], r["split"]) == (method, "score", "test") and r["task"] and not r["site"]
        ]
        line = re.search(rf"^\| {method} \| ([^|]+) \|", section, re.MULTILINE)
        assert line is not None
        assert line.group(1).strip() == f"{100 * mean(scores):.1f}"


@pytest.mark.parametrize("name", results_page.committed())
def test_every_result_carries_its_recipe_and_commit(name: str) -> None:
    """A tree with uncommitted changes says so (`-dirty`), on the page too."""
    folder = ROOT / "results" / "main-job" / name
    commit = json.loads((folder / "env.json").read_text())["commit"]
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", commit)
    assert f"commit `{commit}`" in results_page.page().split(f"## {name}\n")[1].split("\n## ")[0]
    for file in ("recipe.toml", "table.md", "report.md", "curve.svg"):
        assert (folder / file).stat().st_size > 0
