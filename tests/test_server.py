"""The round loop with sites of a few lines: what is sampled, refused, averaged, counted and told."""

from __future__ import annotations

import itertools
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from builders import SHAPES, flat, make_adapter, numbers
from torch import Tensor

from fedkeel.exchange.codecs import EnvelopeError, make_codec, open_envelope, seal
from fedkeel.exchange.messages import SCHEMA, difference, layout, pack, pack_global, unpack, unpack_global
from fedkeel.federation.screen import Expected, screen
from fedkeel.federation.server import FederationError, Roster, RoundResult, run_round, sample_sites
from fedkeel.method.aggregate.drift import drift
from fedkeel.method.aggregate.weighting import weights
from fedkeel.recipe.schema import Federation
from fedkeel.types import Adapter, Global, Lora, Reply, Request, Update

STATS = {"loss": 1.25}
SECONDS = "00000001.500"
TASKS = {"colour": 4, "echo": 6}
REFERENCE = make_adapter(0)


def change_of(seed: int, size: float = 0.1) -> dict[str, Tensor]:
    return {name: size * numbers(seed + i, *t.shape) for i, (name, t) in enumerate(REFERENCE.tensors().items())}


def message(site: str = "a", round: int = 0, codec: str = "fp32", like: Adapter = REFERENCE, **more: Any) -> bytes:
    """An update that is right in all but what `more` says."""
    change = more.pop("change", None) or change_of(7)
    header = {"site": site, "positions": 10, "stats": STATS, "seconds": SECONDS, "tasks": TASKS} | more
    encoded = change if codec == "fp32" else make_codec(codec).encode(change, 0)  # as it is, what no codec would send too
    return pack("update", round, like, encoded, codec, **header)


@dataclass
class Sites:
    """A Transport: each site adds a change of its own to what it received; positions 1, 2, 3, … by its place in `changes`."""

    changes: Mapping[str, Mapping[str, Tensor]]
    codec_up: str = "fp32"
    like: Adapter = REFERENCE
    reorder: Callable[[list[Reply]], Sequence[Reply]] = list
    broken: Mapping[str, Reply] = field(default_factory=dict)
    received: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    deadline: float = 0.0

    def exchange(self, requests: Sequence[Request], deadline: float) -> Sequence[Reply]:
        self.requests, self.deadline = list(requests), deadline
        replies = []
        for request in requests:
            site = request.site
            header, state = unpack_global(request.payload, "global", self.like)
            self.received[site] = state.adapter.tensors()
            after = self.like.with_tensors({n: t + self.changes[site][n] for n, t in self.received[site].items()})
            change = difference(after, self.like.with_tensors(self.received[site]))
            positions = 1 + sorted(self.changes).index(site)
            payload = pack(
                "update",
                header["round"],
                self.like,
                make_codec(self.codec_up).encode(change, 0),
                self.codec_up,
                site=site,
                positions=positions,
                stats=STATS,
                seconds=SECONDS,
                tasks=TASKS,
            )
            replies.append(self.broken.get(site, Reply(site, payload)))
        return self.reorder(replies)


CHANGES = {site: change_of(100 * k) for k, site in enumerate(("a", "b", "c"), 1)}


def one_round(sites: Sites, **federation: Any) -> RoundResult:
    return run_round(Global(4, sites.like), sites, Roster(list(sites.changes), Federation(**federation), 1))


# ---------------------------------------------------------------------------------------------------------------- sampling


def test_sampling_takes_all_or_some_sites_in_order() -> None:
    sites = [f"site-{k}" for k in range(9)]
    assert sample_sites(sites[::-1], 0, 1, 0) == sites
    assert sample_sites(sites, 9, 1, 0) == sample_sites(sites, 50, 1, 0) == sites
    chosen = sample_sites(sites, 4, 1, 0)
    assert len(set(chosen)) == 4
    assert set(chosen) <= set(sites)
    assert chosen == sorted(chosen)


