"""FedKeel from Python: the same bits as the command, rows in many forms, own terms and rules, and what a finished run gives."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
import shapes
import torch
from test_run import Silent, adapter_of, go, rows_of, same, without_time
from tiny import tiny_rows
from torch import Tensor
from typer.testing import CliRunner

import fedkeel
from fedkeel import tables
from fedkeel.cli import app
from fedkeel.data.forms import DataError
from fedkeel.data.given import records_of
from fedkeel.exchange.codecs.cast import Cast
from fedkeel.method.aggregate.common import Aggregate
from fedkeel.method.aggregate.updates import Checked
from fedkeel.recipe.load import load_recipe, read_tree
from fedkeel.recipe.schema import Data
from fedkeel.recipe.settings import ConfigError
from fedkeel.tables import Rule, Term
from fedkeel.types import Adapter, FedKeelError, Forward, Update

QUICK = ["evaluation.baselines=[]", "federation.rounds=2"]


@pytest.fixture
def keys(tiny_overrides: list[str]) -> dict[str, Any]:
    return read_tree(None, [*tiny_overrides, *QUICK])


@pytest.fixture
def whole(tiny_overrides: list[str]) -> Any:
    """The run of the command, over files."""
    return go([*tiny_overrides, *QUICK, "name=whole"])[1]


def wards() -> dict[str, list[dict[str, str]]]:
    """The rows of each ward, without its name in them."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in tiny_rows():
        found.setdefault(row["department"], []).append({k: v for k, v in row.items() if k != "department"})
    return found


def entropy(forward: Forward) -> Tensor:
    """Mean −Σ p log p over positions."""
    logs = forward.logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def again(forward: Forward, options: Any) -> Tensor:
    """The task's loss, once more."""
    return torch.nn.functional.cross_entropy(forward.logits, forward.targets)


def plain_mean(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float]) -> Aggregate:
    """Σ p_k of every tensor, one after the other in Python."""
    total = {name: torch.zeros_like(t) for name, t in reference.tensors().items()}
    for update in updates:
        for name, tensor in update.adapter.tensors().items():
            total[name] += weights[update.site] * tensor
    return Aggregate(reference.with_tensors(total), 0.0)


# ------------------------------------------------------------------------------------------------------------------------ rows


def test_a_frame_of_arrays_is_the_same_rows_as_lists() -> None:
    """As pandas reads nested columns of Parquet: history, turns of a chat, and numbers."""
    pairs, turns = numpy.empty(2, object), numpy.empty(2, object)
    pairs[0], pairs[1] = numpy.array([numpy.array(["a", "b"], object)], object), numpy.array([], object)
    rows = [{"instruction": "x", "output": "1", "history": [["a", "b"]]}, {"instruction": "y", "output": "2", "history": []}]
    frame = pandas.DataFrame([{"instruction": r["instruction"], "output": r["output"]} for r in rows])
    frame["history"] = pairs
    config = Data(source="rows")
    assert records_of({"a": frame}, config) == records_of({"a": rows}, config)
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    turns[0] = turns[1] = numpy.array(said, object)
    told = pandas.DataFrame({"messages": turns, "weight": numpy.array([1, 1])})
    assert records_of({"a": told}, config) == records_of({"a": [{"messages": said, "weight": 1}] * 2}, config)


@pytest.mark.parametrize("form", shapes.quickly(("dicts", "pandas"), ["dicts", "pandas", "datasets"]))
def test_rows_from_python_end_in_the_bits_of_the_same_rows_in_files(form: str, keys: dict[str, Any], whole: Any) -> None:
    sites: dict[str, Any] = wards()
    if form == "pandas":
        sites = {name: pandas.DataFrame(rows) for name, rows in sites.items()}
    elif form == "datasets":
        datasets = pytest.importorskip("datasets", reason="the extra fedkeel[hub] is not installed")
        sites = {name: datasets.Dataset.from_list(rows) for name, rows in sites.items()}
    result = fedkeel.run(keys, sites=sites)
    assert same(adapter_of(result.folder), adapter_of(whole.path))
    mine, its = ([{**r, "run": ""} for r in without_time(rows)] for rows in (rows_of_result(result), rows_of(whole)))
    assert mine == its


def rows_of_result(result: fedkeel.Result) -> list[dict[str, Any]]:
    return result.rows.to_dict("records")


