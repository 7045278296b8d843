"""Faults over the grid: what is lost, late, doubled, forged or raised, and what the round loop then does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import Silent, adapter_of, go, same

pytest.importorskip("flwr", reason="the extra fedkeel[flower] is not installed")

from flower_grid import FakeGrid, Twist
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from tiny import tiny_rows

import fedkeel.engines.flower.courier
import fedkeel.engines.work
import fedkeel.exchange.messages
import fedkeel.federation.client
import fedkeel.federation.local
from fedkeel.engines.coordinate import Terms
from fedkeel.engines.flower.apps import client_app
from fedkeel.engines.flower.courier import Courier, Errand, FlowerError, pack
from fedkeel.engines.flower.simulation import Simulation
from fedkeel.engines.sitefile import read_members
from fedkeel.engines.store import Store
from fedkeel.engines.work import handle
from fedkeel.federation.client import Site
from fedkeel.federation.kept import Kept
from fedkeel.federation.server import FederationError, Roster, run_round
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.settings import to_toml
from fedkeel.runs.execute import execute
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.prepare import prepare
from fedkeel.types import FedKeelError, Global

SITES = ["ward-0", "ward-1", "ward-2"]


class Clock:
    """A clock that only waiting moves, and that lets nobody wait."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 1e-3)


@pytest.fixture(autouse=True)
def _nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedkeel.engines.flower.courier, "time", Clock())


@pytest.fixture
def tiny_overrides(tiny_overrides: list[str]) -> list[str]:
    """No baselines, and few rows to score."""
    return [*tiny_overrides, "evaluation.baselines=[]", "evaluation.test_rows=2", "evaluation.validation_rows=2"]


def header(message: Message) -> dict[str, Any]:
    return json.loads(str(message.content["fedkeel"]["header"]))


def of(site: str, twist: Twist, round: int | None = None) -> Twist:
    """`twist` for the training replies of one site, in the `round`-th (from 1) of them, or in all; the rest as they are."""
    seen = 0

    def told(message: Message, reply: Message) -> list[tuple[int, Message]]:
        nonlocal seen
        if header(message)["kind"] != "train" or header(message)["site"] != site:
            return [(0, reply)]
        seen += 1
        return twist(message, reply) if round in (None, seen) else [(0, reply)]

    return told


def run(
    overrides: list[str], tmp_path: Path, twist: Twist | None = None, watch: Silent | None = None, **options: bool
) -> RunFolder:
    recipe = load_recipe(None, overrides)
    folder, prepared = RunFolder(Path(recipe.out) / recipe.name), prepare(recipe)
    grid = FakeGrid(client_app, len(prepared.sites.rows), twist)
    execute(prepared, folder, watch or Silent(), engine=Simulation(grid, prepared, tmp_path / "sites"), **options)
    return folder


def forged(**changed: str) -> Twist:
    def twist(message: Message, reply: Message) -> list[tuple[int, Message]]:
        records = RecordDict(dict(reply.content))
        records["fedkeel"] = ConfigRecord({"header": json.dumps(header(reply) | changed)})
        return [(0, Message(records, reply_to=message))]

    return twist


LATE = 10**9
FAULTS: list[tuple[Twist, str]] = [
    (lambda message, reply: [], "no answer within 2 s (federation.deadline)"),
    (lambda message, reply: [(LATE, reply)], "no answer within 2 s (federation.deadline)"),
    (lambda message, reply: [(0, Message(Error(5, "gone"), reply_to=message))], "Flower's error 5 (Node Unavailable): gone"),
    (
        lambda message, reply: [(0, Message(Error(2, "<boom>"), reply_to=message))],
        "Flower's error 2 (the ClientApp raised): <boom>",
    ),
    (forged(run="ab12"), "refused: an answer of run 'ab12'"),
    (forged(site="ward-2"), "refused: an answer of site 'ward-2', not 'ward-1'"),
    (lambda message, reply: [(0, Message(RecordDict(), reply_to=message))], "a message without FedKeel's header"),
]


NAMES = ["lost", "late", "node", "raised", "foreign", "mistaken", "empty"]
QUICK = ("lost", "raised", "foreign", "empty")


@pytest.mark.parametrize(
    ("twist", "told"),
    [pytest.param(*one, id=n, marks=[] if n in QUICK else pytest.mark.slow) for n, one in zip(NAMES, FAULTS, strict=True)],
)
def test_a_faulty_answer_is_that_sites_failure(twist: Twist, told: str, tiny_overrides: list[str], tmp_path: Path) -> None:
    """Under a quorum of all it stops the run, with the site's name; under one of two thirds the round counts without it."""
    overrides = [*tiny_overrides, "federation.rounds=2", "federation.deadline=2"]
    with pytest.raises(FederationError, match="2 of 3 sites answered well") as stopped:
        run([*overrides, "name=all"], tmp_path, of("ward-1", twist))
    assert f"--- ward-1: {told}" in str(stopped.value)
    watch = Silent()
    run([*overrides, "federation.quorum=0.6"], tmp_path, of("ward-1", twist, round=1), watch)
    first, second = (result for _, result in watch.results)
    assert list(first.failures) == ["ward-1"]
    assert told in first.failures["ward-1"]
    assert not second.failures