def test_sampling_depends_on_seed_and_round_and_not_on_the_order_of_sites() -> None:
    sites = [f"site-{k}" for k in range(9)]
    assert sample_sites(sites, 4, 1, 2) == sample_sites(sites[::-1], 4, 1, 2)
    assert len({tuple(sample_sites(sites, 4, 1, r)) for r in range(10)}) > 5
    assert len({tuple(sample_sites(sites, 4, s, 2)) for s in range(10)}) > 5


def test_every_site_has_its_turn() -> None:
    sites = list("abcdefgh")
    counts = dict.fromkeys(sites, 0)
    for r in range(800):
        for site in sample_sites(sites, 2, 3, r):
            counts[site] += 1
    # binomial with mean 200 and σ = √(800 · ¼ · ¾) ≈ 12.2
    assert all(abs(n - 200) < 4 * 12.3 for n in counts.values())


# --------------------------------------------------------------------------------------------------------------- screening


def test_a_good_reply_is_the_reference_plus_its_change() -> None:
    update = screen(Reply("a", message()), Expected(0, REFERENCE))
    old, change = REFERENCE.tensors(), change_of(7)
    for name, tensor in update.adapter.tensors().items():
        assert torch.equal(tensor, old[name] + change[name])
    norm = sum(float((t.double() ** 2).sum()) for t in change.values()) ** 0.5
    assert (update.site, update.positions) == ("a", 10)
    assert update.tasks == TASKS
    assert update.stats == {"loss": 1.25, "seconds": 1.5, "update_norm": pytest.approx(norm, rel=1e-12)}


OTHER_RANK, OTHER_SCALE = make_adapter(0, rank=2), make_adapter(0, scale=4.0)
WITH_NAN = {**change_of(7), "layer.1.q.b": torch.full((12, 3), float("nan"))}
REFUSED = {
    "the site's own error": (Reply("a", error="Traceback: CUDA out of memory"), "Traceback: CUDA out of memory"),
    "another round": (Reply("a", message(round=1)), "round = 1 where 0 belongs"),
    "another site": (Reply("a", message(site="b")), "says it is from site 'b', not 'a'"),
    "another kind": (Reply("a", pack("global", 0, REFERENCE, change_of(7), "fp32")), "kind = 'global' where 'update' belongs"),
    "another rank": (Reply("a", message(like=OTHER_RANK, change=OTHER_RANK.tensors())), "a message with layout ="),
    "another scale": (Reply("a", message(like=OTHER_SCALE)), "a message with layout ="),
    "shapes that are not the layout's": (
        Reply("a", message(change=OTHER_RANK.tensors())),
        "where the codec sends float32 (3, 14)",
    ),
    "a tensor left out": (Reply("a", message(change=dict(list(change_of(7).items())[1:]))), "layer.0.q.a: missing"),
    "another codec than its header says": (
        Reply("a", seal(json.loads(json.dumps(open_envelope(message())[0])) | {"codec": "fp16"}, change_of(7))),
        "where the codec sends float16",
    ),
    "no positions": (Reply("a", message(positions=0)), "0 supervised positions"),
    "positions below zero": (Reply("a", message(positions=-5)), "-5 supervised positions"),
    "positions that are a truth value": (Reply("a", message(positions=True)), "True supervised positions"),
    "positions that are a fraction": (Reply("a", message(positions=1.5)), "1.5 supervised positions"),
    "positions beyond any float": (Reply("a", message(positions=10**400)), "supervised positions"),
    "stats that are a list": (Reply("a", message(stats=[1.0])), "stats [1.0]"),
    "a stat that is a list": (Reply("a", message(stats={"loss": [1]})), "numbers cannot be read"),
    "a stat beyond any float": (Reply("a", message(stats={"loss": 10**400})), "numbers cannot be read"),
    "a stat that is not finite": (Reply("a", message(stats={"loss": "nan"})), "not finite"),
    "no loss": (Reply("a", message(stats={})), "'loss'"),
    "no seconds": (Reply("a", message(seconds=None)), "numbers cannot be read"),
    "no tasks": (Reply("a", message(tasks=None)), "reports tasks None"),
    "tasks that are a list": (Reply("a", message(tasks=["colour"])), "reports tasks ['colour']"),
    "a task with a fraction": (Reply("a", message(tasks={"colour": 1.5})), "task names with whole numbers belong"),
    "a task with a truth value": (Reply("a", message(tasks={"colour": True})), "task names with whole numbers belong"),
    "a task below zero": (Reply("a", message(tasks={"colour": -1})), "task names with whole numbers belong"),
    "a task beyond any float": (Reply("a", message(tasks={"colour": 10**400})), "task names with whole numbers belong"),
    "a value that is not finite": (Reply("a", message(change=WITH_NAN)), "layer.1.q.b holds a value that is not finite"),
    "garbage": (Reply("a", b"\x80\x04garbage"), "not a FedKeel message"),
    "nothing": (Reply("a"), "not a FedKeel message"),
    "a bit flipped": (Reply("a", message()[:-1] + b"\x55"), "checksum"),
}


