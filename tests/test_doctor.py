"""Verdicts by hand: each number worked out anew, each level on both sides of its bound."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_run import go
from tiny import BASELINES, overrides, tiny_rows, write_data

from fedkeel.data.format import Formatter
from fedkeel.evidence.doctor import at_chance, keep, odd, of_recipe, of_run, served, served_weight
from fedkeel.evidence.report import method_table, read_rows, verdicts, write_report
from fedkeel.evidence.report.verdicts import BAD, GOOD, LOOK, Verdict
from fedkeel.model.load import load_tokenizer
from fedkeel.recipe.load import load_recipe
from fedkeel.runs.prepare import Prepared, prepare
from fedkeel.types import FedKeelError, Row


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
    assert verdict.level == (BAD if share > 0.5 else LOOK)
    assert f"takes {share:.1%} of the tokens of" in verdict.told
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


def test_a_site_that_is_not_always_asked_goes_through_its_rows_more_seldom(tiny_overrides: list[str]) -> None:
    """One of three sites a round: a third of 3 rounds of 6 rows, at sites of 12 and 18."""
    prepared = ready([*tiny_overrides, "train.local_steps=3", "train.batch_size=2", "federation.sites_per_round=1"])
    assert "its rows 0.33 (" in about(of_recipe(prepared), "goes through").told


def test_test_rows_of_earlier_stages_count_once(tiny_overrides: list[str]) -> None:
    halves = ['stream.stages=["colour", "echo"]']
    told = [about(of_recipe(ready([*tiny_overrides, *more])), "test rows").told for more in ((), halves)]
    assert told[0] == told[1]


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
    assert verdict.told == "colour: a site lacks 33% of its 3 labels, on average; 1 are at one site only"
    assert (verdict.level, "restricted" in verdict.change) == (LOOK, True)
    assert about(of_recipe(ready([*own, "evidence.task=restricted"])), "colour").level == GOOD


def test_rows_and_names_that_can_hardly_be_meant(tiny_overrides: list[str], tmp_path: Path) -> None:
    rows = []
    for n, site in enumerate(["ward-0", "Ward-0", "ward-1"] * 6):
        split = "train" if n < 12 else "test"
        label, text = ("Red" if n == 2 else "red"), ("" if n == 3 else "the same" if n in (5, 8) else f"thing {n}")
        rows.append({"department": site, "task": "colour", "text": text, "label": label, "split": split, "id": f"r{n}"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    own = [*tiny_overrides, f"data.root={tmp_path}", 'data.tasks_file=""', "data.site_column=department"]
    told = [v.told for v in odd(ready(own))]
    assert told == [
        "sites that differ in the case of letters alone: 'Ward-0' and 'ward-0'",
        "labels of task colour that differ in the case of letters alone: 'Red' and 'red'",
        "1 training row without a text: an answer to nothing",
        "1 training row that a site holds already, word for word",
    ]
    assert not [*odd(ready(tiny_overrides))]


def test_what_test_rows_can_tell(tiny_overrides: list[str]) -> None:
    """12 test rows, 6 of each of two tasks: 1.96 · √(1/24 + 1/24) / 2 = 0.2829."""
    prepared = ready(tiny_overrides)
    assert len(prepared.sites.all("test")) == 12
    verdict = about(of_recipe(prepared), "test rows")
    assert verdict.told == "12 test rows of 2 tasks: a score alone is known to ± 28.3 points (95 %, at worst)"
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
    (verdict,) = verdicts.falling(rows)
    assert told in verdict.told
    assert verdict.level == level
    assert list(verdicts.falling(rows[:12])) == []


def scores(right: int, count: int = 200) -> dict[str, dict[str, float]]:
    return {"t": {f"r{n:03d}": float(n < right) for n in range(count)}}


def levels(**rights: int) -> dict[str, str]:
    models: Any = {tuple(name.split("_")) if "_" in name else (name, ""): scores(right) for name, right in rights.items()}
    return {verdict.told: verdict.level for verdict in verdicts.order(models)}


def test_the_order_of_base_local_federated_and_centralised() -> None:
    assert levels(federated=150, base=80, local_a=100, local_b=110, centralised=170) == {
        "federated 75.0 points, surely more than the base": GOOD,
        "federated 75.0 points, surely more than 2 of 2 local models": GOOD,
    }
    assert levels(federated=100, base=140, local_a=100, local_b=150) == {
        "federated 50.0 points, surely less than the base": BAD,
        "federated 50.0 points, surely less than 1 of 2 local models": BAD,
    }
    assert levels(federated=100, local_a=100, local_b=100, centralised=60) == {
        "federated 50.0 points, and not surely more than 2 of 2 local models": LOOK,
        "federated 50.0 points, surely more than centralised": LOOK,
    }
    assert levels(federated=150, analytic=180) == {
        "federated 75.0 points, surely less than the analytic head, which nobody trained": LOOK,
    }
    assert levels(federated=150, analytic=120) == {}
    # of four rows that all differ a bootstrap has no spread, and knows nothing
    few: Any = {("federated", ""): scores(4, 4), ("base", ""): scores(0, 4)}
    assert [(v.level, v.told) for v in verdicts.order(few)] == [
        (LOOK, "federated 100.0 points, and not surely more than the base")
    ]
    assert levels(base=3) == {}


def test_what_a_site_would_see_on_its_own_rows() -> None:
    """Federated better at one of two sites, and worse in the mean: 30 against 35."""
    own = {"federated": {"a": 0.4, "b": 0.2}, "local": {"a": 0.3, "b": 0.4}}
    rows = [
        Row("r", leg, 1, 2, "own_score", value, "share", site=site, split="test")
        for leg, of in own.items()
        for site, value in of.items()
    ]
    (found,) = verdicts.at_home(rows)
    assert found.level == LOOK
    assert found.told == (
        "on a site's own test rows federated 30.0 points, its own local model 35.0, the mean of 2 sites; better at 1"
    )
    assert [
        v.level
        for v in verdicts.at_home([replace(r, method="local" if r.method == "federated" else "federated") for r in rows])
    ] == [GOOD]
    assert not [*verdicts.at_home([r for r in rows if r.method == "federated"])]


def test_scores_of_more_than_the_adapter_are_called_so(tiny_overrides: list[str]) -> None:
    chosen = [Row("r", "federated", 1, n, "serve", w, "weight", stage=n, split="validation") for n, w in ((0, 1.0), (1, 0.5))]
    recipe = load_recipe(None, [*tiny_overrides, "evidence.serve_from=[0.5, 1]"])
    assert [v.told for v in served(recipe, chosen)] == [
        "the federated scores are of the adapter with the analytic head beside it, weight 0.5"
    ]
    fixed = load_recipe(None, [*tiny_overrides, "evidence.serve=2"])
    assert served_weight(fixed, []) == 2
    assert not [*served(load_recipe(None, tiny_overrides), [])]


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with its baselines, for tests that leave it as it is."""
    out = tmp_path_factory.mktemp("whole")
    return go([*overrides(tiny_base, tiny_data, out), BASELINES, "federation.rounds=4"])[1].path


