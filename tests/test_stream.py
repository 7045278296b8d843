"""A task stream: what arrives when, who is asked, what is scored, and what a stage begins anew."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import Silent, adapter_of, go, rows_of, same, without_time
from training import same_bits

import fedkeel.federation.local
import fedkeel.federation.train
import fedkeel.runs.here
from fedkeel import tables
from fedkeel.data.batches import batch_indices
from fedkeel.data.format import Example, Formatter
from fedkeel.data.sites import Sites, unseen_sites
from fedkeel.data.stages import arrivals
from fedkeel.evidence.report import write_report
from fedkeel.exchange.channel import Feedback
from fedkeel.exchange.messages import unpack_global
from fedkeel.federation.client import Site
from fedkeel.federation.kept import Kept
from fedkeel.federation.server import RoundResult, sample_sites
from fedkeel.federation.train import Round, learning_rate, train_round
from fedkeel.method.objective.distill import guidance_weight
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import ConfigError
from fedkeel.rng import derive
from fedkeel.runs.dry import Dry
from fedkeel.runs.legs import legs_of
from fedkeel.runs.planned import check_stages
from fedkeel.runs.prepare import Prepared, prepare
from fedkeel.scores.evaluate import score
from fedkeel.scores.metrics import mean
from fedkeel.types import Record

DOMAINS = {
    "account balance": "bank",
    "pay bill": "bank",
    "book flight": "travel",
    "lost luggage": "travel",
    "set alarm": "home",
}
LABELS = list(DOMAINS)
GROUPS = ["stream.stages=bank,travel+home"]
TASKS = ["stream.stages=intent,echo"]
METHOD = [
    "distill.weight=1",
    "distill.ramp=0.3",
    "distill.align=cosine",
    "distill.memory=0.4",
    "structure.mode=anchored",
    "structure.heads=0.2",
    "structure.rank=0.2",
    "structure.adversary=0.05",
    "structure.ramp=0.3",
]


def stream_rows() -> list[dict[str, str]]:
    """Sites north and south hold every label; east has no row of the domain `bank`. Each has twelve rows to repeat a word."""
    rows = []
    for site, count in (("north", 10), ("south", 5), ("east", 5)):
        for number in range(4 * count):
            label = LABELS[number % 5]
            split = ("train", "train", "validation", "test")[number // 5 % 4]
            if site == "east" and DOMAINS[label] == "bank":
                continue
            rows.append({"task": "intent", "ward": site, "split": split, "text": f"{label} {site} {number}", "label": label})
        for number in range(12):
            split = ("train", "train", "validation", "test")[number % 4]
            row = {"task": "echo", "ward": site, "split": split, "instruction": "Repeat.", "input": f"red {number} {site}"}
            rows.append({**row, "output": "red"})
    return rows


@pytest.fixture(scope="module")
def stream_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream_data")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stream_rows()))
    about = {"intent": {"instruction": "What is wanted?", "labels": LABELS, "label_domain": DOMAINS}}
    (folder / "tasks.json").write_text(json.dumps({"tasks": about}))
    return folder


@pytest.fixture
def stream(tiny_overrides: list[str], stream_data: Path) -> list[str]:
    """key=value of a run of two rounds of two steps a stage, at three sites; no baselines."""
    return [
        *tiny_overrides,
        f"data.root={stream_data}",
        "data.site_column=ward",
        "federation.rounds=2",
        "train.local_steps=2",
        "evaluation.baselines=[]",
        "evaluation.validation_rows=2",
        "evaluation.max_new_tokens=2",
    ]


def prepared_of(overrides: list[str]) -> Prepared:
    return prepare(load_recipe(None, overrides))


def value(rows: list[dict[str, Any]], name: str, **where: Any) -> float:
    found = [r for r in rows if r["name"] == name and all(r[k] == v for k, v in where.items())]
    assert len(found) == 1, (name, where, found)
    return found[0]["value"]


# ------------------------------------------------------------------------------------------------------------------ arrival


def record(task: str, group: str = "", split: str = "train", id: str = "") -> Record:
    return Record(id or f"{task}-{group}-{split}", task, split, "x", input="x", group=group)


def at(*stages: str) -> Recipe:
    return load_recipe(None, ["stream.stages=" + json.dumps(list(stages))])


def test_records_arrive_by_task_or_by_group() -> None:
    records = [record("a"), record("b"), record("c", "c1"), record("c", "c2"), record("d", "d1")]
    assert arrivals(records, at("a+c2", "b", "c1")) == [0, 1, 2, 0, -1]
    assert arrivals(records, at("c", "d + a", "b")) == [1, 2, 0, 0, 1]
    assert arrivals(records, load_recipe(None, [])) == [0] * 5


def test_a_task_and_one_of_its_groups_are_not_named_together() -> None:
    records = [record("c", "c1"), record("c", "c2")]
    with pytest.raises(ConfigError, match="names 'c1' of 'c' and the whole task too"):
        arrivals(records, at("c1", "c"))


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        (["echo", "intnt"], "no row is of a task, label group or label 'intnt'; did you mean 'intent'?"),
        (["bank", "zebra"], "'zebra'; known: bank, echo, home, intent, travel"),
        (["bank+echo", "travel+bank"], "'bank' stands twice"),
        (["bank+bank"], "'bank' stands twice"),
        (["echo", ""], "no row is of a task, label group or label ''"),
    ],
)
def test_stages_that_cannot_be(stream: list[str], stages: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepared_of([*stream, "stream.stages=" + json.dumps(stages)])
    assert told in str(caught.value)


def test_a_stage_without_training_rows_is_named() -> None:
    records = [record("a"), record("b", split="test"), record("c", "c1", "validation"), record("c", "c2")]
    assert arrivals(records, at("a", "c2+b")) == [0, 1, -1, 1]
    with pytest.raises(ConfigError, match=r"stage 2 \(b \+ c1\) has no training row"):
        arrivals(records, at("a+c2", "b+c1"))


def test_an_order_is_the_stages_that_it_names_and_its_tasks_need_rows(
    stream: list[str], stream_data: Path, tmp_path: Path
) -> None:
    about = json.loads((stream_data / "tasks.json").read_text())
    orders = {"back": ["echo", "intent"], "more": ["echo", "gone", "intent", "lost"]}
    (tmp_path / "tasks.json").write_text(json.dumps({**about, "task_orders": orders}))
    (tmp_path / "rows.jsonl").write_text((stream_data / "rows.jsonl").read_text())
    here = [*stream, f"data.root={tmp_path}"]
    ordered, plain = prepared_of([*here, "stream.order=back"]), prepared_of([*here, "stream.stages=echo,intent"])
    assert (ordered.sites, ordered.stages, ordered.arrival) == (plain.sites, plain.stages, plain.arrival)
    with pytest.raises(
        ConfigError, match=r"stream\.order = 'more' names gone, lost, and no row is of these 2 tasks: add .* data\.tasks"
    ):
        prepared_of([*here, "stream.order=more"])
    assert prepared_of([*here, "stream.order=more", "data.tasks=echo,intent"]).stages == plain.stages


def test_rows_of_no_stage_are_left_out_and_counted(stream: list[str]) -> None:
    prepared = prepared_of([*stream, "stream.stages=bank,echo"])
    gone = [r for r in stream_rows() if r.get("label") and DOMAINS[r["label"]] != "bank"]
    assert f"{len(gone)} rows left out: no stage of the stream names their task or label" in prepared.notes
    left = [r for split in ("train", "validation", "test") for r in prepared.sites.all(split)]
    assert len(left) == len(stream_rows()) - len(gone)
    assert {r.group for r in left} == {"", "bank"}
    assert {r.id for r in left} == set(prepared.arrival)


def test_without_a_stream_there_is_one_stage_with_everything(stream: list[str]) -> None:
    prepared = prepared_of(stream)
    assert len(prepared.stages) == 1
    assert prepared.stages[0] == prepared.sites
    assert set(prepared.arrival.values()) == {0}


# ----------------------------------------------------------------------------------------------------- what a stage consists of


def test_training_rows_are_of_the_stage_and_held_out_rows_of_all_so_far(stream: list[str]) -> None:
    prepared = prepared_of([*stream, "stream.stages=bank,home+echo,travel"])
    come = {"bank": 0, "home": 1, "": 1, "travel": 2}
    for name, held in prepared.sites.rows.items():
        for stage in range(3):
            for split, records in held.items():
                got = {r.id for r in prepared.stages[stage].rows[name][split]}
                if split == "train":
                    assert got == {r.id for r in records if come[r.group] == stage}
                else:
                    assert got == {r.id for r in records if come[r.group] <= stage}
    assert not prepared.stages[0].rows["east"]["train"]
    assert len(prepared.stages[0].rows["north"]["train"]) == 8


def test_replay_keeps_a_few_training_rows_of_each_earlier_stage(stream: list[str]) -> None:
    """Against taking the row with the least hash again and again, by site and stage; all where there are fewer."""
    stages = [*stream, "stream.stages=bank,home+echo,travel"]
    plain, prepared = prepared_of(stages), prepared_of([*stages, "stream.replay=7"])
    assert "between stages a site keeps up to 7 training rows of each stage, chosen by a hash of their id" in prepared.notes
    assert "between stages a site keeps no row: what it learnt is in the adapter alone" in plain.notes
    come = {"bank": 0, "home": 1, "": 1, "travel": 2}
    kept_counts = set()
    for name, held in prepared.sites.rows.items():
        kept: list[str] = []
        for stage in range(3):
            new = [r.id for r in held["train"] if come[r.group] == stage]
            got = prepared.stages[stage].rows[name]["train"]
            assert [r.id for r in got] == sorted(new + kept)
            assert {r.labels for r in got if r.labels} <= {prepared.stages[stage].all("test")[-1].labels}
            for split in ("validation", "test"):
                assert prepared.stages[stage].rows[name][split] == plain.stages[stage].rows[name][split]
            left = list(new)
            for _ in range(min(7, len(new))):
                kept.append(left.pop(min(range(len(left)), key=lambda n: derive(1, "replay", left[n]))))
            kept_counts.add(min(7, len(new)))
    assert {0, 4, 7} <= kept_counts


def test_a_site_without_new_rows_takes_part_with_what_it_keeps(stream: list[str]) -> None:
    """Whole tasks to two sites: without replay one site learns in each stage; with it the first goes on with two rows."""
    shares = [*stream, *TASKS, "partition.scheme=by-task", "partition.sites=2"]
    first, second = (
        name
        for task in ("intent", "echo")
        for name, held in prepared_of(shares).sites.rows.items()
        if held["train"][0].task == task
    )
    asked = []
    for replay in (0, 2):
        watch = Silent()
        every = [f"stream.replay={replay}", f"name=replay-{replay}", 'evaluation.baselines=["local"]']
        _, folder, _ = go([*shares, *every], watch)
        rows = rows_of(folder)
        asked.append([[u.site for u in result.updates] for leg, result in watch.results if leg == "federated"])
        # test rows follow the partition, and a stage scores what has come by then
        own = {
            (r["stage"], r["site"])
            for r in rows
            if r["name"] == "own_score" and r["split"] == "test" and r["method"] == "federated"
        }
        assert own == {(0, first), (1, first), (1, second)}
        learnt = {(r["site"], r["stage"]) for r in rows if r["name"] == "loss" and r["method"] == "local"}
        assert learnt == {(first, 0), (second, 1)} | ({(first, 1)} if replay else set())
    assert asked == [[[first]] * 2 + [[second]] * 2, [[first]] * 2 + [sorted([first, second])] * 2]


def test_tasks_dealt_unevenly_leave_some_sites_out_of_a_stage(stream: list[str]) -> None:
    """Dirichlet over tasks: all of one task is at one site, and a site is asked in the stages of which it has rows."""
    skew = ["partition.scheme=dirichlet", "partition.over=tasks", "partition.sites=2", "partition.alpha=0.2", "seed=7"]
    recipe, folder, _ = go([*stream, *TASKS, *skew])
    prepared = prepare(recipe)
    holders = [{name for name, held in stage.rows.items() if held["train"]} for stage in prepared.stages]
    assert list(map(len, holders)) == [2, 1]
    told = {(r["site"], r["stage"]) for r in rows_of(folder) if r["name"] == "loss"}
    assert told == {(name, stage) for stage, names in enumerate(holders) for name in names}


def test_candidates_are_the_labels_seen_so_far(stream: list[str]) -> None:
    """Class-incremental where stages name label groups, in the order of the tasks file; training, test and validation alike."""
    prepared = prepared_of([*stream, *GROUPS])
    for stage, seen in ((0, ("account balance", "pay bill")), (1, tuple(LABELS))):
        for split in ("train", "validation", "test"):
            labels = {r.labels for r in prepared.stages[stage].all(split)}
            assert labels == {seen}, (stage, split)
    turned = prepared_of([*stream, "stream.stages=home,bank,travel"])
    assert {r.labels for r in turned.stages[0].all("test")} == {("set alarm",)}
    assert {r.labels for r in turned.stages[1].all("test")} == {("account balance", "pay bill", "set alarm")}


def test_labels_of_a_task_without_groups_are_named_themselves(stream: list[str], stream_data: Path, tmp_path: Path) -> None:
    """The same stages as by groups, said by labels, as the rows write them or as words."""
    about = {"intent": {"instruction": "What is wanted?", "labels": LABELS}}
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": about}))
    (tmp_path / "rows.jsonl").write_text((stream_data / "rows.jsonl").read_text())
    grouped = prepared_of([*stream, "stream.stages=bank,home+echo,travel"])
    by_label = [
        *stream,
        f"data.root={tmp_path}",
        "stream.stages=account_balance+pay bill,set_alarm+echo,book flight+lost_luggage",
    ]
    found = prepared_of(by_label)
    assert found.arrival == grouped.arrival
    for mine, its in zip(found.stages, grouped.stages, strict=True):
        for split in ("train", "validation", "test"):
            assert [(r.id, r.labels) for r in mine.all(split)] == [(r.id, r.labels) for r in its.all(split)]
    # a site alone, which holds no row of some labels, knows when these arrive all the same
    own = tmp_path / "east"
    own.mkdir()
    (own / "tasks.json").write_text(json.dumps({"tasks": about}))
    (own / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stream_rows() if row["ward"] == "east"))
    alone = prepare(load_recipe(None, [*by_label, f"data.root={own}"]), "east")
    seen = [{r.labels for r in at.all("test") if r.labels} for at in alone.stages]
    assert seen == [{r.labels for r in at.rows["east"]["test"] if r.labels} for at in found.stages]
    assert seen == [set(), {tuple(label for label in LABELS if DOMAINS[label] != "travel")}, {tuple(LABELS)}]
    with pytest.raises(ConfigError, match="names 'pay bill' of 'intent' and the whole task too"):
        prepared_of([*stream, f"data.root={tmp_path}", "stream.stages=pay_bill,intent"])


def test_candidates_are_all_labels_where_stages_name_tasks(stream: list[str]) -> None:
    prepared = prepared_of([*stream, *TASKS])
    assert {r.labels for r in prepared.stages[0].all("train")} == {tuple(LABELS)}
    assert {(r.task, r.labels) for r in prepared.stages[1].all("test")} == {("intent", tuple(LABELS)), ("echo", ())}
    assert {r.task for r in prepared.stages[1].all("train")} == {"echo"}


def test_no_prompt_names_a_label_that_is_yet_to_come(stream: list[str]) -> None:
    prepared = prepared_of([*stream, *GROUPS])
    model = Model(prepared.recipe.model, prepared.recipe.lora, 1)
    formatter = Formatter(model.tokenizer, "causal", 128)
    texts = [model.tokenizer.decode(e.ids) for e in formatter.encode_all(prepared.stages[0].all("train"))]
    assert all("Options: account balance, pay bill" in t for t in texts)
    assert not any("flight" in t or "alarm" in t for t in texts)


# ------------------------------------------------------------------------------------------------------------------- a run


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, bool, dict[str, int]]]:
    """(round, site, whether a memory came, counts that came) of every request of a run."""
    found: list[tuple[int, str, bool, dict[str, int]]] = []
    real = fedkeel.federation.local.answer

    def answer(payload: bytes, model: Model, site: Site, kept: Kept) -> bytes:
        header, state = unpack_global(payload, "global", model.read())
        found.append((state.round, site.name, state.memory is not None, header["tasks"]))
        return real(payload, model, site, kept)

    monkeypatch.setattr(fedkeel.federation.local, "answer", answer)
    return found


def test_a_site_without_rows_of_a_stage_is_not_asked_in_it(stream: list[str], heard: list[Any]) -> None:
    watch = Silent()
    _, folder, _ = go([*stream, *GROUPS], watch)
    asked = defaultdict(list)
    for round, site, _, _ in heard:
        asked[round].append(site)
    assert asked == {0: ["north", "south"], 1: ["north", "south"], 2: ["east", "north", "south"], 3: ["east", "north", "south"]}
    assert [len(result.updates) for _, result in watch.results] == [2, 2, 3, 3]
    rows = rows_of(folder)
    assert {(r["round"], r["stage"]) for r in rows if r["name"] == "loss"} == {(1, 0), (2, 0), (3, 1), (4, 1)}
    assert {(r["round"], r["stage"]) for r in rows if r["split"] == "test"} == {(2, 0), (4, 1)}
    assert {(r["round"], r["stage"]) for r in rows if r["split"] == "validation"} == {(1, 0), (2, 0), (3, 1), (4, 1)}
    assert watch.work == pytest.approx(watch.total)


def test_counts_come_down_from_the_second_round_on(stream: list[str], heard: list[Any]) -> None:
    """What the sites reported in the round before, by task: the first messages of a stage know nothing."""
    watch = Silent()
    go([*stream, *TASKS, "distill.weight=1"], watch)
    by_round = {round: counts for round, _, _, counts in heard}
    assert by_round[0] == by_round[2] == {}
    assert set(by_round[1]) == {"intent"}
    assert set(by_round[3]) == {"echo"}
    told = [dict(u.tasks) for u in watch.results[0][1].updates]
    assert by_round[1] == {"intent": sum(t["intent"] for t in told)}


@pytest.mark.parametrize("share", [pytest.param(0.0, marks=pytest.mark.slow), 0.4])
def test_the_memory_is_the_end_of_the_stage_before_and_travels_only_where_it_is_used(
    stream: list[str], heard: list[Any], share: float
) -> None:
    watch = Silent()
    stages = ["stream.stages=bank,travel,home+echo", "distill.weight=1", f"distill.memory={share}"]
    recipe, folder, model = go([*stream, *stages], watch)
    came = {(round, memory) for round, _, memory, _ in heard}
    # in the first round of a stage the memory is the global adapter that comes down anyway
    assert came == {(r, bool(share) and r in (3, 5)) for r in range(6)}
    results = [result for _, result in watch.results]
    for done, result in enumerate(results):
        if not share or done not in (3, 5):
            assert result.state.memory is None
        else:
            assert same_bits(result.state.memory.tensors(), results[2 * (done // 2) - 1].state.adapter.tensors())
    stored = folder.read_checkpoint("federated", 5, model.read())
    assert (stored.memory is not None) == bool(share)
    assert stored.counts == results[4].state.counts
    assert stored.drift == results[4].state.drift
    down = {round: result.bytes_down["north"] for round, result in enumerate(results)}
    told = Dry(prepare(recipe)).traffic
    numbers = sum(t.numel() for t in model.read().tensors().values())
    assert down[3] - down[1] == pytest.approx(4 * numbers if share else 0, abs=4000)
    assert told.down == pytest.approx(down[3], abs=400)
    sent = sum(sum(r.bytes_down.values()) + sum(r.bytes_up.values()) for r in results)
    assert told.rounds == pytest.approx(sent, rel=0.02)


@pytest.mark.parametrize("memory", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_what_is_served_is_averaged_along_the_stages(stream: list[str], heard: list[Any], memory: float) -> None:
    """By hand from the stages' ends: served_1 = end_1, served_2 = 0.4 served_1 + 0.6 end_2, and so on; training goes on from
    the ends, and the memory of a stage is what was served before it."""
    stages = ["stream.stages=bank,travel,home+echo", "stream.average=0.4", "distill.weight=1", f"distill.memory={memory}"]
    _, folder, model = go([*stream, *stages])
    ends = [folder.read_checkpoint("federated", 2 * s, model.read()).adapter.tensors() for s in (1, 2, 3)]
    second = {name: 0.4 * ends[0][name].double() + 0.6 * t.double() for name, t in ends[1].items()}
    third = {name: 0.4 * second[name] + 0.6 * t.double() for name, t in ends[2].items()}
    for name, tensor in model.read().tensors().items():
        torch.testing.assert_close(tensor.double(), third[name], rtol=0, atol=1e-6)
    came = {(round, bool(sent)) for round, _, sent, _ in heard}
    assert came == {(r, bool(memory) and r >= 2) for r in range(6)}
    kept = folder.read_checkpoint("federated", 5, model.read()).memory
    assert (kept is not None) == bool(memory)
    if kept is not None:
        for name, tensor in kept.tensors().items():
            torch.testing.assert_close(tensor.double(), second[name], rtol=0, atol=1e-6)
    # without a structure or guidance in between, training itself is untouched by what is served
    if not memory:
        _, other, again = go([*stream, *stages, "stream.average=0", "name=last"])
        last = other.read_checkpoint("federated", 6, again.read()).adapter
        assert same_bits(ends[2], last.tensors())
        assert same_bits(ends[2], again.read().tensors())


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["federation.codec_up=int8", "federation.codec_down=int4"],
        ["structure.branch=0.3", "structure.skip=0.5", "structure.hold=true"],
        pytest.param(["attack.kind=gaussian", "attack.share=0.4"], marks=pytest.mark.slow),
    ],
    ids=["exact", "lossy", "held", "attacked"],
)
def test_each_stage_trains_its_own_ranks_and_no_others(stream: list[str], more: list[str]) -> None:
    stages = ["stream.stages=bank,travel,home+echo", "lora.rank=8", "stream.slices=true", "term.orthogonal.weight=0.5"]
    _, folder, model = go([*stream, *stages, *more])
    assert model.initial is not None
    ends = [model.initial] + [folder.read_checkpoint("federated", 2 * s, model.read()).adapter for s in (1, 2, 3)]
    for stage, mine in enumerate((range(2), range(2, 5), range(5, 8))):  # of eight ranks, among three stages
        others = [rank for rank in range(8) if rank not in mine]
        for path, before in ends[stage].lora.items():
            after = ends[stage + 1].lora[path]
            assert torch.equal(after.a[others], before.a[others])
            assert torch.equal(after.b[:, others], before.b[:, others])
            assert (after.b[:, mine] != before.b[:, mine]).any()
            assert (after.a[mine] != before.a[mine]).any()


def test_what_was_left_unsent_of_an_earlier_stages_ranks_is_forgotten(
    stream: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No residual is of a rank that has no change in the round."""
    came: list[tuple[Any, Any]] = []

    def leaves(self: Feedback, tensors: Any, memory: Any) -> Any:
        came.append((dict(tensors), dict(memory)))
        return real(self, tensors, memory)

    real = Feedback.leaves
    monkeypatch.setattr(Feedback, "leaves", leaves)
    go([*stream, "stream.stages=bank,travel+home", "lora.rank=8", "stream.slices=true", "federation.codec_up=topk=0.1"])
    stages = set()
    for tensors, memory in came:
        for name, residual in memory.items():
            axis = 1 if name.endswith(".a") else 0
            mine, left = (tuple(t.abs().sum(axis).nonzero().flatten().tolist()) for t in (tensors[name], residual))
            assert set(left) <= set(mine)
            stages.add(mine)
    assert {(0, 1, 2, 3), (4, 5, 6, 7)} <= stages