@pytest.mark.parametrize(("reply", "told"), REFUSED.values(), ids=REFUSED.keys())
def test_a_reply_is_refused_for_what_is_wrong_with_it(reply: Reply, told: str) -> None:
    with pytest.raises(EnvelopeError) as caught:
        screen(reply, Expected(0, REFERENCE))
    assert told in str(caught.value)


def test_a_change_is_refused_by_its_length() -> None:
    change = {n: torch.zeros_like(t) for n, t in REFERENCE.tensors().items()}
    change["layer.0.q.a"][0, :2] = torch.tensor([3.0, 0.0])
    change["head.weight"][1] = 4.0  # together 5
    reply = Reply("a", message(change=change))
    assert screen(reply, Expected(0, REFERENCE, max_norm=5.0)).stats["update_norm"] == 5.0
    with pytest.raises(EnvelopeError, match=r"norm 5, over federation\.max_update_norm = 4\.99"):
        screen(reply, Expected(0, REFERENCE, max_norm=4.99))


JUNK: list[Any] = [None, True, 0, -1, 1.5, "", "x", [], ["fp32"], {}, {"a": 1}, 10**400, "9" * 5000]
FIELDS = ("schema", "kind", "round", "codec", "layout", "site", "positions", "stats", "seconds", "tasks")


@pytest.mark.parametrize("key", FIELDS)
def test_a_header_field_of_any_type_is_taken_or_refused_but_never_breaks_the_server(key: str) -> None:
    header = open_envelope(message())[0]
    refused = 0
    for junk in JUNK:
        payload = seal(header | {key: junk}, change_of(7))
        try:
            screen(Reply("a", payload), Expected(0, REFERENCE))
        except EnvelopeError:
            refused += 1
    without = seal({k: v for k, v in header.items() if k != key}, change_of(7))
    with pytest.raises(EnvelopeError):
        screen(Reply("a", without), Expected(0, REFERENCE))
    assert refused >= len(JUNK) - 4  # seconds may be four of them: True, 0, −1, 1.5


def test_a_message_of_another_schema_is_refused() -> None:
    header, tensors = open_envelope(message())
    with pytest.raises(EnvelopeError, match=f"schema = {SCHEMA + 1} where {SCHEMA} belongs"):
        unpack(seal(header | {"schema": SCHEMA + 1}, tensors), "update", 0, REFERENCE)


def test_the_layout_is_names_shapes_and_scales_and_not_values() -> None:
    assert layout(make_adapter(1)) == layout(make_adapter(2))
    renamed = Adapter({f"x.{p}": f for p, f in REFERENCE.lora.items()}, REFERENCE.dense)
    without_head = Adapter(REFERENCE.lora)
    others = [OTHER_RANK, OTHER_SCALE, renamed, without_head]
    assert len({layout(a) for a in [REFERENCE, *others]}) == 5
    assert layout(Adapter(dict(reversed(REFERENCE.lora.items())), REFERENCE.dense)) == layout(REFERENCE)