def test_rows_without_labels_share_those_of_all_sites(keys: dict[str, Any]) -> None:
    """Each site has seen one label of two; a model that is to choose must know both."""
    from fedkeel.data.given import records_of

    sites = {
        "a": [{"text": "warm", "label": "red"}] * 3,
        "b": [{"text": "cold", "label": "blue"}, {"text": "x", "label": "red"}],
    }
    found = records_of(sites, load_recipe(None, ["data.source=rows"]).data)
    assert {r.labels for r in found} == {("blue", "red")}
    assert [r.site for r in found] == ["a"] * 3 + ["b"] * 2
    # a frame with an empty cell writes whole numbers as 1.0
    numbered = {"a": [{"text": "warm", "label": 1}], "b": [{"text": "cold", "label": 1.0}]}
    with pytest.raises(FedKeelError, match=r"site b, row 1: labels '1' and '1\.0' of task 'default' are the same words"):
        records_of(numbered, load_recipe(None, ["data.source=rows"]).data)


def test_a_data_set_that_numbers_its_labels_gives_their_names() -> None:
    datasets = pytest.importorskip("datasets", reason="the extra fedkeel[hub] is not installed")
    from fedkeel.data.given import dicts_of

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    assert [r.get("label") for r in dicts_of(rows, "a")] == ["yes", "no", None]


@pytest.mark.parametrize(
    ("sites", "told"),
    [
        ({"a": "rows.jsonl"}, r"site a: str where a list of dicts, a pandas frame or a data set belongs"),
        ({"a": {"text": "x"}}, r"site a: dict where a list of dicts"),
        ({"a": [{"input": "x", "output": "y"}, "z"]}, r"site a, row 2: str where a dict belongs"),
        ({"a": [{"input": "x"}]}, r"site a, row 1: "),
        ({}, r"no training row"),
    ],
)
def test_rows_that_are_none_are_refused_by_site_and_number(sites: Any, told: str, keys: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=told):
        fedkeel.run(keys, sites=sites)
    assert not (Path(keys["out"]) / "tiny").exists()


def test_a_recipe_of_rows_needs_them(keys: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"given from Python, as in fedkeel\.run"):
        fedkeel.run({**keys, "data": {**keys["data"], "source": "rows"}})


# --------------------------------------------------------------------------------------------------------------------- recipes


def test_a_recipe_is_a_file_or_keys_nested_or_dotted(keys: dict[str, Any], tiny_overrides: list[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    meant = load_recipe(None, [*tiny_overrides, *QUICK])
    from fedkeel.recipe.settings import to_toml

    file.write_text(to_toml(meant))
    dotted = {
        f"{k}.{n}" if isinstance(v, dict) else k: w
        for k, v in keys.items()
        for n, w in (v.items() if isinstance(v, dict) else [(k, v)])
    }
    for given in (file, str(file), meant, dotted):
        assert fedkeel.run(given, existing="replace").recipe == meant


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"train.lrr": 1.0}, "unknown key 'train.lrr'; did you mean 'train.lr'"),
        ({"train": 3, "train.lr": 1.0}, "train is a table of keys, not 3"),
        ({"federation.rounds": "many"}, "federation.rounds = 'many': int belongs here"),
        ("nowhere.toml", "recipe not found: nowhere.toml"),
    ],
)
def test_mistakes_in_a_recipe_are_told_as_everywhere(given: Any, told: str) -> None:
    with pytest.raises(FedKeelError, match=told):
        fedkeel.run(given)


def test_a_run_that_is_there_is_refused_resumed_or_replaced(keys: dict[str, Any]) -> None:
    first = fedkeel.run(keys)
    with pytest.raises(FedKeelError, match="holds a run already"):
        fedkeel.run(keys)
    lines: list[str] = []
    assert fedkeel.run(keys, existing="resume", watch=lines.append).scores == first.scores
    assert not any("round" in line for line in lines)  # it was over
    fedkeel.run(keys, existing="replace", watch=lines.append)
    assert sum("federated round" in line for line in lines) == 2
    with pytest.raises(FedKeelError, match=r"existing = 'keep': one of refuse, resume, replace belongs here"):
        fedkeel.run(keys, existing="keep")


# ------------------------------------------------------------------------------------------------------------- terms and rules