def test_a_stage_of_own_ranks_is_a_pair_of_that_rank_beside_the_frozen_earlier_ones(stream: list[str]) -> None:
    """The same steps written out: an adapter of the second half's rank alone, on a base that holds the first half."""
    recipe, folder, model = go([*stream, *GROUPS, "lora.rank=8", "lora.alpha=8", "stream.slices=true", "name=both"])
    first = folder.read_checkpoint("federated", 2, model.read())
    end = folder.read_checkpoint("federated", 4, model.read()).adapter
    prepared = prepare(recipe)
    small = Model(recipe.model, replace(recipe.lora, rank=4, alpha=4.0), recipe.seed)
    maps = small.net.get_base_model()
    with torch.no_grad():
        for path, pair in first.adapter.lora.items():
            maps.get_submodule(path).get_base_layer().weight += pair.scale * pair.b[:, :4] @ pair.a[:4]
    begun = small.read()
    halves = {f"{path}.a": pair.a[4:] for path, pair in first.adapter.lora.items()}
    halves |= {f"{path}.b": pair.b[:, 4:] for path, pair in first.adapter.lora.items()}
    state = replace(first, adapter=begun.with_tensors(halves))
    alone = replace(recipe, lora=replace(recipe.lora, rank=4, alpha=4.0), stream=replace(recipe.stream, slices=False))
    formatter = Formatter(small.tokenizer, "causal", recipe.data.max_length)
    for _ in range(2):
        changes, weights = [], []
        for site, held in prepared.stages[1].rows.items():
            small.write(state.adapter)
            positions, _ = train_round(small, formatter.encode_all(held["train"]), Round(site, 2, alone, state))
            changes.append({n: t - state.adapter.tensors()[n] for n, t in small.read().tensors().items()})
            weights.append(positions)
        total = sum(weights)
        now = {
            name: tensor + sum(w / total * change[name] for w, change in zip(weights, changes, strict=True))
            for name, tensor in state.adapter.tensors().items()
        }
        state = replace(state, round=state.round + 1, adapter=state.adapter.with_tensors(now))
    for path, pair in state.adapter.lora.items():
        torch.testing.assert_close(end.lora[path].a[4:], pair.a, rtol=0, atol=2e-4)
        torch.testing.assert_close(end.lora[path].b[:, 4:], pair.b, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("lora.rank=1", "lora.rank = 1 for 2 stages"),
        ("federation.rule=freeze_a", "federation.rule = 'freeze_a' (mean, krum go)"),
        ("federation.rule=svd", "federation.rule = 'svd' (mean, krum go)"),
        ("train.weight_decay=0.1", "train.weight_decay = 0.1, which shrinks all"),
        ("federation.optimiser=momentum", "federation.optimiser = 'momentum'"),
    ],
)
def test_what_would_move_the_ranks_of_other_stages_is_refused(stream: list[str], override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"it does not go with {told}")):
        load_recipe(None, [*stream, *GROUPS, "stream.slices=true", override])
    with pytest.raises(ConfigError, match="deals ranks to stages, and there is one"):
        load_recipe(None, [*stream, "stream.slices=true"])


