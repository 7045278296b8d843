"""How sure a run's comparisons are: by hand, and where nothing can be said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedkeel.evidence.report.sure import mean_score, read_scores, scores_by_model, sure_table
from fedkeel.types import FedKeelError

ROWS = 40


def lines(method: str, site: str, scores: list[float], task: str = "t") -> list[str]:
    told = {"method": method, "site": site, "task": task}
    return [json.dumps({**told, "id": f"r{n}", "score": score}) for n, score in enumerate(scores)]


def test_a_line_a_model_and_a_count_of_the_local_ones() -> None:
    """Differences that are the same at every row have an interval of no width; a coin's holds 0."""
    flip = [float(n % 2) for n in range(ROWS)]
    text = "\n".join(
        [
            *lines("base", "", [0.25] * ROWS),
            *lines("federated", "", [0.5] * ROWS),
            *lines("local", "north", [0.4] * ROWS),
            *lines("local", "south", flip),
            *lines("local", "west", [0.75] * ROWS),
            *lines("centralised", "", [0.875] * ROWS),
        ]
    )
    table = sure_table(scores_by_model(text, "scores.jsonl"))
    shown = {line[0]: line[1:] for line in table.lines}
    assert list(shown) == ["base", "local-only, north", "local-only, south", "local-only, west", "centralised"]
    assert shown["base"] == ("25.0", "+25.0", "+25.0 to +25.0")
    assert shown["local-only, north"] == ("40.0", "+10.0", "+10.0 to +10.0")
    assert shown["centralised"] == ("87.5", "−37.5", "−37.5 to −37.5")
    low, high = shown["local-only, south"][2].split(" to ")
    assert shown["local-only, south"][:2] == ("50.0", "0.0")
    assert low.startswith("−")
    assert high.startswith("+")
    assert table.notes[0] == (
        "On all sites' rows the federated model is surely better than 1 of 3 local models, surely worse than 1, "
        "and 1 stay open."
    )
    assert "(40 rows, 2,000 resamples)" in table.notes[1]


def test_tasks_count_the_same_whatever_their_rows() -> None:
    text = "\n".join([*lines("federated", "", [1.0] * 9, "many"), *lines("federated", "", [0.0], "one")])
    assert mean_score(scores_by_model(text, "x")["federated", ""]) == 0.5


def test_nothing_to_compare_is_no_table(tmp_path: Path) -> None:
    assert not sure_table({}).lines
    assert not sure_table(scores_by_model("\n".join(lines("base", "", [1.0])), "x")).lines
    assert not sure_table(scores_by_model("\n".join(lines("federated", "", [1.0])), "x")).lines
    assert read_scores(tmp_path) == {}


def test_a_broken_file_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "scores.jsonl").write_text("\n".join([*lines("base", "", [1.0]), '{"method": "base"}']))
    with pytest.raises(FedKeelError, match=r"scores\.jsonl:2: not a score of a run"):
        read_scores(tmp_path)