# --------------------------------------------------------------------------------------------------------------- the round


def test_a_round_by_hand() -> None:
    """One module of 1 × 1. Sites of 1 and 3 positions change A = 1 by +4 and −4, B = 2 by 0 and +8."""
    start = Adapter({"m": Lora(torch.ones(1, 1), torch.full((1, 1), 2.0), 0.5)}, {"head": torch.tensor([10.0])})
    changes = {
        "one": {"m.a": torch.tensor([[4.0]]), "m.b": torch.tensor([[0.0]]), "head": torch.tensor([1.0])},
        "two": {"m.a": torch.tensor([[-4.0]]), "m.b": torch.tensor([[8.0]]), "head": torch.tensor([-1.0])},
        "three": {"m.a": torch.tensor([[4.0]]), "m.b": torch.tensor([[0.0]]), "head": torch.tensor([1.0])},
    }
    sites = Sites(changes, like=start)  # positions by name: one 1, three 2, two 3
    result = run_round(Global(6, start), sites, Roster(["one", "two", "three"], Federation(), 1))
    assert result.state.round == 7
    got = result.state.adapter
    # A: (1 · 5 + 2 · 5 + 3 · −3) / 6 = 1; B: (1 · 2 + 2 · 2 + 3 · 10) / 6 = 6; head: 10 + (1 + 2 − 3) / 6 = 10
    assert got.lora["m"].a.item() == pytest.approx(1.0, rel=1e-6)
    assert got.lora["m"].b.item() == pytest.approx(6.0, rel=1e-6)
    assert got.dense["head"].item() == pytest.approx(10.0, rel=1e-6)
    assert got.lora["m"].scale == 0.5
    # exact: ½ (1 · 10 + 2 · 10 − 3 · 30) / 6 = −5; got ½ · 6 · 1 = 3: off by 8 of 5
    assert result.error == pytest.approx(8 / 5, rel=1e-6)
    exact = run_round(Global(6, start), sites, Roster(list(changes), Federation(rule="svd"), 1))
    assert exact.state.adapter.lora["m"].dense().item() == pytest.approx(-5.0, rel=1e-6)
    assert exact.error < 1e-6
    uniform = run_round(Global(6, start), sites, Roster(list(changes), Federation(weighting="uniform"), 1))
    assert uniform.state.adapter.lora["m"].b.item() == pytest.approx(14 / 3, rel=1e-6)


@pytest.mark.parametrize("rule", ["mean", "svd"])
def test_the_order_of_replies_changes_no_bit(rule: str) -> None:
    results = []
    for order in itertools.permutations(range(3)):
        sites = Sites(CHANGES, reorder=lambda replies, order=order: [replies[i] for i in order])
        results.append(one_round(sites, rule=rule))
    assert len({str(flat(r.state.adapter)) for r in results}) == 1
    assert len({r.error for r in results}) == 1
    assert [u.site for u in results[-1].updates] == ["a", "b", "c"]


def test_every_site_is_sent_the_same_bytes_and_all_bytes_are_counted() -> None:
    sites = Sites(CHANGES)
    result = one_round(sites, deadline=12.5)
    assert sites.deadline == 12.5
    assert [r.site for r in sites.requests] == ["a", "b", "c"]
    assert len({r.payload for r in sites.requests}) == 1
    assert result.bytes_down == {r.site: len(r.payload) for r in sites.requests}
    sent_up = {r.site: len(r.payload) for r in Sites(CHANGES).exchange(sites.requests, 1.0)}
    assert result.bytes_up == sent_up
    numel = sum(t.numel() for t in REFERENCE.tensors().values())
    assert 4 * numel < result.bytes_down["a"] < 4 * numel + 1500
    narrow = one_round(Sites(CHANGES, codec_up="fp16"), codec_down="bf16", codec_up="fp16")
    assert result.bytes_down["a"] - narrow.bytes_down["a"] == pytest.approx(2 * numel, abs=16)
    assert result.bytes_up["a"] - narrow.bytes_up["a"] == pytest.approx(2 * numel, abs=16)