def test_terms_without_what_gives_them_meaning_are_refused(stream: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"term\.orthogonal\.weight has no meaning without stream\.slices = true: set that"):
        load_recipe(None, [*stream, *GROUPS, "term.orthogonal.weight=0.5"])
    with pytest.raises(ConfigError, match=r"term\.vacant\.weight has no meaning without evidence\.task = \"restricted\""):
        load_recipe(None, [*stream, *GROUPS, "term.vacant.weight=1"])


def test_without_a_weight_no_memory_travels(stream: list[str], heard: list[Any]) -> None:
    go([*stream, *GROUPS, "distill.memory=0.5"])
    assert not any(memory for _, _, memory, _ in heard)


def test_score_rows_of_each_stage_equal_an_independent_scoring(stream: list[str]) -> None:
    """From the checkpoint at the end of each stage: every test row so far by itself, then means by task, then over tasks."""
    recipe, folder, model = go([*stream, "stream.stages=bank+echo,travel+home"])
    prepared = prepare(recipe)
    formatter = Formatter(model.tokenizer, "causal", recipe.data.max_length)
    rows = rows_of(folder)
    groups = [{"bank", ""}, {"travel", "home"}]
    for stage in (0, 1):
        model.write(folder.read_checkpoint("federated", 2 * stage + 2, model.read()).adapter)
        tests = prepared.stages[stage].all("test")
        single = {r.id: score(model, formatter, [r], replace(recipe.evaluation, batch_size=1))[0] for r in tests}

        def by_task(chosen: list[Record], single: dict[str, Any] = single) -> float:
            tasks = defaultdict(list)
            for r in chosen:
                metrics = single[r.id].metrics
                tasks[r.task].append(metrics.get("accuracy", metrics.get("rouge_l")))
            return mean([mean(v) for v in tasks.values()])

        assert value(rows, "score", split="test", stage=stage, task="") == pytest.approx(by_task(tests))
        for came in range(stage + 1):
            of_stage = [r for r in tests if r.group in groups[came]]
            got = value(rows, f"score_of_stage_{came + 1}", split="test", stage=stage)
            assert got == pytest.approx(by_task(of_stage))
        counted = sum(r["value"] for r in rows if r["name"] == "rows" and r["split"] == "test" and r["stage"] == stage)
        assert counted == len(tests)
        for site, held in prepared.stages[stage].rows.items():
            if held["test"]:
                got = value(rows, "own_score", split="test", stage=stage, site=site)
                assert got == pytest.approx(by_task(held["test"]))
    assert not any(r["name"] == "score_of_stage_2" and r["stage"] == 0 for r in rows)


