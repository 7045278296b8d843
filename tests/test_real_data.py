"""The recipes on the real text pack, where it lies beside the checkout: read, dealt and encoded without an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedkeel.data.format import Formatter
from fedkeel.model.load import load_tokenizer
from fedkeel.recipe.load import load_recipe
from fedkeel.runs.prepare import prepare

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the text pack ../shared/data is not here")


@needs_data
@pytest.mark.parametrize(
    ("name", "tasks", "sites", "train"),
    # rows as the pack's README counts them; clinc150 without `oos`, 250 rows of it in training (less repeated ones)
    [("clinc150", 1, 10, 14_938), ("cl15", 8, 8, 10_161), ("superni", 63, 8, 18_900)],
)
def test_recipe_on_real_data(name: str, tasks: int, sites: int, train: int) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.toml", [f"data.root={DATA}"])
    prepared = prepare(recipe)
    rows = prepared.sites.all("train")
    assert len(prepared.sites.rows) == sites
    assert len({r.task for r in rows}) == tasks
    assert len(rows) == train
    formatter = Formatter(load_tokenizer(recipe.model), prepared.kind, recipe.data.max_length, recipe.data.list_labels)
    sample = [*rows[::20], *max_per_task(rows)]
    examples = formatter.encode_all(sample)
    assert len(examples) + formatter.counts["dropped"] == len(sample)
    assert formatter.counts["dropped"] == 0
    assert all(0 < e.positions < len(e.ids) <= recipe.data.max_length for e in examples)


def max_per_task(rows: list) -> list:
    """The longest row of every task: the ones that have to be cut."""
    longest = {}
    for row in rows:
        longest[row.task] = max(row, longest.get(row.task, row), key=lambda r: len(r.instruction) + len(r.input))
    return list(longest.values())


@needs_data
def test_an_order_of_the_data_gives_the_stages_of_the_super_ni_recipe() -> None:
    written = load_recipe(ROOT / "recipes" / "stream-superni.toml", [f"data.root={DATA}"])
    order = ["stream.stages=[]", "stream.order=random1", "stream.tasks_a_stage=2"]
    ordered = load_recipe(ROOT / "recipes" / "stream-superni.toml", [f"data.root={DATA}", *order])
    assert len(written.stream.stages) == 5
    assert ordered.stream.stages == written.stream.stages