def test_a_term_by_its_function_alone(keys: dict[str, Any], whole: Any) -> None:
    """It counts 1 unless the recipe says otherwise, and its mean is a row; at weight 0 it leaves no trace."""
    result = fedkeel.run(keys, terms=[entropy])
    assert not same(adapter_of(result.folder), adapter_of(whole.path))
    rows = [r for r in rows_of_result(result) if r["name"] == "entropy_loss"]
    assert {r["site"] for r in rows} == {"ward-0", "ward-1", "ward-2"}
    assert all(0 < r["value"] < torch.tensor(400.0).log() and r["unit"] == "nats" for r in rows)
    off = fedkeel.run({**keys, "name": "off", "term": {"entropy": {"weight": 0.0}}}, terms=[entropy])
    assert same(adapter_of(off.folder), adapter_of(whole.path))
    assert result.recipe.own["term.entropy"].weight == 1.0
    assert "entropy" not in tables.TERMS


def test_a_run_goes_on_with_the_functions_that_it_began_with(keys: dict[str, Any]) -> None:
    def stops(line: str) -> None:
        if "federated round 1" in line:
            raise KeyboardInterrupt

    def entropy_again(forward: Forward) -> Tensor:
        return 2 * entropy(forward)

    entropy_again.__name__ = "entropy"
    with pytest.raises(KeyboardInterrupt):
        fedkeel.run(keys, terms=[entropy], watch=stops)
    with pytest.raises(FedKeelError, match=r"cannot be resumed: not as they were when it began: the term entropy\."):
        fedkeel.run(keys, terms=[entropy_again], existing="resume")
    assert fedkeel.run(keys, terms=[entropy], existing="resume").scores


def test_a_term_adds_its_weight_times_its_value(keys: dict[str, Any], whole: Any) -> None:
    """The task's loss once more at 3, and the gradient cut to one norm either way: the same adapter."""
    tight = {**keys, "train": {**keys["train"], "clip_norm": 1e-3}}
    plain = fedkeel.run({**tight, "name": "tight"})
    double = fedkeel.run({**tight, "name": "double", "term": {"again": {"weight": 3.0}}}, terms=[again])
    for name, tensor in adapter_of(plain.folder).items():
        torch.testing.assert_close(adapter_of(double.folder)[name], tensor, rtol=0, atol=1e-3 * float(tensor.abs().max()))
    rows = rows_of_result(double)
    values = {n: [r["value"] for r in rows if r["name"] == n] for n in ("loss", "again_loss")}
    assert values["again_loss"] == pytest.approx(values["loss"], rel=1e-6)


def test_a_term_of_an_entry_says_what_it_needs(keys: dict[str, Any]) -> None:
    seen: list[bool] = []

    def agree(forward: Forward, options: Any) -> Tensor:
        seen.append(forward.teacher is not None)
        return forward.logits.sum() * 0

    fedkeel.run(keys, terms=[Term(agree, needs=("teacher",))])
    assert seen
    assert all(seen)


def test_a_rule_by_its_function_alone(keys: dict[str, Any], whole: Any) -> None:
    result = fedkeel.run(keys, rule=plain_mean)
    for name, tensor in adapter_of(whole.path).items():
        torch.testing.assert_close(adapter_of(result.folder)[name], tensor, rtol=0, atol=1e-5)
    assert result.recipe.federation.rule == "plain_mean"
    assert "plain_mean" not in tables.RULES
    # what was trained needs the rule no more, nor the options of a term that is known nowhere else
    recipe = result.folder / "recipe.toml"
    recipe.write_text(recipe.read_text() + "\n[term.label_smooth]\npower = 2\nweight = 0.1\n")
    for command in (["evaluate", str(result.folder)], ["export", str(result.folder), str(result.folder / "out")]):
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 0, found.output or found.exception
    entry = fedkeel.run({**keys, "name": "entry"}, rule=Rule(plain_mean_checked, mixed=True))
    assert same(adapter_of(entry.folder), adapter_of(result.folder))


