"""Measures of small finished runs against slow twins: one forward a text, adapters loaded by PEFT, scores under `damaged`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from shapes import base as shape
from test_run import Silent
from typer.testing import CliRunner

from fedkeel import tables
from fedkeel.cli import app
from fedkeel.data.format import Formatter
from fedkeel.evidence.measure import damage, general, unseen
from fedkeel.evidence.measure import parts as measuring
from fedkeel.evidence.measure.damage import over_families, trained_by
from fedkeel.evidence.measure.general import against_base
from fedkeel.evidence.measure.parts import measure
from fedkeel.evidence.measure.run import Measured, MeasureError, Settings
from fedkeel.evidence.measure.table import measures_table
from fedkeel.evidence.report import read_rows
from fedkeel.federation.train import Round, train_round
from fedkeel.method.objective.distill import linear_cka
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Recipe
from fedkeel.rng import derive
from fedkeel.runs.execute import execute
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.prepare import prepare
from fedkeel.runs.served import served, trained_model
from fedkeel.scores.damage import damaged, family_index
from fedkeel.scores.evaluate import choose, overall, score
from fedkeel.scores.metrics import consistency
from fedkeel.tables import DAMAGES as FAMILIES
from fedkeel.types import Row

TEXT = "\n".join(
    (
        "the red boat turns to the sea",
        "",
        "  a blue lamp hums over the table, and nobody says why  ",
        "red",
        "the red boat turns to the sea",
        "",
    )
)
DAMAGE = Settings(("modules", "bits"), draws=2, rows=4, states=False, speculation=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """144 rows at three sites: say the colour (one of three), or repeat the verb in free text."""
    folder, rows = tmp_path_factory.mktemp("measured"), []
    for number in range(144):
        colour, verb = ("red", "green", "blue")[number % 3], ("sails", "sings", "runs")[number % 3]
        colours, split = number // 3 % 2, ("train", "train", "train", "test")[number // 6 % 4]
        row = {"department": f"ward-{number // 24 % 3}", "split": split, "input": f"the {colour} boat {verb} {number}"}
        what = ("colour", "Which colour?", colour) if colours else ("echo", "Repeat the verb.", verb)
        rows.append(row | dict(zip(("task", "instruction", "output"), what, strict=True)))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.json").write_text(json.dumps({"colour": {"labels": ["red", "green", "blue"]}}))
    return folder


def run(base: Path | str, data: Path, out: Path, *more: str) -> Path:
    """A finished federation of three sites."""
    overrides = [
        "name=tiny",
        f"out={out}",
        "threads=1",
        f"model.base={base}",
        "model.precision=fp32",
        "lora.rank=4",
        "data.source=jsonl",
        f"data.root={data}",
        'data.files=["rows.jsonl"]',
        "data.tasks_file=tasks.json",
        "data.site_column=department",
        "data.max_length=64",
        "train.local_steps=8",
        "train.batch_size=4",
        "train.lr=0.02",
        "federation.rounds=2",
        "evaluation.max_new_tokens=4",
        "evaluation.validation_rows=0",
        "evaluation.baselines=[]",
    ]
    recipe = load_recipe(None, [*overrides, *more])
    execute(prepare(recipe), RunFolder(out / "tiny"), Silent())
    return out / "tiny"


@pytest.fixture(scope="module")
def stream(tiny_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages, what is served an average of both."""
    more = ['stream.stages=["colour", "echo"]', "stream.average=0.5", "structure.lodrop=0.2"]
    return run(tiny_base, data, tmp_path_factory.mktemp("stream"), *more)


@pytest.fixture
def folder(stream: Path, tmp_path: Path) -> Path:
    """A copy of the stream's run, to measure."""
    return shutil.copytree(stream, tmp_path / "copy")


def values(rows: Sequence[Row]) -> dict[str, float]:
    return {r.name: r.value for r in rows if not r.task}