def test_without_a_stream_no_row_speaks_of_stages(stream: list[str]) -> None:
    _, folder, _ = go([*stream, "federation.rounds=1"])
    assert not any(r["name"].startswith("score_of_stage") for r in rows_of(folder))
    assert {r["stage"] for r in rows_of(folder)} == {0}


def test_every_method_is_scored_on_the_same_rows_of_each_stage(stream: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Baselines in a stream: base, local and centralised legs, one of them at a site that has nothing to learn at first."""
    scored: dict[tuple[str, int], list[tuple[str, tuple[str, ...]]]] = {}
    real = fedkeel.runs.here.score_rows

    def watched(leg: Any, stage: int, round: int, split: str, found: Any, prepared: Any) -> Any:
        if split == "test":
            scored[leg.name, stage] = [(s.record.id, s.record.labels) for s in found]
        return real(leg, stage, round, split, found, prepared)

    monkeypatch.setattr(fedkeel.runs.here, "score_rows", watched)
    limits = ["evaluation.test_rows=6", 'evaluation.baselines=["base","local","centralised"]']
    recipe, folder, _ = go([*stream, *GROUPS, *limits])
    legs = ["base", "federated", "local/north", "local/south", "local/east", "centralised"]
    assert {leg for leg, _ in scored} == set(legs)
    prepared = prepare(recipe)
    for stage in (0, 1):
        assert len({tuple(scored[leg, stage]) for leg in legs}) == 1
        allowed = {r.id for r in prepared.stages[stage].all("test")}
        assert {id for id, _ in scored["base", stage]} <= allowed
    assert {id for id, _ in scored["base", 0]} < {id for id, _ in scored["base", 1]}
    assert len(scored["base", 1]) == 6
    rows = rows_of(folder)
    # the base learns nothing; east learns nothing in stage 0: the same scores there
    for name in ("score", "score_of_stage_1"):
        east = value(rows, name, method="local", site="east", stage=0, split="test", task="")
        assert east == value(rows, name, method="base", stage=0, split="test", task="")
    assert {
        (r["round"], r["stage"]) for r in rows if r["method"] == "local" and r["site"] == "east" and r["name"] == "loss"
    } == {(2, 1)}
    trained = [r for r in rows if r["name"] == "loss"]
    assert [(r["round"], r["stage"]) for r in trained if r["method"] == "local" and r["site"] == "east"] == [(2, 1)]
    assert [(r["round"], r["stage"]) for r in trained if r["method"] == "centralised"] == [(1, 0), (2, 1)]
    assert not any(r["name"].startswith(("gate", "strength")) for r in rows)


def test_budgets_of_the_legs_by_stage(stream: list[str]) -> None:
    """Two rounds of two steps: two sites take part in the first stage, three in the second."""
    every = ['evaluation.baselines=["base","local","centralised"]', *METHOD, "train.proximal=1"]
    prepared = prepared_of([*stream, *GROUPS, *every])
    legs = {leg.name: leg for leg in legs_of(prepared.cast)}
    assert [s.recipe.train.local_steps for s in legs["centralised"].stages] == [8, 12]
    assert [s.recipe.train.local_steps for s in legs["local/north"].stages] == [4, 4]
    assert [set(s.rows) for s in legs["federated"].stages] == [{"north", "south"}, {"north", "south", "east"}]
    assert [s.rows["east"] for s in legs["local/east"].stages] == [0, 6]
    for leg in ("centralised", "local/north"):
        for stage in legs[leg].stages:
            for key in ("distill.weight", "train.proximal", "structure.mode", "structure.amounts", "structure.hold"):
                assert attrgetter(key)(stage.recipe) == attrgetter(key)(Recipe())
            assert stage.recipe.stream == prepared.recipe.stream
    epochs = prepared_of([*stream, *GROUPS, *every, "train.local_steps=0", "train.local_epochs=1"])
    legs = {leg.name: leg for leg in legs_of(epochs.cast)}
    # rows north 8 | 12, south 4 | 6, east 0 | 6, in batches of 4, two rounds
    assert [s.recipe.train.local_steps for s in legs["local/north"].stages] == [4, 6]
    assert [s.recipe.train.local_steps for s in legs["local/south"].stages] == [2, 4]
    assert [s.recipe.train.local_steps for s in legs["centralised"].stages] == [6, 14]
    half = prepared_of([*stream, *GROUPS, *every, "federation.sites_per_round=1", "federation.rounds=6"])
    legs = {leg.name: leg for leg in legs_of(half.cast)}
    assert [s.recipe.train.local_steps for s in legs["centralised"].stages] == [12, 12]
    # two steps a round that a site is drawn for, of which there are six
    drawn = Counter(sample_sites(["north", "south"], 1, half.recipe.seed, round)[0] for round in range(6))
    assert sum(drawn.values()) == 6
    for name, count in drawn.items():
        assert legs[f"local/{name}"].stages[0].recipe.train.local_steps == 2 * count


def test_a_stage_of_too_few_sites_is_refused_before_the_first(stream: list[str]) -> None:
    """Three sites hold rows of the second stage, and two of the first."""
    given = [*stream, *GROUPS, "federation.rule=trimmed", "federation.hostile=1"]
    with pytest.raises(ConfigError, match=r"needs at least 3 sites in a round, and 2 of 2 are asked in stage 1"):
        go(given)
    together = ["privacy.unit=site", "privacy.noise=2", "privacy.together=3", "federation.weighting=uniform"]
    prepared = prepared_of([*stream, *GROUPS, *together])
    with pytest.raises(ConfigError, match=r"privacy\.together = 3: .* go on with 2 of 2 sites in stage 1, whose noise"):
        check_stages(prepared.cast)


# --------------------------------------------------------------------------------------------------------------- schedules


def test_learning_rate_and_batches_restart_and_ramps_do_not(stream: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages of two rounds of two steps: rate and batches of four steps each; λ_d and strength over eight."""
    rates: list[float] = []
    weights: list[float] = []
    strengths: list[float] = []
    batches: list[list[str]] = []
    real = {name: getattr(fedkeel.federation.train, name) for name in ("learning_rate", "strength", "collate")}
    real["guidance_weight"] = guidance_weight

    def watched(name: str, kept: list[Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            found = real[name](*arguments)
            kept.append(found)
            return found

        return call

    def collated(examples: list[Example], *more: Any) -> Any:
        batches.append([e.record for e in examples])
        return real["collate"](examples, *more)

    monkeypatch.setattr(fedkeel.federation.train, "learning_rate", watched("learning_rate", rates))
    term = replace(tables.TERMS["distill"], weight=watched("guidance_weight", weights))
    monkeypatch.setitem(tables.TERMS, "distill", term)
    monkeypatch.setattr(fedkeel.federation.train, "strength", watched("strength", strengths))
    monkeypatch.setattr(fedkeel.federation.train, "collate", collated)
    method = ["distill.weight=2", "distill.ramp=0.5", "structure.rank=0.1", "structure.ramp=0.25", "structure.anneal=0.25"]
    one = ["partition.scheme=iid", "partition.sites=1", "train.warmup=0.5", "train.final_lr=0"]
    recipe, _, model = go([*stream, *TASKS, *method, *one])
    stage = [learning_rate(recipe.train, step, 4) for step in range(4)]
    assert stage == pytest.approx([0.005, 0.01, 0.01, 0.005])
    assert rates == stage * 2
    assert weights == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0])
    assert strengths == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5])
    prepared = prepare(recipe)
    expected = []
    for number, key in enumerate(("site-0", "site-0/1")):
        records = prepared.stages[number].rows["site-0"]["train"]
        examples = Formatter(model.tokenizer, "causal", recipe.data.max_length).encode_all(records)
        found = batch_indices([e.length for e in examples], 4, recipe.seed, key, range(4))
        expected += [[examples[i].record for i in batch] for batch in found]
    assert batches == expected