def plain_mean_checked(reference: Adapter, updates: Checked, weights: Mapping[str, float], options: Any) -> Aggregate:
    assert options.round in (0, 1)
    return plain_mean(reference, updates, weights)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"terms": [lambda forward: forward.logits.mean()]}, "<lambda>: a term or rule goes by its function's name"),
        ({"terms": [entropy, entropy]}, "two terms of one name among entropy, entropy"),
        ({"terms": [Term(entropy, name="distill")]}, "there is a term 'distill' already"),
        ({"rule": Rule(plain_mean, name="krum")}, "there is a rule 'krum' already"),
    ],
)
def test_names_of_terms_and_rules_are_ones_own(more: dict[str, Any], told: str, keys: dict[str, Any]) -> None:
    before = [*tables.TERMS, *tables.RULES]
    with pytest.raises(FedKeelError, match=told):
        fedkeel.run(keys, **more)
    assert [*tables.TERMS, *tables.RULES] == before


def test_a_term_that_breaks_is_told_with_its_traceback_and_taken_out(keys: dict[str, Any]) -> None:
    def broken(forward: Forward) -> Tensor:
        raise ZeroDivisionError("of my own making")

    with pytest.raises(FedKeelError, match=r"(?s)0 of 3 sites.*ZeroDivisionError: of my own making"):
        fedkeel.run(keys, terms=[broken])
    assert "broken" not in tables.TERMS


# -------------------------------------------------------------------------------------------------------------------- a result