def test_only_the_sampled_sites_are_asked() -> None:
    sites = Sites(CHANGES)
    result = one_round(sites, sites_per_round=2)
    expected = sample_sites(["a", "b", "c"], 2, 1, 4)
    assert [r.site for r in sites.requests] == [u.site for u in result.updates] == expected
    assert list(result.bytes_down) == list(result.bytes_up) == expected


@pytest.mark.parametrize(("codec", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_an_update_is_applied_to_what_the_site_received(codec: str, dtype: torch.dtype) -> None:
    sites = Sites({"a": CHANGES["a"]})
    result = one_round(sites, codec_down=codec)
    rounded = {n: t.to(dtype).float() for n, t in REFERENCE.tensors().items()}
    for name, tensor in result.state.adapter.tensors().items():
        received = sites.received["a"][name]
        assert torch.equal(received, rounded[name])
        assert not torch.equal(received, REFERENCE.tensors()[name])
        assert torch.equal(tensor, received + ((received + CHANGES["a"][name]) - received))


def broken(**replies: Reply) -> Sites:
    return Sites(CHANGES, broken=replies)


def site_traceback() -> str:
    try:
        raise ZeroDivisionError("the site's very own trouble")
    except ZeroDivisionError:
        return traceback.format_exc()


def test_a_failed_site_stops_the_run_with_its_own_traceback() -> None:
    told = site_traceback()
    with pytest.raises(FederationError) as caught:
        one_round(broken(b=Reply("b", error=told)), quorum=1.0)
    text = str(caught.value)
    assert "round 5 stopped: 2 of 3 sites answered well, and federation.quorum = 1 asks for at least 3" in text
    assert f"--- b: {told.strip()}" in text
    assert "in site_traceback" in text
    assert "--- a" not in text


def test_a_failed_site_is_listed_where_the_quorum_holds() -> None:
    result = one_round(broken(b=Reply("b", error="out of memory")), quorum=0.5)
    assert result.failures == {"b": "out of memory"}
    assert [u.site for u in result.updates] == ["a", "c"]
    # what is left is weighted anew: positions 1 and 3
    head = REFERENCE.dense["head.weight"]
    expected = head + 0.25 * CHANGES["a"]["head.weight"] + 0.75 * CHANGES["c"]["head.weight"]
    torch.testing.assert_close(result.state.adapter.dense["head.weight"], expected, rtol=0, atol=1e-6)
    assert result.bytes_up["b"] == 0
    with pytest.raises(FederationError, match="1 of 3 sites answered well"):
        one_round(broken(b=Reply("b", error="x"), c=Reply("c", b"garbage")), quorum=0.5)


def test_a_missing_reply_is_a_failure() -> None:
    sites = Sites(CHANGES, reorder=lambda replies: replies[1:])
    with pytest.raises(FederationError, match="--- a: no reply"):
        one_round(sites)
    result = one_round(sites, quorum=0.6)
    assert result.failures == {"a": "no reply"}
    assert "a" not in result.bytes_up
    with pytest.raises(FederationError, match="0 of 3 sites answered well"):
        one_round(Sites(CHANGES, reorder=lambda replies: []), quorum=0.01)


@pytest.mark.parametrize("count", [7, 9, 10, 20, 25])
def test_a_quorum_that_is_exactly_met_is_enough(count: int) -> None:
    """0.55 · 20 is more than 11 in floating point; a share of 11 / 20 is 0.55."""
    names = [f"s{k:02}" for k in range(count)]
    like = Adapter({}, {"head": torch.zeros(1)})
    changes = {name: {"head": torch.ones(1)} for name in names}
    for good in range(1, count + 1):
        sites = Sites(changes, like=like, reorder=lambda replies, good=good: replies[:good])
        quorum = good / count
        assert len(run_round(Global(0, like), sites, Roster(names, Federation(quorum=quorum), 1)).updates) == good
        if good > 1:
            fewer = replace(sites, reorder=lambda replies, good=good: replies[: good - 1])
            with pytest.raises(FederationError):
                run_round(Global(0, like), fewer, Roster(names, Federation(quorum=quorum), 1))


def test_a_round_that_changed_nothing_is_an_error() -> None:
    nothing = {site: {n: torch.zeros_like(t) for n, t in REFERENCE.tensors().items()} for site in "ab"}
    with pytest.raises(FederationError, match="round 5 changed nothing"):
        one_round(Sites(nothing))
    # one site that moved is enough
    assert one_round(Sites({**nothing, "a": CHANGES["a"]})).state.round == 5


def test_a_global_adapter_that_the_codec_cannot_hold_stops_the_run_by_its_tensor() -> None:
    sites = Sites(CHANGES, like=Adapter(REFERENCE.lora, {"head.weight": torch.full((5,), 1e6)}))
    with pytest.raises(FederationError, match=r"round 5: the global adapter cannot be sent: head\.weight: .* float16"):
        one_round(sites, codec_down="fp16")
    assert not sites.requests


def test_seconds_are_of_the_clock_that_was_given() -> None:
    ticks = iter([10.0, 17.0, 20.5])
    result = run_round(Global(0, REFERENCE), Sites(CHANGES), Roster(list("abc"), Federation(), 1), lambda: next(ticks))
    assert (result.seconds, result.aggregation_seconds) == (10.5, 3.5)


def test_the_state_that_went_in_stays_as_it_was() -> None:
    before = flat(REFERENCE)
    result = one_round(Sites(CHANGES))
    assert flat(REFERENCE) == before
    assert flat(result.state.adapter) != before
    assert result.state.adapter.lora.keys() == SHAPES.keys()


def test_a_site_that_answers_twice_or_was_not_asked_stops_the_round() -> None:
    """A transport's fault: adding such a reply would count a site twice."""
    twice = Sites(CHANGES, reorder=lambda replies: [*replies, replies[0]])
    with pytest.raises(FederationError, match=r"each of .* was asked once"):
        one_round(twice)
    with pytest.raises(FederationError, match=r"each of .* was asked once"):
        one_round(Sites(CHANGES, reorder=lambda replies: [*replies[1:], replace(replies[0], site="stranger")]))


# --------------------------------------------------------------------------------------------------------- the global state


def test_a_state_and_its_message_are_the_same() -> None:
    memory = make_adapter(5)
    state = Global(7, REFERENCE, memory, {"a": {"colour": 3}}, {"layer.0": 0.25, "layer.1": 1e6})
    header, back = unpack_global(pack_global("global", state, tasks={"colour": 3}), "global", REFERENCE)
    assert (back.round, back.drift, header["tasks"]) == (7, {"layer.0": 0.25, "layer.1": 1e6}, {"colour": 3})
    assert flat(back.adapter) == flat(REFERENCE)
    assert flat(back.memory) == flat(memory)
    assert back.counts == {}, "what each site holds is not sent to the others"
    _, bare = unpack_global(pack_global("global", Global(0, REFERENCE)), "global", REFERENCE)
    assert (bare.memory, bare.drift) == (None, {})


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"round": -1}, "a message of round -1"),
        ({"round": True}, "a message of round True"),
        ({"round": "3"}, "a message of round '3'"),
        ({"drift": None}, "a drift of None"),
        ({"drift": {"layer.0": -0.5}}, "a drift of"),
        ({"drift": {"layer.0": "much"}}, "a drift of"),
        ({"drift": {"layer.0": True}}, "a drift of"),
        ({"kind": "update"}, "kind = 'update' where 'global' belongs"),
    ],
)
def test_a_global_message_is_refused_for_what_is_wrong_with_it(changed: dict[str, Any], told: str) -> None:
    header, tensors = open_envelope(pack_global("global", Global(3, REFERENCE, make_adapter(5))))
    with pytest.raises(EnvelopeError) as caught:
        unpack_global(seal(header | changed, tensors), "global", REFERENCE)
    assert told in str(caught.value)