def loaded(folder: Path) -> tuple[Recipe, Any, Model, Formatter]:
    recipe = load_recipe(folder / "recipe.toml")
    prepared = prepare(recipe)
    model = trained_model(prepared.recipe, folder)
    return recipe, prepared, model, Formatter(model.tokenizer, model.kind, recipe.data.max_length, recipe.data.list_labels)


def test_damage_is_scores_under_damage_apart_for_what_training_used(folder: Path) -> None:
    found = measure([folder], DAMAGE)[folder]
    assert found.notes == ()
    got = values(found.rows)
    recipe, prepared, model, formatter = loaded(folder)
    rows = choose(prepared.stages[-1].all("test"), "test", 4)
    clean = score(model, formatter, rows, recipe.evaluation)
    expected = {"damage/clean": overall(clean), "damage/draws": 2.0, "damage/rows": 8.0}
    falls, index = [], {}
    for family, draws in (("modules", 2), ("bits", 1)):
        scores = {}
        for strength in FAMILIES[family].strengths:
            drawn = []
            for draw in range(draws):
                with damaged(model, family, strength, derive(0, draw)):
                    drawn.append(score(model, formatter, rows, recipe.evaluation))
            scores[strength] = mean(overall(s) for s in drawn)
            at = f"damage/{family}/{strength:g}"
            expected[f"{at}/score"] = scores[strength]
            same = [[a.prediction == b.prediction for a, b in zip(s, clean, strict=True)] for s in drawn]
            expected[f"{at}/agreement"] = mean(mean(map(float, s)) for s in same)
            labelled = [
                consistency(
                    *zip(
                        *[(a.distribution, b.distribution) for a, b in zip(s, clean, strict=True) if b.distribution],
                        strict=True,
                    )
                )
                for s in drawn
            ]
            expected[f"{at}/consistency"] = mean(labelled)
            if draws > 1:
                expected[f"{at}/sd"] = stdev(overall(s) for s in drawn)
            if family == "bits":
                falls.append(overall(clean) - scores[strength])
        index[family] = family_index(family, scores, overall(clean))
        expected[f"damage/{family}/ssi"] = index[family]
    expected |= {"damage/modules/trained": 1.0, "damage/bits/trained": 0.0, "damage/held_out_fall": mean(falls)}
    expected |= {"damage/held_out_ssi": index["bits"], "damage/trained_ssi": index["modules"]}
    size = got.pop("trainable_parameters")
    assert got == pytest.approx(expected, abs=1e-12)
    assert 0 < expected["damage/clean"] < 1
    assert size == sum(t.numel() for t in model.read().tensors().values())
    assert {(r.method, r.stage, r.round, r.site) for r in found.rows} == {("federated", 1, 4, "")}
    assert {r.split for r in found.rows if r.name.startswith("damage")} == {"test"}
    assert list(found.rows) == read_rows(folder / "measures.jsonl")


def test_every_family_is_told_what_trains_on_it() -> None:
    for structures in (entry.trained_by for entry in FAMILIES.values()):
        assert set(structures) <= tables.STRUCTURES.keys()


def test_what_a_training_disturbed_is_not_held_out() -> None:
    """Early exits train the stack that `depth` cuts; skipping a block trains both."""
    trained = {
        given: {family for family in FAMILIES if trained_by(load_recipe(None, [given]), family)}
        for given in ("seed=1", "exit.weight=0.1", "structure.skip=0.3")
    }
    assert trained == {"seed=1": set(), "exit.weight=0.1": {"depth"}, "structure.skip=0.3": {"depth", "skip"}}


