"""Verdicts by hand: each number worked out anew, each level on both sides of its bound."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_run import go
from tiny import tiny_rows

from fedkeel.data.format import Formatter
from fedkeel.evidence import doctor
from fedkeel.evidence.doctor import BAD, GOOD, LOOK, Verdict, of_recipe, of_run
from fedkeel.model.load import load_tokenizer
from fedkeel.recipe.load import load_recipe
from fedkeel.runs.prepare import Prepared, prepare
from fedkeel.types import Row


def ready(overrides: list[str]) -> Prepared:
    return prepare(load_recipe(None, overrides))


def about(found: list[Verdict], words: str) -> Verdict:
    (one,) = [v for v in found if words in v.told]
    return one


def test_the_share_of_tokens_that_are_cut(tiny_overrides: list[str]) -> None:
    prepared = ready(tiny_overrides)
    words = load_tokenizer(prepared.recipe.model)
    lengths = sorted(e.length for e in Formatter(words, "causal", 999).encode_all(prepared.sites.all("train")))
    assert about(of_recipe(prepared), "max_length").level == GOOD
    narrow = ready([*tiny_overrides, f"data.max_length={lengths[0] - 1}"])
    kept = sum(e.length for e in Formatter(words, "causal", lengths[0] - 1).encode_all(narrow.sites.all("train")))
    verdict = about(of_recipe(narrow), "max_length")
    share = 1 - kept / sum(lengths)
    assert share > 0.01
    assert verdict.level == (BAD if share > 0.1 else LOOK)
    assert f"takes {share:.1%} of all tokens" in verdict.told
    assert f"data.max_length = {lengths[math.ceil(0.99 * len(lengths)) - 1]}," in verdict.change


@pytest.mark.parametrize(("steps", "level"), [(1, LOOK), (3, GOOD), (200, LOOK)])
def test_how_often_a_site_goes_through_its_rows(steps: int, level: str, tiny_overrides: list[str]) -> None:
    """3 rounds of `steps` batches of 2, at sites of 12 and 18 training rows."""
    prepared = ready([*tiny_overrides, f"train.local_steps={steps}", "train.batch_size=2"])
    sizes = {len(h["train"]): name for name, h in sorted(prepared.sites.rows.items(), reverse=True)}
    assert set(sizes) == {12, 18}
    verdict = about(of_recipe(prepared), "goes through")
    assert f"its rows {6 * steps / 18:.2g} ({sizes[18]}) to {6 * steps / 12:.2g} times (" in verdict.told
    assert verdict.level == level


def test_labels_that_sites_lack(tiny_overrides: list[str], tmp_path: Path) -> None:
    """Of three labels at three sites: red everywhere, green at two, blue at one; 3 of 9 pairs are absent."""
    rows = []
    for site, colours in {"ward-0": ["red", "green", "blue"], "ward-1": ["red", "green"], "ward-2": ["red"]}.items():
        for n, colour in enumerate([*colours * 3, *colours]):
            split = "train" if n < 3 * len(colours) else "test"
            text = f"{colour} thing {n} {site}"
            rows.append({"department": site, "task": "colour", "text": text, "label": colour, "split": split})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    own = [*tiny_overrides, f"data.root={tmp_path}", 'data.tasks_file=""']
    verdict = about(of_recipe(ready(own)), "colour")
    assert verdict.told == "colour: a site holds no row of 33% of its 3 labels, 1 are at one site only"
    assert (verdict.level, "restricted" in verdict.change) == (LOOK, True)
    assert about(of_recipe(ready([*own, "evidence.task=restricted"])), "colour").level == GOOD


def test_what_test_rows_can_tell(tiny_overrides: list[str]) -> None:
    """12 test rows, 6 of each of two tasks: 1.96 · √(1/24 + 1/24) / 2 = 0.2829."""
    prepared = ready(tiny_overrides)
    assert len(prepared.sites.all("test")) == 12
    verdict = about(of_recipe(prepared), "test rows")
    assert verdict.told == "12 test rows of 2 tasks: a score is known to ± 28.3 points (95 %, at worst)"
    assert verdict.level == BAD


def loss(round: int, site: str, value: float, name: str = "loss") -> Row:
    return Row("run", "federated", 1, round, name, value, "nats", site=site)


@pytest.mark.parametrize(
    ("values", "level", "told"),
    [
        ([4, 3, 2, 1, 0.9, 0.89, 0.88, 0.87], GOOD, "0.895 and then 0.875 nats"),
        ([4, 3.5, 3, 2.5, 2, 1.5, 1.2, 1.0], LOOK, "1.75 and then 1.1 nats in the last two quarters of the rounds (-37%)"),
        ([1, 1, 1, 1, 1, 1, 2, 4], BAD, "1 and then 3 nats"),
    ],
)
def test_a_loss_that_had_not_come_to_rest(values: list[float], level: str, told: str) -> None:
    """Two sites, of which the second counts three times as much: each round's mean is the value."""
    rows = []
    for number, value in enumerate(values, 1):
        rows += [loss(number, "a", value + 3), loss(number, "b", value - 1)]
        rows += [loss(number, "a", 10, "positions"), loss(number, "b", 30, "positions")]
    (verdict,) = doctor.falling(rows)
    assert told in verdict.told
    assert verdict.level == level
    assert list(doctor.falling(rows[:12])) == []


def scores(right: int, count: int = 200) -> dict[str, dict[str, float]]:
    return {"t": {f"r{n:03d}": float(n < right) for n in range(count)}}


def levels(**rights: int) -> dict[str, str]:
    models: Any = {tuple(name.split("_")) if "_" in name else (name, ""): scores(right) for name, right in rights.items()}
    return {verdict.told: verdict.level for verdict in doctor.order(models)}


def test_the_order_of_base_local_federated_and_centralised() -> None:
    assert levels(federated=150, base=80, local_a=100, local_b=110, centralised=170) == {
        "federated 75.0 points, surely more than 1 of 1 base": GOOD,
        "federated 75.0 points, surely more than 2 of 2 local": GOOD,
    }
    assert levels(federated=100, base=140, local_a=100, local_b=150) == {
        "federated 50.0 points, surely less than 1 of 1 base": BAD,
        "federated 50.0 points, surely less than 1 of 2 local": BAD,
    }
    assert levels(federated=100, local_a=100, local_b=100, centralised=60) == {
        "federated 50.0 points, and surely more than none of 2 local": LOOK,
        "federated 50.0 points, surely more than centralised": LOOK,
    }
    assert levels(base=3) == {}


def test_a_whole_run_and_the_command(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fedkeel.cli import main

    folder = go([*tiny_overrides, "federation.rounds=4"])[1].path
    found = of_run(folder)
    assert any("training loss" in v.told for v in found)
    assert any("federated" in v.told for v in found)
    monkeypatch.setattr("sys.argv", ["fedkeel", "doctor", str(folder)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for verdict in [*found, *of_recipe(ready(tiny_overrides))][:3]:
        assert " ".join(verdict.told.split()[:3]) in said
    # without the rows, what the run measured is judged all the same
    monkeypatch.setattr("sys.argv", ["fedkeel", "doctor", str(folder), f"data.root={tmp_path / 'gone'}"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert len(tiny_rows()) == 72