def test_a_result_and_the_same_loaded(keys: dict[str, Any]) -> None:
    """Scores by hand from the rows; the model of the run and the one that its folder gives answer alike, to the bit."""
    with_all = {**keys, "evaluation": {**keys["evaluation"], "baselines": ["base", "local"]}}
    watch = Silent()
    result = fedkeel.run(with_all, sites=wards(), terms=[entropy], rule=plain_mean, watch=watch)
    assert watch.results
    loaded = fedkeel.load(result.folder)
    rows = [r for r in rows_of_result(result) if r["split"] == "test" and r["name"] == "score" and not r["task"]]
    locals_ = [r["value"] for r in rows if r["method"] == "local"]
    assert len(locals_) == 3
    expected = {r["method"]: r["value"] for r in rows} | {"local": sum(locals_) / 3}
    assert result.scores == pytest.approx(expected)
    assert loaded.scores == result.scores
    assert loaded.rows.equals(result.rows)
    assert loaded.adapter == result.adapter == result.folder / "adapter"
    prompt = result.tokenizer("the red cat", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(result.model(**prompt).logits, loaded.model(**prompt).logits)
    assert result.report() == result.folder / "report.html"
    assert "entropy" in (result.folder / "report.md").read_text()


def test_rows_without_pandas_are_rows(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    result = fedkeel.run(keys)
    frame = result.rows
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert [r.as_json() for r in result.rows] == frame.to_dict("records")


@pytest.mark.parametrize("rule", ["share_a", "stack"])
def test_what_a_rule_leaves_is_what_a_result_gives(rule: str, keys: dict[str, Any]) -> None:
    """With factors that stay at the sites there is no one model; with shifts of the base, the model has them."""
    result = fedkeel.run({**keys, "federation": {**keys["federation"], "rule": rule}})
    if rule == "share_a":
        for wanted in (lambda: result.adapter, lambda: result.model, lambda: fedkeel.load(result.folder).model):
            with pytest.raises(ConfigError, match="share_a"):
                wanted()
        return
    prompt = result.tokenizer("the red cat", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(result.model(**prompt).logits, fedkeel.load(result.folder).model(**prompt).logits)


def test_no_run_to_load(tmp_path: Path) -> None:
    with pytest.raises(FedKeelError, match=r"recipe not found: .*recipe\.toml"):
        fedkeel.load(tmp_path)


def test_the_face_is_light_until_it_is_used() -> None:
    code = "import sys, fedkeel; fedkeel.run, fedkeel.load, fedkeel.Recipe; print('torch' in sys.modules); fedkeel.missing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "module 'fedkeel' has no attribute 'missing'" in done.stderr
    shown = subprocess.run([sys.executable, "-m", "fedkeel", "--version"], capture_output=True, text=True)
    assert shown.stdout.strip().endswith(fedkeel.__version__)


@pytest.mark.parametrize(
    ("term", "told"),
    [
        (lambda forward: forward.logits.mean(-1), "term odd returned shape ("),
        (lambda forward: forward.logits.detach().mean(), "term odd returned a number without a gradient, which trains nothing"),
        (lambda forward: 0.5, "term odd returned float; a tensor of shape (), a mean over positions, belongs there"),
        (lambda forward: forward.logits.mean() * math.nan, "as odd_loss is not finite; nothing of this round was sent"),
    ],
    ids=["a vector", "no gradient", "a float", "not a number"],
)
def test_a_term_that_is_none_is_named(term: Any, told: str, tiny_overrides: list[str]) -> None:
    def odd(forward: Any) -> Any:
        return term(forward)

    with pytest.raises(FedKeelError) as caught:
        fedkeel.run(read_tree(None, tiny_overrides), terms=[odd])
    assert told in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_rule_that_gives_nothing_back_is_named(tiny_overrides: list[str]) -> None:
    def nothing(*given: Any) -> None:
        return None

    with pytest.raises(fedkeel.FedKeelError, match="rule nothing returned NoneType; an Aggregate belongs there"):
        fedkeel.run(read_tree(None, tiny_overrides), rule=nothing)

    def narrow(reference: Any, updates: Any, weights: Any) -> Aggregate:
        """Of half the rank."""
        return Aggregate(Adapter({p: replace(f, a=f.a[:2], b=f.b[:, :2]) for p, f in reference.lora.items()}), 0.0)

    def holed(reference: Any, updates: Any, weights: Any) -> Aggregate:
        return Aggregate(Adapter(dict([*reference.lora.items()][1:])), 0.0)

    def worded(reference: Any, updates: Any, weights: Any) -> Aggregate:
        return Aggregate(reference, "none")  # type: ignore[arg-type]

    for wrong, told in (
        (narrow, r"rule narrow returned \S+\.a of shape \(2, 32\); \(4, 32\) belongs there"),
        (holed, r"rule holed returned no \S+\.a"),
        (worded, "rule worded returned an Aggregate of Adapter and error 'none'; an Adapter and a number belong there"),
    ):
        with pytest.raises(fedkeel.FedKeelError, match=told):
            fedkeel.run(read_tree(None, tiny_overrides), rule=wrong, existing="replace")
    with pytest.raises(fedkeel.FedKeelError, match="'x' is given for a term or rule, where a function belongs"):
        fedkeel.run(read_tree(None, tiny_overrides), terms=["x"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"terms": len}, r"terms = <built-in function len>: a list of functions belongs here"),
        ({"sites": [{"text": "a", "label": "b"}]}, "sites = list: a dict, name -> rows, belongs here"),
        ({"recipe": 5}, "recipe = 5: a path, a dict of keys or a Recipe belongs here"),
    ],
)
def test_what_is_given_wrongly_is_named(given: dict[str, Any], told: str) -> None:
    with pytest.raises(fedkeel.FedKeelError, match=told):
        fedkeel.run(given.pop("recipe", None), **given)


def test_numbers_of_numpy_and_torch_are_numbers(tiny_overrides: list[str]) -> None:
    tree = read_tree(None, [*tiny_overrides, "evaluation.baselines=[]", "federation.rounds=1"])
    given = {"train.lr": torch.tensor(0.25), "train.local_steps": numpy.int64(1), "lora.site_ranks": [numpy.int64(2), 4]}
    recipe = fedkeel.run({**tree, **given, "federation.rule": "svd"}).recipe
    assert (recipe.train.lr, recipe.train.local_steps, recipe.lora.site_ranks) == (0.25, 1, (2, 4))


def test_a_codec_that_decodes_to_something_else_is_named(tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(Cast):
        @property
        def name(self) -> str:
            return "short"

        def decode(self, encoded: Any, shapes: Any) -> Any:
            return {name: tensor[:1] for name, tensor in super().decode(encoded, shapes).items()}

    monkeypatch.setitem(tables.CODECS, "short", replace(tables.CODECS["fp32"], code=Short))
    with pytest.raises(fedkeel.FedKeelError, match=r"codec 'short' decodes to something else than was sent: \S+: float32"):
        fedkeel.run(read_tree(None, [*tiny_overrides, "federation.codec_up=short"]))


def test_a_site_without_rows_is_named() -> None:
    with pytest.raises(fedkeel.FedKeelError, match="site south has no row: give it some, or leave it out"):
        fedkeel.run(None, sites={"north": [{"text": "a", "label": "b"}], "south": []})