# ----------------------------------------------------------------------------------------------------------------- resuming


class Interrupted(Silent):
    """Stops after `done` rounds of the federation, or when its `scoring`-th scoring of test rows begins."""

    def __init__(self, done: int = 0, scoring: int = 0) -> None:
        super().__init__()
        self.done, self.scoring = done, scoring

    def round(self, leg: str, done: int, rounds: int, result: RoundResult) -> None:
        if leg == "federated" and done == self.done:
            raise KeyboardInterrupt

    def leg(self, name: str, detail: str) -> None:
        if detail == "scoring held-out rows":
            self.scoring -= 1
            if self.scoring == 0:
                raise KeyboardInterrupt


ALL_ON = [
    *GROUPS,
    *METHOD,
    "stream.replay=2",
    "lora.dropout=0.1",
    "train.proximal=0.1",
    "federation.codec_down=bf16",
    "federation.codec_up=bf16",
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"folder": tmp_path_factory.mktemp("whole")}


STOPS = [
    {"done": 3},
    *(
        pytest.param(stop, marks=pytest.mark.slow)
        for stop in ({"scoring": 1}, {"done": 1}, {"done": 2}, {"done": 4}, {"scoring": 2})
    ),
]


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_a_stream_resumes_to_the_same_bits(stream: list[str], uninterrupted: dict[str, Any], stop: dict[str, int]) -> None:
    """Memory, counts, drift and every random number are those of the whole run, wherever it was cut: within a stage, and at
    its border before the scoring (scoring=1: of stage 1) or after it (done=3 begins anew from the end of stage 1)."""
    if "rows" not in uninterrupted:
        _, whole, model = go([*stream, *ALL_ON, f"out={uninterrupted['folder']}"])
        state = whole.read_checkpoint("federated", 4, model.read())
        uninterrupted.update(rows=without_time(rows_of(whole)), adapter=adapter_of(whole.path), state=state)
    with pytest.raises(KeyboardInterrupt):
        go([*stream, *ALL_ON], Interrupted(**stop))
    _, resumed, model = go([*stream, *ALL_ON], resume=True)
    assert same(adapter_of(resumed.path), uninterrupted["adapter"])
    assert without_time(rows_of(resumed)) == uninterrupted["rows"]
    state, expected = resumed.read_checkpoint("federated", 4, model.read()), uninterrupted["state"]
    assert same_bits(state.adapter.tensors(), expected.adapter.tensors())
    assert same_bits(state.memory.tensors(), expected.memory.tensors())
    assert (state.counts, state.drift) == (expected.counts, expected.drift)
    names = {r["name"] for r in uninterrupted["rows"]}
    assert {"distill_loss", "gate_w_gold_q3", "strength", "drift/model.layers.1", "score_of_stage_2"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("leg", ["local/east", "centralised"])
def test_a_baseline_resumes_at_the_border_of_its_stages(stream: list[str], leg: str) -> None:
    base = [*stream, *GROUPS, "federation.rounds=1", 'evaluation.baselines=["base","local","centralised"]']

    class Stop(Silent):
        scored = 0

        def leg(self, name: str, detail: str) -> None:
            self.scored += name == leg and detail == "scoring held-out rows"
            if self.scored == 2:
                raise KeyboardInterrupt

    _, whole, _ = go([*base, "name=whole"])
    with pytest.raises(KeyboardInterrupt):
        go(base, Stop())
    _, resumed, _ = go(base, resume=True)
    assert [{**r, "run": "whole"} for r in without_time(rows_of(resumed))] == without_time(rows_of(whole))
    assert same(adapter_of(whole.path), adapter_of(resumed.path))


# ------------------------------------------------------------------------------------------------------------- unseen sites


def test_an_unseen_site_is_drawn_by_the_seed_and_never_every_site(stream: list[str]) -> None:
    def left_out(*more: str) -> set[str]:
        prepared = prepared_of([*stream, *GROUPS, *more])
        apart = set(prepared.unseen[-1].rows)
        assert apart | set(prepared.sites.rows) == {"north", "south", "east"}
        assert not apart & set(prepared.sites.rows)
        assert any(note.startswith(", ".join(sorted(apart)) + ": no part in any training") for note in prepared.notes) == bool(
            apart
        )
        return apart

    assert left_out() == set()
    by_seed = [left_out("evaluation.unseen_sites=1", f"seed={seed}") for seed in range(8)]
    assert set(map(len, by_seed)) == {1}
    assert set.union(*by_seed) == {"north", "south", "east"}
    assert left_out("evaluation.unseen_sites=1", "seed=3", "lora.rank=2") == by_seed[3]  # the seed alone
    with pytest.raises(ConfigError, match="unseen_sites = 3 leaves none of 3 sites to train; it is at most 2"):
        left_out("evaluation.unseen_sites=3")


def test_what_unseen_sites_must_leave_behind(stream: list[str]) -> None:
    """A stage that someone learns, and something to score."""
    by_task = [*stream, *TASKS, "partition.scheme=by-task", "partition.sites=2", "evaluation.unseen_sites=1"]
    with pytest.raises(ConfigError, match=r"unseen_sites = 1 takes every training row of stage [12] \((intent|echo)\) away"):
        prepared_of(by_task)
    no_tests = Sites({"a": {"test": []}, "b": {"test": []}})
    with pytest.raises(ConfigError, match="would take no part in training, and without a test row there is nothing to score"):
        unseen_sites(no_tests, load_recipe(None, ["evaluation.unseen_sites=1"]))


@pytest.mark.parametrize("rule", ["mean", pytest.param("share_a", marks=pytest.mark.slow)])
def test_unseen_sites_train_nowhere_and_their_test_rows_are_scored_apart(stream: list[str], rule: str) -> None:
    """No leg has a row of such a site; its scores at the end against scoring one row at a time."""
    stages = GROUPS if rule == "mean" else []
    every = [
        'evaluation.baselines=["base","local","centralised"]',
        "evaluation.unseen_sites=1",
        "seed=2",
        "federation.rounds=1",
    ]
    watch = Silent()
    recipe, folder, model = go([*stream, *stages, *every, f"federation.rule={rule}"], watch)
    assert watch.work == pytest.approx(watch.total)
    prepared = prepare(recipe)
    (out,) = prepared.unseen[0].rows
    rows, last = rows_of(folder), len(prepared.stages) - 1
    ids = {r.id for held in prepared.unseen[-1].rows.values() for split in held.values() for r in split}
    for leg in legs_of(prepared.cast):
        assert out not in leg.name
        for stage, held in zip(leg.stages, prepared.stages, strict=True):
            assert sum(stage.rows.values()) <= len(held.all("train"))
    assert {r["site"] for r in rows if r["name"] == "loss"} == {"all", *prepared.sites.rows}
    scored = [r for r in rows if r["split"] == "unseen-sites"]
    assert {(r["name"], r["task"]) for r in scored} == {("score", ""), ("own_score", "")}
    where = {"base": {""}, "federated": {""}, "centralised": {""}, "local": set(prepared.sites.rows)}
    for method, sites in where.items():
        for stage in range(last + 1):
            found = [r for r in scored if (r["method"], r["stage"]) == (method, stage)]
            assert {r["site"] for r in found if r["name"] == "score"} == sites
            assert {r["site"] for r in found if r["name"] == "own_score"} == (set() if method == "local" else {out})
    assert "not finished" not in write_report(folder.path).read_text()
    assert not any(json.loads(line)["id"] in ids for line in (folder.path / "scores.jsonl").read_text().splitlines())
    # a site that took part in nothing has what is shared, and of what stays at the sites the beginning
    formatter = Formatter(model.tokenizer, "causal", recipe.data.max_length)
    model.write(folder.read_checkpoint("federated", last + 1, model.read()).adapter)
    by_task = defaultdict(list)
    for r in prepared.unseen[-1].all("test"):
        metrics = score(model, formatter, [r], replace(recipe.evaluation, batch_size=1))[0].metrics
        by_task[r.task].append(metrics.get("accuracy", metrics.get("rouge_l")))
    for name in ("score", "own_score"):
        got = value(rows, name, split="unseen-sites", stage=last, method="federated")
        assert got == pytest.approx(mean([mean(v) for v in by_task.values()]))


def test_a_run_with_an_unseen_site_is_the_run_without_its_rows(stream: list[str], stream_data: Path, tmp_path: Path) -> None:
    held = [*stream, "evaluation.unseen_sites=1", "federation.rounds=1", 'evaluation.baselines=["local","centralised"]']
    recipe, folder, _ = go(held)
    (out,) = prepare(recipe).unseen[0].rows
    (tmp_path / "tasks.json").write_text((stream_data / "tasks.json").read_text())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stream_rows() if row["ward"] != out))
    _, other, _ = go([*held, "name=less", f"data.root={tmp_path}", "evaluation.unseen_sites=0"])
    assert same(adapter_of(folder.path), adapter_of(other.path))
    seen = [{**r, "run": "less"} for r in without_time(rows_of(folder)) if r["split"] != "unseen-sites"]
    assert seen == without_time(rows_of(other))