def test_answers_twice_or_after_the_round_change_nothing(tiny_overrides: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_overrides, "federation.codec_up=topk=0.25+int4"]
    plain = run([*overrides, "name=plain"], tmp_path)
    again = run([*overrides, "name=again"], tmp_path, lambda message, reply: [(0, reply), (0, reply), (9, reply)])
    assert same(adapter_of(plain.path), adapter_of(again.path))


def test_a_site_starts_from_what_was_accepted(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that is lost leaves no residual behind: the bits are those of this process, where the site raised instead,
    after all its work."""
    overrides = [*tiny_overrides, "federation.codec_up=topk=0.25+int4", "federation.quorum=0.6", "federation.deadline=2"]
    there = run([*overrides, "name=there"], tmp_path, of("ward-1", lambda message, reply: [], round=2))

    def raising(payload: bytes, model: Model, site: Site, kept: Kept) -> bytes:
        made = fedkeel.federation.client.answer(payload, model, site, kept)
        _, state = fedkeel.exchange.messages.unpack_global(payload, "global", model.initial)
        if site.name == "ward-1" and state.round == 1:
            raise RuntimeError("lost")
        return made

    monkeypatch.setattr(fedkeel.federation.local, "answer", raising)
    watch = Silent()
    _, here, _ = go(overrides, watch)
    assert [list(r.failures) for _, r in watch.results] == [[], ["ward-1"], []]
    assert same(adapter_of(here.path), adapter_of(there.path))


def test_a_disk_that_lost_what_was_kept_costs_one_round(tiny_overrides: list[str], tmp_path: Path) -> None:
    def wiped(message: Message, reply: Message) -> list[tuple[int, Message]]:
        for path in (tmp_path / "sites").glob("*/*/kept-*.fkl"):
            if path.stem == f"kept-{header(reply)['kept']}":
                path.unlink()
        return [(0, reply)]

    # in the simulation the coordinator looks at the disk too; a deployment has the transport alone
    recipe = load_recipe(None, [*tiny_overrides, "federation.codec_up=int4", "federation.quorum=0.6"])
    prepared = prepare(recipe)
    grid = FakeGrid(client_app, 3, of("ward-1", wiped, round=1))
    courier = Courier(grid, Errand(to_toml(recipe), "r0", tmp_path / "sites"))
    courier.find(SITES, 30)
    transport = courier.transport(Terms("federated", recipe.federation.rounds, 0, {}), {}, lambda reply: None)
    initial = Model(recipe.model, recipe.lora, recipe.seed, prepared.classes).initial
    assert initial is not None
    state, failed = Global(0, initial), []
    for _ in range(3):
        result = run_round(state, transport, Roster(SITES, recipe.federation, recipe.seed))
        state = result.state
        failed.append(dict(result.failures))
    assert [list(f) for f in failed] == [[], ["ward-1"], []]
    assert "It starts from nothing in the next round" in failed[1]["ward-1"]


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_in_another_engine(tiny_overrides: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_overrides, "federation.codec_up=topk=0.25+int4"]
    whole = run([*overrides, "name=whole"], tmp_path)

    def stop(leg: str, done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(overrides, tmp_path, watch=Silent(stop))
    _, folder, _ = go(overrides, resume=True)
    assert same(adapter_of(folder.path), adapter_of(whole.path))
    with pytest.raises(KeyboardInterrupt):
        go([*overrides, "name=back"], Silent(stop))
    back = run([*overrides, "name=back"], tmp_path, resume=True)
    assert same(adapter_of(back.path), adapter_of(whole.path))


def test_a_site_that_raises_sends_its_traceback(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(payload: bytes, model: Model, site: Site, kept: Kept) -> bytes:
        if site.name == "ward-2":
            raise RuntimeError("the disk of ward 2 is full")
        return fedkeel.federation.client.answer(payload, model, site, kept)

    monkeypatch.setattr(fedkeel.engines.work, "answer", broken)
    with pytest.raises(FederationError) as stopped:
        run(tiny_overrides, tmp_path)
    assert "--- ward-2: Traceback (most recent call last)" in str(stopped.value)
    assert "RuntimeError: the disk of ward 2 is full" in str(stopped.value)


def test_a_round_that_changed_nothing_is_an_error(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedkeel.federation.client, "train_round", lambda *arguments: (1, {"loss": 1.0}))
    with pytest.raises(FederationError, match="round 1 changed nothing"):
        run(tiny_overrides, tmp_path)


def test_a_process_that_hands_a_message_over_needs_no_torch() -> None:
    code = "import sys, fedkeel.engines.flower.apps; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_names_are_looked_up(tiny_overrides: list[str], tmp_path: Path) -> None:
    text = to_toml(load_recipe(None, tiny_overrides))
    grid = FakeGrid(client_app, 3)
    courier = Courier(grid, Errand(text, "r1", tmp_path))
    with pytest.raises(FlowerError, match=r"no node says that it is site ward-7 after 5 s; ward-0, ward-1, ward-2 answered"):
        courier.find([*SITES, "ward-7"], 5)
    assert courier.nodes == {"ward-0": 900, "ward-1": 893, "ward-2": 886}
    answers = courier.ask("train", {"ward-7": ({}, b"x")}, 0.5)
    assert "no node that is this site" in str(answers["ward-7"])
    grid = FakeGrid(client_app, 3)
    grid.nodes[893] = 0
    with pytest.raises(FlowerError, match="two nodes say that they are site 'ward-0'"):
        Courier(grid, Errand(text, "r2", tmp_path)).find(SITES, 5)


def test_what_keeps_a_site_away_is_told_as_it_comes_and_once(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each site and reason once, by the name of its key where that is known, while the others are still waited for."""
    monkeypatch.setattr(fedkeel.engines.flower.courier, "AGAIN", 0.0)  # a node that failed is asked at each look
    reasons = {893: ["its disk is full"] * 3 + ["its base is missing"] * 9, 886: ["its disk is full"] * 12}

    def refused(message: Message, reply: Message) -> list[tuple[int, Message]]:
        node = message.metadata.dst_node_id
        if node not in reasons:
            return [(0, reply)]
        said = {"run": "r9", "id": header(message)["id"], "error": reasons[node].pop(0)}
        return [(0, Message(pack(said, None), reply_to=message))]

    grid = FakeGrid(client_app, 3, refused)
    text = to_toml(load_recipe(None, tiny_overrides))
    courier = Courier(grid, Errand(text, "r9", tmp_path), members=lambda: {"ward-0": 900, "ward-1": 893})
    told: list[tuple[str, int]] = []  # and how often the site was asked by then
    courier.tell = lambda trouble: told.append((trouble, 12 - len(reasons[893])))
    courier.greet(lambda found: len(reasons[893]) == 4, 60)
    disk, base = (f"site 'ward-1' (node 893): its {why}" for why in ("disk is full", "base is missing"))
    assert sorted(told) == [("node 886: its disk is full", 1), (base, 4), (disk, 1)]
    courier.greet(lambda found: len(reasons[893]) == 2, 60)
    assert len(told) == 3
    assert sorted(courier.troubles) == ["node 886: its disk is full", base]  # of this greeting, though told before
    reasons[893] *= 99
    reasons[886] *= 99
    answer = courier.ask("start", {"ward-1": ({}, b"")}, 5)["ward-1"]
    assert str(answer) == f"no node that is this site: its SuperNode is down, or its name is another; {base}"


def test_a_name_is_its_keys(tiny_overrides: list[str], tmp_path: Path) -> None:
    """The node of ward-1's key says that it is ward-0: it is asked for nothing, whether or not ward-0 is there."""
    text = to_toml(load_recipe(None, tiny_overrides))
    grid = FakeGrid(client_app, 3)
    grid.nodes[893] = 0
    keys = {"ward-0": 900, "ward-1": 893, "ward-2": 886}
    courier = Courier(grid, Errand(text, "r7", tmp_path), members=lambda: keys)
    said = "node 893 says that it is site 'ward-0', and is not believed: that name's key was registered as node 900"
    # the three answers arrive at one look
    courier.greet(lambda found: {"ward-0", "ward-2"} <= set(found), 60)
    assert courier.nodes == {"ward-0": 900, "ward-2": 886}
    assert courier.troubles == [said]
    del grid.nodes[900]
    before = len(grid.sent)
    answers = courier.ask("start", {"ward-0": ({}, b""), "ward-2": ({}, b"")}, 20)
    assert str(answers["ward-0"]) == f"no node that is this site: its SuperNode is down, or its name is another; {said}"
    assert not isinstance(answers["ward-2"], FedKeelError)
    kinds = [(m.metadata.dst_node_id, header(m)["kind"]) for m in grid.sent[before:]]
    assert kinds.count((886, "start")) == 1
    assert {kind for node, kind in kinds if node == 893} == {"hello"}
    keys["ward-0"] = 893  # a new key for the site, registered while the run goes on
    answers = courier.ask("start", {"ward-0": ({}, b"")}, 20)
    assert not isinstance(answers["ward-0"], FedKeelError)
    assert courier.nodes["ward-0"] == 893


def test_members_are_read_as_register_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "members"
    assert read_members(path) is None
    path.write_text("12 ward-0\n7 ward-1\n18446744073709551615 ward-0\n")
    assert read_members(path) == {"ward-0": 18446744073709551615, "ward-1": 7}
    path.write_text("12 ward-0\nward-1 7\n")
    with pytest.raises(FedKeelError, match=r"members, line 2: .* not 'ward-1 7'"):
        read_members(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(FedKeelError, match=r"members cannot be read: .*run as SuperLink's user"):
        read_members(path)


def test_a_node_that_comes_back_under_another_id_is_found(tiny_overrides: list[str], tmp_path: Path) -> None:
    grid = FakeGrid(client_app, 3)
    courier = Courier(grid, Errand(to_toml(load_recipe(None, tiny_overrides)), "r3", tmp_path))
    courier.find(SITES, 5)
    grid.nodes[41] = grid.nodes.pop(893)
    answers = courier.ask("start", {site: ({}, b"") for site in SITES}, 5)
    assert courier.nodes["ward-1"] == 41
    assert len({answers[site][1] for site in SITES}) == 1  # type: ignore[index]


def test_a_node_that_is_slow_to_say_hello_is_found_by_a_later_call(tiny_overrides: list[str], tmp_path: Path) -> None:
    def slow(message: Message, reply: Message) -> list[tuple[int, Message]]:
        return [(8 if message.metadata.dst_node_id == 893 else 0, reply)]  # looks, longer than one call looks

    grid = FakeGrid(client_app, 3, slow)
    courier = Courier(grid, Errand(to_toml(load_recipe(None, tiny_overrides)), "r6", tmp_path))
    calls = 0
    while "ward-1" not in courier.nodes:
        courier.greet(lambda found: set(SITES) <= set(found), 0.2)
        calls += 1
        assert calls < 20
    assert calls > 1
    assert [m.metadata.dst_node_id for m in grid.sent].count(893) == 1  # it was asked once


def test_a_message_over_the_limit_is_not_sent(tiny_overrides: list[str], tmp_path: Path) -> None:
    grid = FakeGrid(client_app, 3)
    courier = Courier(grid, Errand(to_toml(load_recipe(None, tiny_overrides)), "r4", tmp_path), limit=1000)
    courier.find(SITES, 5)
    before = len(grid.sent)
    answers = courier.ask("train", {"ward-0": ({}, b"x" * 1001)}, 5)
    assert "1,001 bytes is over the limit of 1,000; not sent" in str(answers["ward-0"])
    assert len(grid.sent) == before
    answers = courier.ask("start", {"ward-0": ({}, b"")}, 5)
    assert "over the limit of 1,000" in str(answers["ward-0"])


def test_a_site_refuses_messages_of_foreign_runs(tiny_overrides: list[str], tmp_path: Path) -> None:
    text = to_toml(load_recipe(None, tiny_overrides))

    def told(**changed: str) -> dict[str, Any]:
        base = {"run": "r5", "id": "0", "site": "ward-0", "recipe": text, "kind": "start"}
        return handle(base | changed, b"", None, 0, tmp_path)[0]

    assert "foreign run: 'r5' has not said hello here" in told()["error"]
    held = [r for r in tiny_rows() if (r["department"], r["split"]) == ("ward-0", "train")]
    assert told(kind="hello")["hello"]["encoded"] == [len(held)]
    assert "error" not in told()
    assert "the recipe of 'r5' was another" in told(recipe=text.replace("seed = 1", "seed = 2"))["error"]
    assert "the message is for site 'ward-1'; this is 'ward-0'" in told(site="ward-1")["error"]
    assert "small letters, digits and -" in told(run="../r5")["error"]
    assert "a message of kind 'shell'" in told(kind="shell")["error"]


def test_what_a_store_keeps(tmp_path: Path) -> None:
    """The state that a request starts from and all since, until the next request says which of them was accepted."""
    store, one = Store(tmp_path, "a/b"), {"residual/x": torch.ones(2)}

    def held() -> list[str]:
        return sorted(p.stem.removeprefix("kept-") for p in tmp_path.glob("*/kept-*.fkl"))

    assert store.write("1", one) == "1"
    assert store.write("2", {"residual/x": torch.zeros(2)}, "1") == "2"
    assert same(store.read("1"), one)
    store.write("3", one, "1")  # the answer that made 2 was lost
    assert held() == ["1", "2", "3"]
    store.write("4", one, "3")
    assert held() == ["3", "4"]
    with pytest.raises(FedKeelError, match="cannot be read"):
        store.read("2")
    with pytest.raises(FedKeelError, match="small letters"):
        store.read("../1")
    assert Store(tmp_path, "other").read("") == {}
    assert store.write("5", {}, "") == ""
    assert held() == ["3", "4"]