@pytest.mark.parametrize("lost", ["memory/layer.0.q.a", "layer.0.q.a"])
def test_half_a_memory_is_refused(lost: str) -> None:
    header, tensors = open_envelope(pack_global("global", Global(3, REFERENCE, make_adapter(5))))
    left = {name: tensor for name, tensor in tensors.items() if name != lost}
    with pytest.raises(EnvelopeError, match=f"{lost}: missing"):
        unpack_global(seal(header, left), "global", REFERENCE)


def test_a_round_carries_counts_memory_and_drift() -> None:
    """Down go the totals of all sites by task; a site that was not asked keeps the counts that it last reported."""
    memory = make_adapter(5)
    counts = {"a": {"colour": 1, "old": 2}, "z": {"colour": 10, "echo": 20}}
    sites = Sites(CHANGES)
    result = run_round(Global(4, REFERENCE, memory, counts), sites, Roster(list(CHANGES), Federation(), 1))
    header, sent = unpack_global(sites.requests[0].payload, "global", REFERENCE)
    assert header["tasks"] == {"colour": 11, "echo": 20, "old": 2}
    assert flat(sent.memory) == flat(memory)
    assert result.state.counts == {"a": TASKS, "b": TASKS, "c": TASKS, "z": {"colour": 10, "echo": 20}}
    assert result.state.memory is memory
    moved = {site: {n: REFERENCE.tensors()[n] + t for n, t in change.items()} for site, change in CHANGES.items()}
    updates = [Update(site, REFERENCE.with_tensors(tensors), n) for n, (site, tensors) in enumerate(moved.items(), 1)]
    assert result.state.drift == drift(REFERENCE, updates, weights(result.updates, "positions"))
    assert set(result.state.drift) == {"layer.0", "layer.1"}
    again = Sites(CHANGES, like=result.state.adapter)
    run_round(result.state, again, Roster(list(CHANGES), Federation(), 1))
    header, sent = unpack_global(again.requests[0].payload, "global", REFERENCE)
    assert header["tasks"] == {"colour": 22, "echo": 38}
    assert sent.drift == result.state.drift


def test_a_site_that_failed_keeps_its_counts() -> None:
    sites = broken(b=Reply("b", error="out of memory"))
    before = {"b": {"colour": 99}}
    result = run_round(Global(4, REFERENCE, counts=before), sites, Roster(list("abc"), Federation(quorum=0.5), 1))
    assert result.state.counts == {"a": TASKS, "b": {"colour": 99}, "c": TASKS}


def test_the_memory_goes_through_the_codec_too() -> None:
    sites = Sites({"a": CHANGES["a"]})
    plain = one_round(Sites({"a": CHANGES["a"]}))
    result = run_round(Global(4, REFERENCE, make_adapter(5)), sites, Roster(["a"], Federation(codec_down="bf16"), 1))
    _, sent = unpack_global(sites.requests[0].payload, "global", REFERENCE)
    rounded = {n: t.bfloat16().float() for n, t in make_adapter(5).tensors().items()}
    assert flat(sent.memory) == flat(REFERENCE.with_tensors(rounded))
    assert flat(result.state.memory) == flat(make_adapter(5)), "the server's own copy stays exact"
    # two adapters at two bytes a number weigh as much as one at four, but for names
    assert result.bytes_down["a"] == pytest.approx(plain.bytes_down["a"], abs=1200)