def test_means_over_families_by_hand() -> None:
    clean = Row("r", "federated", 1, 1, "damage/clean", 0.8, "share", split="test")

    def rows(family: str, trained: float, ssi: float, *scores: float) -> list[Row]:
        told = {"trained": trained, "ssi": ssi} | {f"{n}/score": s for n, s in enumerate(scores)} | {"0/sd": 9.0}
        return [replace(clean, name=f"damage/{family}/{name}", value=value) for name, value in told.items()]

    families = {"a": rows("a", 0, 0.5, 0.6, 0.4), "b": rows("b", 0, 0.75, 0.7), "c": rows("c", 1, 0.25, 0.0)}
    found = values(over_families(clean, families))
    # 0.2, 0.4 and 0.1: every strength counts the same
    assert found == pytest.approx({"damage/held_out_ssi": 0.625, "damage/trained_ssi": 0.25, "damage/held_out_fall": 0.7 / 3})
    assert set(values(over_families(clean, {"c": families["c"]}))) == {"damage/trained_ssi"}


@pytest.mark.parametrize("rule", ["mean", "stack"])
def test_general_text_against_the_base_and_the_adapter_that_peft_loads(
    rule: str, tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`stack` moves the frozen maps: the base is still the one on disk."""
    folder = run(tiny_base, data, tmp_path, f"federation.rule={rule}", "data.max_length=24")
    text = tmp_path / "general.txt"
    text.write_text(TEXT)
    monkeypatch.setattr(general, "LOGITS", 410 * 20)  # one or two texts at a time
    monkeypatch.setattr(general, "DIVERGED", 410 * 3)
    settings = Settings((), general=(text,), general_rows=0, states=False)
    got = values(measure([folder], settings)[folder].rows)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    texts = ["the red boat turns to the sea", "a blue lamp hums over the table, and nobody says why", "red"]
    ids = [torch.tensor([tokenizer(t)["input_ids"][:24]]) for t in texts]
    ids = [i for i in ids if i.shape[1] > 1]
    with torch.no_grad():
        before = [base(i).logits[0, :-1].double().log_softmax(-1) for i in ids]
        tuned_model = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
        tuned = [tuned_model(i).logits[0, :-1].double().log_softmax(-1) for i in ids]
    divergences, p_nats, q_nats = [], [], []
    for p, q, i in zip(before, tuned, ids, strict=True):
        divergences += (p.exp() * (p - q)).sum(1).tolist()
        p_nats += [-float(row[token]) for row, token in zip(p, i[0, 1:], strict=True)]
        q_nats += [-float(row[token]) for row, token in zip(q, i[0, 1:], strict=True)]
    assert len(divergences) > 20
    assert got["kl_to_base"] == pytest.approx(mean(divergences), rel=1e-4)
    assert got["kl_to_base"] > 1e-3
    assert got["perplexity_ratio"] == pytest.approx(math.exp(mean(q_nats)) / math.exp(mean(p_nats)), rel=1e-4)
    assert abs(got["perplexity_ratio"] - 1) > 1e-3


def test_an_untrained_adapter_says_what_the_base_says(tiny_base: Path) -> None:
    recipe = load_recipe(None, [f"model.base={tiny_base}", "model.precision=fp32"])
    model = Model(recipe.model, recipe.lora, 1)
    texts = [model.tokenizer(t)["input_ids"] for t in TEXT.splitlines() if t]
    done: list[int] = []
    assert against_base(model, model, texts, done.append) == (0.0, 1.0)
    assert sum(done) == len(texts)


@torch.no_grad()
def states_of(model: Model, formatter: Formatter, records: Sequence[Any]) -> np.ndarray:
    """The output of the first block at the positions that predict each answer, one unpadded row at a time."""
    found = []
    for example in map(formatter.encode, records):
        hidden = model.net(input_ids=torch.tensor([example.ids]), output_hidden_states=True).hidden_states[1][0]
        found += [hidden[t - 1].numpy() for t in range(1, len(example.ids)) if example.supervised[t]]
    return np.array(found)


def test_states_of_stages_and_sites_against_one_row_at_a_time(folder: Path) -> None:
    rows = measure([folder], Settings(()))[folder].rows
    recipe, prepared, model, formatter = loaded(folder)
    assert model.initial is not None
    records = choose(prepared.stages[-1].all("test"), "test", 0)
    first = model.taps[0]
    assert {r.name for r in rows if "cka" in r.name} == {f"{k}_cka/{tap}" for k in ("state", "site") for tap in model.taps}
    final = served(RunFolder(folder), "federated", 2, 1, recipe.stream, model.initial)
    end = states_of(model, formatter, records)
    stage = {r.stage: r.value for r in rows if r.name == f"state_cka/{first}"}
    model.write(served(RunFolder(folder), "federated", 2, 0, recipe.stream, model.initial))
    before = states_of(model, formatter, records)
    assert stage == {0: pytest.approx(float(linear_cka(torch.tensor(before), torch.tensor(end))), abs=1e-5), 1: 1.0}
    assert stage[0] < 0.999
    state = RunFolder(folder).read_checkpoint("federated", 4, model.initial)
    sites = {r.site: r.value for r in rows if r.name == f"site_cka/{first}"}
    assert set(sites) == set(prepared.sites.rows)
    for site, value in sites.items():
        model.write(final)
        examples = formatter.encode_all(prepared.stages[-1].rows[site]["train"])
        with torch.enable_grad():
            train_round(model, examples, Round(site, 2, recipe, replace(state, round=3, adapter=final)))
        after = states_of(model, formatter, records)
        assert value == pytest.approx(float(linear_cka(torch.tensor(after), torch.tensor(end))), abs=1e-5)
        assert value < 0.9999
    assert len(set(sites.values())) == 3


@pytest.mark.slow
def test_measuring_goes_on_where_it_was_and_ends_as_in_one_go(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "general.txt"
    text.write_text(TEXT)
    whole = shutil.copytree(folder, tmp_path / "whole")
    settings = replace(DAMAGE, general=(text,), states=True)
    expected = measure([whole], settings)[whole]
    real = damage.outcomes

    def cut(*args: Any, **more: Any) -> Any:
        if args[2] == "bits":
            raise KeyboardInterrupt
        return real(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(damage, "outcomes", cut)
        with pytest.raises(KeyboardInterrupt):
            measure([folder], settings)
    assert any(r.name.startswith("damage/modules/") for r in read_rows(folder / "measures.jsonl"))
    seen: list[str] = []
    assert measure([folder], settings, lambda _, part, done, total: seen.append(part))[folder] == expected
    assert set(seen) == {"damage/bits", "general", "states"}
    assert (folder / "measures.jsonl").read_bytes() == (whole / "measures.jsonl").read_bytes()

    with monkeypatch.context() as patch:
        for heavy in ("prepare", "Model"):
            patch.setattr(measuring, heavy, lambda *args: pytest.fail("loaded again"))
        assert measure([folder], settings)[folder] == expected
        assert measure([folder], replace(settings, families=("bits",)))[folder] == expected  # what is there stays
        for changed in (replace(settings, draws=3), replace(settings, families=("skip",)), replace(settings, rows=1)):
            with pytest.raises(pytest.fail.Exception):
                measure([folder], changed)
        text.write_text(TEXT + "more\n")
        with pytest.raises(pytest.fail.Exception):
            measure([folder], settings)

    # other draws: what was measured with the old ones is not mixed in
    found = values(measure([folder], Settings(("bits",), draws=1, rows=4, states=False))[folder].rows)
    assert "damage/bits/4/score" in found
    assert not [name for name in found if name.startswith("damage/modules")]
    assert "kl_to_base" in found
    # another adapter: nothing of what was there is its
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"another")
    assert "kl_to_base" not in values(measure([folder], Settings((), states=False))[folder].rows)


@pytest.mark.slow
def test_runs_on_one_base_load_it_once(
    folder: Path, tmp_path: Path, tiny_base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two methods of one seed, a run of another seed between them: each as measured alone."""
    other = run(tiny_base, data, tmp_path / "seed", "seed=2")
    third = run(tiny_base, data, tmp_path / "third", 'stream.stages=["colour", "echo"]', "train.lr=0.005")
    alone = [measure([f], DAMAGE)[f] for f in (folder, other, third)]
    for path in (folder, other, third):
        (path / "measures.json").unlink()
    calls: list[int] = []
    real = measuring.Model
    monkeypatch.setattr(measuring, "Model", lambda *args: calls.append(1) or real(*args))
    found = measure([folder, other, third], DAMAGE)
    assert list(found) == [folder, other, third]
    assert list(found.values()) == alone
    assert len(calls) == 2
    assert len({m.rows[0].seed for m in found.values()}) == 2
    assert alone[0].rows != alone[2].rows


UNSEEN = [
    {"task": "mood", "text": "the red boat sings", "label": "glad"},
    {"task": "mood", "text": "the blue lamp breaks", "label": "very_sad"},
    {"task": "mood", "text": "a green door", "label": "glad", "split": "train"},
    {"task": "size", "instruction": "How large?", "input": "the sea", "output": "large"},
    {"task": "colour", "instruction": "Which colour?", "input": "the red sea", "output": "red"},
]


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_unseen_tasks_are_scored_before_and_after(kind: str, folder: Path, data: Path, tmp_path: Path) -> None:
    if kind == "classifier":  # its classes are the colours, and the answers here are others
        folder = run(shape("bert"), data, tmp_path / "encoder")
    path, tasks = tmp_path / "unseen.jsonl", tmp_path / "about.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in UNSEEN))
    tasks.write_text(json.dumps({"size": {"labels": ["large", "small"]}}))
    settings = Settings((), unseen=path, unseen_tasks=tasks, states=False)
    rows = [r for r in measure([folder], settings)[folder].rows if r.split == "unseen"]
    recipe = load_recipe(folder / "recipe.toml")
    classes = ("glad", "large", "small", "very sad") if kind == "classifier" else ()
    expected: dict[tuple[str, str], float] = {}
    for method in ("base", "federated"):
        model = Model(recipe.model, recipe.lora, recipe.seed, classes)
        if method == "federated":
            final = trained_model(recipe, folder).read()
            model.write(final)
        formatter = Formatter(model.tokenizer, model.kind, 64, classes=model.classes)
        records = unseen.unseen_records(settings, prepare(recipe))
        assert sorted((r.task, r.input, r.labels) for r in records) == [
            ("mood", "the blue lamp breaks", ("glad", "very sad")),
            ("mood", "the red boat sings", ("glad", "very sad")),
            ("size", "the sea", ("large", "small")),
        ]
        hits = {
            task: [s.score for s in score(model, formatter, records, recipe.evaluation) if s.record.task == task]
            for task in ("mood", "size")
        }
        expected |= {(method, task): mean(found) for task, found in hits.items()}
        expected[method, ""] = mean(map(mean, hits.values()))
    assert {(r.method, r.task): r.value for r in rows if r.name == "score"} == expected
    assert {(r.task, r.value) for r in rows if r.name == "rows"} == {("mood", 2.0), ("size", 1.0)}


def test_what_cannot_be_measured_is_said(tiny_base: Path, data: Path, folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "general.txt"
    text.write_text(TEXT)
    personal = run(tiny_base, data, tmp_path / "personal", "federation.rule=share_a")
    found = measure([personal, folder], replace(DAMAGE, general=(text,), states=True))
    assert [r.name for r in found[personal].rows] == ["trainable_parameters"]
    (note,) = found[personal].notes
    assert note.startswith("damage, damage/modules, damage/bits, general, states not measured, as rule 'share_a' leaves")
    assert found[folder].notes == ()
    encoder = run(shape("bert"), data, tmp_path / "encoder", "model.head=linear")
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text("".join(json.dumps(row) + "\n" for row in UNSEEN[:2]))
    measured = measure([encoder], Settings((), general=(text,), unseen=unseen))[encoder]
    assert [n.partition(" not measured")[0] for n in measured.notes] == ["general", "unseen"]
    assert {r.name.partition("/")[0] for r in measured.rows} == {"trainable_parameters", "state_cka", "site_cka"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"families": ("thunder",)}, "'thunder'; there are heads"),
        ({"draws": 0}, "draws are from 1"),
        ({"rows": -1}, "rows from 0"),
        ({"general": (Path("nowhere.txt"),)}, "nowhere.txt is no file"),
        ({"unseen_tasks": Path("nowhere.json")}, "none is named"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(MeasureError, match=told):
        Settings(**settings)


def test_a_folder_without_a_finished_run_stops_before_any_work(folder: Path, tmp_path: Path, data: Path) -> None:
    with pytest.raises(MeasureError, match=r"recipe\.toml is missing"):
        measure([folder, tmp_path / "nothing"], DAMAGE)
    assert not (folder / "measures.json").exists()
    seen = replace(DAMAGE, families=(), unseen=data / "rows.jsonl")
    with pytest.raises(MeasureError, match="no test row of a task that no site trained on; its tasks are colour, echo"):
        measure([folder], seen)
    (folder / "measures.json").write_text("{")
    with pytest.raises(MeasureError, match=r"measures\.json cannot be read"):
        measure([folder], DAMAGE)


ONE = ["federation.weighting=uniform", "federation.rounds=1", "train.local_steps=2"]


@pytest.mark.parametrize(
    "more",
    [
        ["privacy.masks=true"],
        ["privacy.masks=true", "federation.codec_up=int8"],
        pytest.param(["privacy.unit=site", "privacy.noise=0.1", "privacy.quantile=0.5"], marks=pytest.mark.slow),
        pytest.param(["privacy.unit=row", "privacy.noise=0.5"], marks=pytest.mark.slow),
        pytest.param(["structure.skip=0.5", "structure.hold=true"], marks=pytest.mark.slow),
    ],
    ids=lambda more: more[0],
)
def test_a_site_trains_once_more_whatever_hides_it(more: list[str], tiny_base: Path, data: Path, tmp_path: Path) -> None:
    folder = run(tiny_base, data, tmp_path, *ONE, *more)
    found = measure([folder], Settings((), rows=4, speculation=False))[folder]
    assert {r.site for r in found.rows if r.name.startswith("site_cka/")} == {"ward-0", "ward-1", "ward-2"}
    assert not found.notes


def test_a_site_trains_once_more_by_all_that_its_rounds_went_by(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the classifiers of all sites' rows, with the anchor as teacher."""
    more = [*ONE, "data.tasks=colour", "model.head=analytic", "evidence.anchor=1"]
    folder = run(shape("bert"), data, tmp_path, *more)
    heads: list[bool] = []
    real = train_round

    def seen(model: Model, examples: Any, round: Round, *rest: Any) -> Any:
        heads.append(model.by_head is not None and set(round.state.heads) == {"colour"})
        return real(model, examples, round, *rest)

    monkeypatch.setattr("fedkeel.federation.client.train_round", seen)
    measure([folder], Settings((), rows=4))
    assert heads == [True] * 3


def test_the_command_and_its_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setenv("COLUMNS", "200")
    arguments = [
        "measure",
        str(folder),
        "--families",
        "bits",
        "--rows",
        "4",
        "--no-states",
        "--no-speculation",
        "--threads",
        "1",
    ]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    found = values(read_rows(folder / "measures.jsonl"))
    assert f"{100 * found['damage/clean']:.1f}" in told.output
    assert threads == [1]
    table = measures_table({folder: Measured(read_rows(folder / "measures.jsonl"), ("x not measured",))})
    assert table.header == ("run", "undamaged", "held-out damage: mean fall", "SSI held out")
    cells = (
        f"{100 * found['damage/clean']:.1f}",
        f"{100 * found['damage/held_out_fall']:.1f}",
        f"{found['damage/held_out_ssi']:.3f}",
    )
    assert table.lines == (("copy", *cells),)
    assert "copy: x not measured." in table.notes