def test_a_whole_run_and_the_command(
    whole: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fedkeel.cli import main

    found = of_run(whole)
    assert any("training loss" in v.told for v in found)
    assert any("federated" in v.told for v in found)
    monkeypatch.setattr("sys.argv", ["fedkeel", "doctor", str(whole)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for verdict in [*found, *of_recipe(ready(tiny_overrides))][:3]:
        assert " ".join(verdict.told.split()[:3]) in said
    # without the rows, what the run measured is judged all the same
    monkeypatch.setattr("sys.argv", ["fedkeel", "doctor", str(whole), f"data.root={tmp_path / 'gone'}"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert len(tiny_rows()) == 72


def test_tasks_at_chance_by_hand(tiny_overrides: list[str], tmp_path: Path) -> None:
    """Six test rows of the task `colour`, two of each colour: the commonest gives 1/3, and the bar is 1/3 + 2·√(2/9/6) = 0.718.
    The free task has no chance level."""
    rows = [row for row in tiny_rows() if row["split"] == "train" or row["task"] == "echo"]
    rows += [
        {**row, "split": "test", "input": f"a {row['output']} thing {n}"}
        for colour in ("red", "green", "blue")
        for n, row in enumerate([row for row in rows if row["output"] == colour][:2])
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = {"colour": {"labels": ["red", "green", "blue"]}}
    (tmp_path / "tasks.json").write_text(json.dumps(labels))
    prepared = ready([*tiny_overrides, f"data.root={tmp_path}"])
    tested = {task: [r.id for r in prepared.sites.all("test") if r.task == task] for task in ("colour", "echo")}
    assert len(tested["colour"]) == 6

    def told(right: int) -> list[Verdict]:
        scores = {task: {name: float(n < right) for n, name in enumerate(of)} for task, of in tested.items()}
        return list(at_chance(prepared, {("federated", ""): scores}))

    (low,) = told(4)
    assert (low.level, low.told) == (
        LOOK,
        "colour: federated 66.7 points, the commonest answer alone 33.3 (6 rows): not surely above chance",
    )
    (high,) = told(5)
    assert (high.level, high.told.split(" is surely")[0]) == (GOOD, "every task with labels (1)")
    assert list(at_chance(prepared, {})) == []


def test_the_report_has_the_same_verdicts_on_top(whole: Path, tiny_overrides: list[str], tmp_path: Path) -> None:
    """Also where the rows of text are gone, as on another machine."""
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    prepared = ready([*tiny_overrides, BASELINES, "federation.rounds=4"])
    keep(prepared, folder, of_recipe(prepared))
    found = of_run(folder, prepared)
    assert sorted(of_run(folder), key=str) == sorted(found, key=str)
    page = write_report(folder)
    markdown, html = page.read_text(), page.with_suffix(".html").read_text()
    for text in (markdown, html):
        assert text.index("what to change") < text.index(method_table(read_rows(folder / "rows.jsonl")).title)
    for one in found:
        assert one.told.split(":")[0].replace("_", "") in markdown.replace("\\", "").replace("_", "")
    (folder / "verdicts.json").write_text('[{"level": "bad"}]')
    with pytest.raises(FedKeelError, match=r"verdicts\.json cannot be read"):
        write_report(folder)


@pytest.mark.slow
def test_sample_answers_are_of_each_task_in_turn_and_not_picked(tiny_overrides: list[str]) -> None:
    folder = go([*tiny_overrides, "evaluation.baselines=base", "evaluation.samples=5"])[1].path
    kept = json.loads((folder / "answers.json").read_text())
    prepared = ready(tiny_overrides)
    by_task = {
        task: sorted((r for r in prepared.sites.all("test") if r.task == task), key=lambda r: r.id)
        for task in ("colour", "echo")
    }
    expected = [by_task[task][n] for n in range(3) for task in ("colour", "echo")][:5]
    assert [row["id"] for row in kept["rows"]] == [r.id for r in expected]
    assert [row["prompt"] for row in kept["rows"]] == [f"{r.instruction}\n{r.input}" for r in expected]
    assert [row["wanted"] for row in kept["rows"]] == [r.output for r in expected]
    assert list(kept["said"]) == ["base", "federated"]
    of_rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    for who, said in kept["said"].items():
        right = {r["id"]: r["score"] for r in of_rows if r["method"] == who}
        for record in expected:
            if record.labels:  # a label is right or wrong
                assert right[record.id] == float(said[record.id] == record.output)
    page = write_report(folder)
    for text in (page.read_text(), page.with_suffix(".html").read_text()):
        assert expected[0].input in text
    none = go([*tiny_overrides, "evaluation.samples=0", "name=none"])[1].path
    assert not (none / "answers.json").exists()
    assert expected[0].input not in write_report(none).read_text()


def test_a_recipe_without_test_rows_is_told_so(tiny_overrides: list[str], tmp_path: Path) -> None:
    write_data(tmp_path)
    rows = [json.loads(line) | {"split": "train"} for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(load_recipe(None, [*tiny_overrides, f"data.root={tmp_path}"]))
    (told,) = [verdict for verdict in of_recipe(prepared) if "test row" in verdict.told]
    assert (told.level, told.told) == (BAD, "no test row: nothing could be scored")
