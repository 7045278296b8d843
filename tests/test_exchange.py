"""The exchange end to end on a tiny model: every rule and codec in a real run; what travels, stays and is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import SHAPES, dense_of, flat, make_adapter, numbers
from safetensors.torch import load_file
from shapes import ARCHITECTURES, LAYERS, chosen, make, quickly
from test_run import Silent, adapter_of, go, rows_of, same, without_time
from torch import Tensor
from training import assert_loads_in_peft, recipe_of, setting

import fedkeel.federation.server
import fedkeel.runs.here
from fedkeel.data.format import Formatter
from fedkeel.exchange.codecs import CodecError, EnvelopeError, make_codec, open_envelope, seal
from fedkeel.exchange.messages import Way, names_of, pack, pack_global, unpack_global
from fedkeel.federation.client import Site, answer
from fedkeel.federation.kept import Kept, modules_left_out
from fedkeel.federation.local import LocalTransport
from fedkeel.federation.screen import Expected, screen
from fedkeel.federation.server import FederationError, Roster, run_round
from fedkeel.federation.train import Round, train_round
from fedkeel.method.aggregate.layouts import first_rows, folded, truncated
from fedkeel.method.structure.branch import left_out
from fedkeel.method.structure.skip import blocks_out, blocks_with_branches, hold_blocks
from fedkeel.model.bases import ModelError
from fedkeel.model.export import cut
from fedkeel.model.lora import Model
from fedkeel.model.places import StructureError
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Federation
from fedkeel.recipe.settings import ConfigError
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.prepare import prepare
from fedkeel.runs.served import trained_model
from fedkeel.tables import RULES
from fedkeel.types import Adapter, FedKeelError, Global, Reply, Request, Update

ONE_MODEL = [name for name, rule in RULES.items() if not rule.personal]
PERSONAL = [name for name, rule in RULES.items() if rule.personal]
LEAN = ["evaluation.baselines=[]", "evaluation.test_rows=2", "evaluation.validation_rows=2"]  # what is sent is of interest
EXTRA = {"krum": ["federation.hostile=0"], "trimmed": ["federation.hostile=1"]}


def quick(overrides: Sequence[str], rule: str, *more: str) -> list[str]:
    return [*overrides, *LEAN, f"federation.rule={rule}", *EXTRA.get(rule, []), *more]


def bytes_of(folder: RunFolder, name: str) -> list[float]:
    return [r["value"] for r in rows_of(folder) if r["name"] == name and r["method"] == "federated"]


# ------------------------------------------------------------------------------------------------------ recipe and registry


@pytest.mark.parametrize(
    "spec",
    [
        "fp32",
        "bf16",
        "fp16",
        "int8",
        "int4",
        "topk=0.1",
        "topk=0.5+int4",
        "topk=0.1+bf16",
        "topk=1e-3",
        "",
        "int2",
        "topk",
        "topk=0",
        "topk=1",
        "topk=-0.1",
        "topk=x",
        "topk=nan",
        "int8+topk=0.1",
        "int8+int4",
        "topk=0.1+topk=0.1",
        "topk=0.1+",
        "+int8",
        "topk=0.1+int8+bf16",
        "FP32",
        " int8",
    ],
)
def test_recipe_and_codecs_accept_the_same_specs(spec: str) -> None:
    try:
        make_codec(spec)
        known = True
    except CodecError:
        known = False
    with nullcontext() if known else pytest.raises(ConfigError, match=r"federation\.codec_up"):
        load_recipe(None, [f'federation.codec_up="{spec}"'])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["federation.rule=stack", "stream.average=0.5"], "stream.average = 0"),
        (["federation.rule=residual", "distill.weight=1", "distill.memory=0.5"], "distill.memory = 0"),
        (["federation.rule=svd", "federation.optimiser=adam"], "finds its factors anew"),
        (["federation.rule=share_a", "distill.weight=1"], "no one global model"),
        (["lora.site_ranks=[4,8]"], "of one rank and scale"),
        (["lora.site_ranks=[4,16]", "federation.rule=svd"], "over lora.rank = 8"),
        (["lora.site_ranks=[0]", "federation.rule=svd"], "whole numbers from 1"),
        (["federation.rule=svd", "stream.average=0.5"], "in another basis"),
        (["federation.rule=krum", "lora.site_ranks=[4,8]", "federation.optimiser=adam"], "finds its factors anew"),
        (["structure.hold=true", "structure.branch=0.2", "federation.rule=krum"], "needs them all"),
        (["structure.hold=true", "structure.branch=0.2", "structure.mode=rdrop"], "compares two draws"),
        (["federation.hostile=1"], "'trimmed' and 'krum'"),
        (["structure.hold=true"], "structure.branch above 0"),
        (["structure.hold=true", "structure.skip=0.2", "structure.mode=self"], "compares two draws"),
        (["structure.hold=true", "structure.branch=0.2", "federation.rule=stack"], "needs them all"),
    ],
)
def test_what_cannot_go_together_is_refused_before_anything_runs(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
        load_recipe(None, overrides)


def test_too_few_sites_for_a_robust_rule_are_refused_before_any_work(tiny_overrides: list[str]) -> None:
    told = r"federation\.rule = 'krum' with federation\.hostile = 1 needs at least 5 sites in a round, and 3 of 3 are asked"
    with pytest.raises(ConfigError, match=told):
        prepare(load_recipe(None, quick(tiny_overrides, "krum", "federation.hostile=1")))
    with pytest.raises(ConfigError, match=r"trimmed.* needs at least 3 sites in a round, and 2 of 3 are asked"):
        prepare(load_recipe(None, quick(tiny_overrides, "trimmed", "federation.hostile=1", "federation.sites_per_round=2")))


# ------------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("rule", quickly(("svd", "residual", "krum"), ONE_MODEL))
def test_the_adapter_of_every_rule_loads_in_plain_peft(tiny_overrides: list[str], tiny_base: Path, rule: str) -> None:
    _, folder, model = go(quick(tiny_overrides, rule))
    assert_loads_in_peft(folder.path / "adapter", model, tiny_base)
    recipe = load_recipe(None, quick(tiny_overrides, rule))
    ids = torch.arange(5, 25)[None]
    again = trained_model(recipe, folder.path)
    assert torch.equal(again.net(input_ids=ids).logits, model.net(input_ids=ids).logits)
    errors = [r["value"] for r in rows_of(folder) if r["name"] == "aggregation_error"]
    assert len(errors) == 3
    assert (max(errors) < 1e-6) == RULES[rule].exact


@pytest.mark.parametrize("rule", quickly(("share_a",), PERSONAL))
def test_factors_that_stay_give_one_adapter_a_site_and_never_travel(tiny_overrides: list[str], rule: str) -> None:
    _, folder, _ = go(quick(tiny_overrides, rule))
    adapters = {p.name: load_file(p / "adapter_model.safetensors") for p in (folder.path / "adapter").iterdir()}
    assert len(adapters) == 3
    one, two, _ = adapters.values()
    shared, own = ("lora_A", "lora_B") if rule == "share_a" else ("lora_B", "lora_A")
    assert all(torch.equal(one[name], two[name]) for name in one if shared in name)
    assert not any(torch.equal(one[name], two[name]) for name in one if own in name)
    whole = bytes_of(go([*tiny_overrides, *LEAN, "name=whole"])[1], "bytes_up")
    for up, both in zip(bytes_of(folder, "bytes_up"), whole, strict=True):
        assert up < 0.75 * both
    scores = [r for r in rows_of(folder) if r["name"] == "score" and r["split"] == "test" and r["method"] == "federated"]
    assert scores
    with pytest.raises(FedKeelError, match="leaves one adapter a site"):
        trained_model(load_recipe(None, quick(tiny_overrides, rule)), folder.path)


RESUMED = {
    "stack": ["federation.rule=stack"],
    "residual": ["federation.rule=residual", "federation.optimiser=momentum", "federation.server_lr=0.3"],
    "alternate": ["federation.rule=alternate", "federation.codec_up=int8"],
    "share_a": ["federation.rule=share_a"],
    "adam": ["federation.optimiser=adam", "federation.server_lr=0.01"],
    "topk": ["federation.codec_up=topk=0.2+int4", "federation.codec_down=int8"],
    "held": ["structure.branch=0.4", "structure.hold=true"],
    "blocks": ["structure.branch=0.2", "structure.skip=0.6", "structure.hold=true"],
    "anchored blocks": ["structure.skip=0.9", "structure.hold=true", "evidence.anchor=1", "federation.rounds=4"],
    "ranks": ["federation.rule=svd", "lora.site_ranks=[2, 4]"],
}


@pytest.mark.parametrize("name", quickly(("topk",), RESUMED))
@pytest.mark.parametrize("after", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_sites_and_server_keep_is_resumed_to_the_same_bits(tiny_overrides: list[str], name: str, after: int) -> None:
    """Interrupted before the next round's checkpoint; a local leg before it would find a base without shifts."""
    legs = '["local"]' if name in ("stack", "residual") else "[]"
    overrides = [*tiny_overrides, *LEAN, "train.local_steps=2", f"evaluation.baselines={legs}", *RESUMED[name]]

    def interrupt(leg: str, done: int) -> None:
        if (leg, done) == ("federated", after + 1):
            raise KeyboardInterrupt

    _, whole, _ = go([*overrides, "name=whole"])
    with pytest.raises(KeyboardInterrupt):
        go(overrides, Silent(interrupt))
    _, resumed, _ = go(overrides, resume=True)
    assert [{**r, "run": "whole"} for r in without_time(rows_of(resumed))] == without_time(rows_of(whole))
    for file in (whole.path / "adapter").rglob("*.safetensors"):
        assert same(load_file(file), load_file(resumed.path / "adapter" / file.relative_to(whole.path / "adapter")))


@pytest.mark.slow
def test_baselines_after_a_rule_that_shifts_start_from_the_untouched_base(tiny_overrides: list[str]) -> None:
    local = ['evaluation.baselines=["local"]']
    _, plain, _ = go([*tiny_overrides, *local])
    _, shifted, _ = go([*tiny_overrides, *local, "federation.rule=stack", "name=shifted"])
    scores = [[r["value"] for r in rows_of(f) if r["method"] == "local" and r["unit"] != "seconds"] for f in (plain, shifted)]
    assert scores[0] == scores[1]


# ---------------------------------------------------------------------------------------------------------- what travels


def test_half_the_payload_where_one_factor_rests(tiny_overrides: list[str]) -> None:
    ups = {
        rule: bytes_of(go(quick(tiny_overrides, rule, f"name={rule}", "train.local_steps=1"))[1], "bytes_up")
        for rule in ("mean", "freeze_a", "alternate")
    }
    out = Path(load_recipe(None, tiny_overrides).out)
    downs = {rule: bytes_of(RunFolder(out / rule), "bytes_down") for rule in ("mean", "freeze_a")}
    assert max(ups["freeze_a"]) < 0.75 * min(ups["mean"])
    assert max(downs["freeze_a"]) < 0.75 * min(downs["mean"])
    by_turns = sorted(set(ups["alternate"]))
    assert max(by_turns) < 0.75 * min(ups["mean"])
    assert len(ups["alternate"]) == len(ups["mean"]) == 9


def test_the_frozen_factor_of_freeze_a_keeps_every_bit(tiny_overrides: list[str]) -> None:
    _, _, model = go(quick(tiny_overrides, "freeze_a"))
    assert model.initial is not None
    now = model.read().tensors()
    for name, tensor in model.initial.tensors().items():
        assert torch.equal(now[name], tensor) == name.endswith(".a")


def test_another_frozen_factor_at_the_site_is_refused_before_training(tiny_overrides: list[str]) -> None:
    recipe = load_recipe(None, quick(tiny_overrides, "freeze_a"))
    model = Model(recipe.model, recipe.lora, recipe.seed)
    assert model.initial is not None
    way = Way(names=names_of(model.initial, "b"))
    payload = pack_global("global", Global(0, model.initial), way, tasks={}, unsent="0" * 16)
    with pytest.raises(FedKeelError, match="seed, base and fedkeel must be the same"):
        answer(payload, model, Site("here", [[]], 1, recipe), Kept())


def test_a_codec_makes_messages_smaller_by_what_it_says(tiny_overrides: list[str]) -> None:
    """Adapter bytes by the codec's own layout; headers are alike in all of them."""
    sizes, promised = {}, {}
    for spec in ("fp32", "bf16", "int8", "int4", "topk=0.1+int8"):
        few = [*LEAN, "federation.rounds=1", "train.local_steps=1"]
        _, folder, model = go([*tiny_overrides, *few, f"federation.codec_up={spec}", f"name=c{len(sizes)}"])
        shapes = {n: tuple(t.shape) for n, t in model.read().tensors().items()}
        wire = make_codec(spec).wire(shapes).values()
        promised[spec] = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in wire)
        sizes[spec] = bytes_of(folder, "bytes_up")
    for spec, found in sizes.items():
        payload_only = [size - promised[spec] for size in found]
        assert min(payload_only) > 0, spec
        assert max(payload_only) < 16_000, spec
    assert promised["fp32"] > 1.9 * promised["bf16"] > 3.3 * promised["int8"] > 5 * promised["int4"]


def test_error_feedback_keeps_what_was_not_sent_and_sends_it_later(tiny_overrides: list[str]) -> None:
    """One site, whose residual after a round is what it changed and what it had kept, less what arrived."""
    recipe = load_recipe(None, [*tiny_overrides, "federation.codec_up=topk=0.1+int4"])
    prepared = prepare(recipe)
    model = Model(recipe.model, recipe.lora, recipe.seed)
    formatter = Formatter(model.tokenizer, model.kind, recipe.data.max_length, recipe.data.list_labels)
    name, held = next(iter(prepared.sites.rows.items()))
    rows = formatter.encode_all(held["train"])
    assert model.initial is not None
    start = pack_global("global", Global(0, model.initial), tasks={})
    kept, residual = Kept(), {n: torch.zeros_like(t) for n, t in model.initial.tensors().items()}
    for _ in range(2):  # the same round twice: the same change, so the second shows what was kept
        payload = answer(start, model, Site(name, [rows], 3, recipe), kept)
        change = {n: t - model.initial.tensors()[n] for n, t in model.read().tensors().items()}
        shapes = {n: tuple(t.shape) for n, t in change.items()}
        arrived = make_codec("topk=0.1+int4").decode(open_envelope(payload)[1], shapes)
        for n in change:
            expected = residual[n] + change[n] - arrived[n]
            torch.testing.assert_close(kept.memory["residual"][n], expected, rtol=0, atol=1e-6)
        assert sum(float(t.abs().sum()) for t in kept.memory["residual"].values()) > 0.1 * sum(
            float(t.abs().sum()) for t in change.values()
        )
        residual = dict(kept.memory["residual"])
    without = replace(recipe, federation=replace(recipe.federation, error_feedback=False))
    nothing = Kept()
    answer(start, model, Site(name, [rows], 3, without), nothing)
    assert not nothing.memory


@pytest.mark.parametrize("rule", PERSONAL)
def test_a_site_goes_on_from_the_factor_that_it_kept(tiny_overrides: list[str], rule: str) -> None:
    """At a rate of nearly 0 a round leaves it where it was: the site's own numbers, and not those of a fresh adapter."""
    recipe = load_recipe(None, quick(tiny_overrides, rule, "train.lr=1e-9"))
    prepared = prepare(recipe)
    model = Model(recipe.model, recipe.lora, recipe.seed)
    formatter = Formatter(model.tokenizer, model.kind, recipe.data.max_length, recipe.data.list_labels)
    name, held = next(iter(prepared.sites.rows.items()))
    assert model.initial is not None
    own, fresh = RULES[rule].keeps, model.initial.tensors()
    mine = {n: 0.1 * numbers(i, *t.shape) for i, (n, t) in enumerate(fresh.items()) if n.endswith(f".{own}")}
    way = Way(names=names_of(model.initial, frozenset("ab") - {own}))
    payload = pack_global("global", Global(0, model.initial), way, tasks={})
    kept = Kept(personal=mine)
    answer(payload, model, Site(name, [formatter.encode_all(held["train"])], 3, recipe), kept)
    assert kept.personal.keys() == mine.keys()
    for n, tensor in mine.items():
        torch.testing.assert_close(kept.personal[n], tensor, rtol=0, atol=1e-6)
        assert not torch.allclose(tensor, fresh[n], atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- ranks


def test_a_lower_rank_in_a_larger_model_trains_as_a_model_of_that_rank(tiny_overrides: list[str]) -> None:
    """Rank 2 in room for 4, against a model built with rank 2: the same change, and rows of 0 stay 0."""
    recipe = load_recipe(None, [*tiny_overrides, "federation.rule=svd", "lora.site_ranks=[2, 4, 2]"])
    small = load_recipe(None, [*tiny_overrides, "federation.rule=svd", "lora.rank=2"])
    prepared = prepare(recipe)
    name, held = next(iter(prepared.sites.rows.items()))
    changes, start = [], {}
    for spec, rank in ((recipe, 2), (small, 0)):
        model = Model(spec.model, spec.lora, spec.seed)
        formatter = Formatter(model.tokenizer, model.kind, spec.data.max_length, spec.data.list_labels)
        assert model.initial is not None
        like = first_rows(model.initial, 2, spec.lora.scale(2)) if rank else model.initial
        start = start or like.tensors()
        payload = pack_global("global", Global(0, like.with_tensors(start)), tasks={})
        sent = answer(payload, model, Site(name, [formatter.encode_all(held["train"])], 3, spec), Kept(rank=rank))
        changes.append(open_envelope(sent)[1])
    padded, built = changes
    assert padded.keys() == built.keys()
    for n in padded:
        assert padded[n].shape == built[n].shape
        torch.testing.assert_close(padded[n], built[n], rtol=1e-4, atol=1e-7)
    assert any(float(t.abs().max()) > 1e-4 for t in padded.values())


def test_a_model_refuses_a_rank_that_it_has_no_room_for(tiny_overrides: list[str]) -> None:
    recipe = load_recipe(None, tiny_overrides)
    model = Model(recipe.model, recipe.lora, recipe.seed)
    assert model.initial is not None
    wide = {p: replace(m, a=m.a.repeat(2, 1), b=m.b.repeat(1, 2)) for p, m in model.initial.lora.items()}
    with pytest.raises(ModelError, match="does not fit"):
        model.write(Adapter(wide))


def test_truncated_is_the_best_approximation_and_folded_is_exact() -> None:
    adapter = make_adapter(3, rank=4)
    low = truncated(adapter, make_adapter(0, rank=2, scale=5.0))
    shifts = [
        {path: (numbers(n, d_out, 3), numbers(n + 50, 3, d_in)) for n, (path, (d_out, d_in)) in enumerate(SHAPES.items())}
    ]
    shifts.append({"layer.0.q": (numbers(90, 10, 7), numbers(91, 7, 14))})
    whole = folded(adapter, shifts)
    for path, factors in adapter.lora.items():
        dense = dense_of(factors)
        u, s, vt = torch.linalg.svd(torch.from_numpy(dense), full_matrices=False)
        best = (u[:, :2] * s[:2]) @ vt[:2]
        assert low.lora[path].scale == 5.0
        torch.testing.assert_close(torch.from_numpy(dense_of(low.lora[path])), best, rtol=0, atol=1e-5 * float(s[0]))
        shifted = dense + sum((e[path][0].double() @ e[path][1].double()).numpy() for e in shifts if path in e)
        torch.testing.assert_close(torch.from_numpy(dense_of(whole.lora[path])), torch.from_numpy(shifted), rtol=0, atol=1e-4)
        assert whole.lora[path].a.shape[0] <= min(SHAPES[path])
    with pytest.raises(ValueError, match=r"layer\.9"):
        folded(adapter, [{"layer.9": (numbers(1, 2, 1), numbers(2, 1, 2))}])


# -------------------------------------------------------------------------------------------------- the log of base shifts


@dataclass
class Pretend:
    """A Transport of sites that add a fixed change; `broken` ones fail in the present round."""

    like: Adapter
    broken: tuple[str, ...] = ()
    factors: str = "ab"
    requests: dict[str, bytes] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)

    def exchange(self, requests: Sequence[Request], deadline: float) -> Sequence[Reply]:
        replies = []
        for request in requests:
            site, self.requests[request.site] = request.site, request.payload
            header, state = unpack_global(request.payload, "global", self.like)
            assert header["shifts"]["first"] <= self.held.get(site, 0), "entries are missing in between"
            if site in self.broken:
                replies.append(Reply(site, error="no power"))
                continue
            self.held[site] = header["shifts"]["first"] + len(header["shifts"]["ranks"])
            change = {
                n: 0.1 * numbers(sum(map(ord, site)) + i, *t.shape) for i, (n, t) in enumerate(self.like.tensors().items())
            }
            change = {n: t for n, t in change.items() if n in names_of(self.like, self.factors)}
            told = {"site": site, "positions": 10, "stats": {"loss": 1.0}, "seconds": "00000001.000", "tasks": {}}
            payload = pack("update", state.round, self.like, change, "fp32", held=self.held[site], **told)
            replies.append(Reply(site, payload))
        return replies


def announced(payload: bytes, like: Adapter) -> tuple[int, int]:
    """(entries before those that travel, entries that travel)."""
    header, state = unpack_global(payload, "global", like)
    return header["shifts"]["first"], len(state.shifts)


def test_a_site_that_missed_rounds_is_sent_what_it_missed_and_one_that_failed_all() -> None:
    like = make_adapter(0)
    sites, federation = Pretend(like), Federation(rule="stack", quorum=0.3, sites_per_round=0)
    state = Global(0, like)
    state = run_round(state, sites, Roster(["a", "b", "c"], federation, 1)).state
    assert all(announced(p, like) == (0, 0) for p in sites.requests.values())
    state = run_round(state, sites, Roster(["a", "b"], federation, 1)).state
    assert announced(sites.requests["a"], like) == (0, 1)
    sites.broken = ("b",)
    state = run_round(state, sites, Roster(["a", "b", "c"], federation, 1)).state
    assert announced(sites.requests["a"], like) == (1, 1)
    assert announced(sites.requests["c"], like) == (0, 2)  # it missed a round
    sites.broken = ()
    state = run_round(state, sites, Roster(["a", "b", "c"], federation, 1)).state
    assert announced(sites.requests["a"], like) == (2, 1)
    assert announced(sites.requests["b"], like) == (0, 3)  # it failed: nobody knows what it holds
    assert state.held == dict.fromkeys("abc", 3)
    assert len(state.shifts) == 4
    # every entry is the exact sum of that round
    expected = sum(
        2.0
        * (
            (like.lora["layer.0.q"].b + 0.1 * numbers(ord(s) + 1, 10, 3)).double()
            @ (like.lora["layer.0.q"].a + 0.1 * numbers(ord(s), 3, 14)).double()
        )
        / 3
        for s in "abc"
    )
    left, right = state.shifts[0]["layer.0.q"]
    torch.testing.assert_close(left.double() @ right.double(), expected, rtol=0, atol=1e-5)


def test_a_base_replays_a_log_once_and_refuses_a_gap(tiny_overrides: list[str]) -> None:
    recipe = load_recipe(None, tiny_overrides)
    model = Model(recipe.model, recipe.lora, recipe.seed)
    path = sorted(model.layers)[0]
    weight = model.layers[path].get_base_layer().weight
    before, (d_out, d_in) = weight.detach().clone(), weight.shape
    log = [{path: (numbers(n, d_out, 2), numbers(n + 9, 2, d_in))} for n in range(3)]
    expected = before.clone()
    for entry in log:
        expected = expected + entry[path][0] @ entry[path][1]
    model.replay(log[:2], 0)
    model.replay(log, 0)
    model.replay(log[1:], 1)
    assert model.shifts == 3
    assert torch.equal(weight, expected)
    with pytest.raises(ModelError, match="holds 3 base shifts and the message begins with number 6"):
        model.replay(log, 5)
    model.rewind()
    assert model.shifts == 0
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ({"first": -1, "ranks": []}, "base shifts"),
        ({"first": True, "ranks": []}, "base shifts"),
        ({"first": 0}, "base shifts"),
        ({"first": 0, "ranks": [3]}, "without their ranks"),
        ({"first": 0, "ranks": [{"layer.0.q": 11}]}, "from 1 to 10"),
        ({"first": 0, "ranks": [{"layer.0.q": 2.0}]}, "from 1 to 10"),
        ({"first": 0, "ranks": [{"layer.7": 1}]}, "no map of this adapter"),
        ({"first": 0, "ranks": [{"layer.0.q": 1}]}, "missing"),
    ],
)
def test_a_log_of_nonsense_is_refused(log: Any, told: str) -> None:
    like = make_adapter(0)
    header, tensors = open_envelope(pack_global("global", Global(0, like)))
    with pytest.raises(EnvelopeError, match=told):
        unpack_global(seal(header | {"shifts": log}, tensors), "global", like)


# ---------------------------------------------------------------------------------------------------- held for a whole round


def test_modules_left_out_of_a_round_are_neither_sent_nor_averaged_in() -> None:
    """By hand: a module's next factors are the mean over the sites that trained it, and of no one's as they were."""
    like = make_adapter(0)
    out = {"a": frozenset({"layer.0.q"}), "b": frozenset({"layer.0.q", "layer.1.q"}), "c": frozenset({"layer.0.q"})}
    positions = {"a": 1, "b": 2, "c": 5}

    def change(site: str, name: str, tensor: Tensor) -> Tensor:
        return 0.1 * numbers(ord(site) + len(name), *tensor.shape)

    class Some:
        def exchange(self, requests: Sequence[Request], deadline: float) -> Sequence[Reply]:
            replies = []
            for request in requests:
                site = request.site
                names = names_of(like, "ab", out[site])
                sent = {n: change(site, n, t) for n, t in like.tensors().items() if n in names}
                told = {
                    "site": site,
                    "positions": positions[site],
                    "stats": {"loss": 1.0},
                    "seconds": "00000001.000",
                    "tasks": {},
                }
                replies.append(Reply(site, pack("update", 0, like, sent, "fp32", **told)))
            return replies

    result = run_round(Global(0, like), Some(), Roster(list("abc"), Federation(), 1, hold=lambda site, round: out[site]))
    now = result.state.adapter.tensors()
    for name, tensor in like.tensors().items():
        who = [s for s in "abc" if not any(name.startswith(p + ".") for p in out[s])]
        total = sum(positions[s] for s in who)
        mean = sum((positions[s] / total * change(s, name, tensor).double() for s in who), torch.zeros(()).double())
        expected = tensor.double() + mean
        torch.testing.assert_close(now[name].double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(now[name], tensor) == (not who)


def test_a_message_with_a_module_that_was_left_out_is_refused() -> None:
    like = make_adapter(0)

    class All:
        def exchange(self, requests: Sequence[Request], deadline: float) -> Sequence[Reply]:
            told = {"positions": 1, "stats": {"loss": 1.0}, "seconds": "00000001.000", "tasks": {}}
            return [
                Reply(
                    r.site,
                    pack("update", 0, like, {n: t * 0.1 for n, t in like.tensors().items()}, "fp32", site=r.site, **told),
                )
                for r in requests
            ]

    with pytest.raises(FederationError, match=r"layer\.0\.q.* not a tensor"):
        run_round(Global(0, like), All(), Roster(["a"], Federation(), 1, hold=lambda site, round: frozenset({"layer.0.q"})))


@pytest.mark.parametrize("rule", ["mean", "svd", "alternate"])
def test_replies_too_large_to_be_held_together_are_decoded_anew_to_the_same_bits(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    like, decoded, held = make_adapter(0), [], {}
    real = fedkeel.federation.server.screen

    def counting(reply: Reply, *more: Any) -> Update:
        decoded.append(reply.site)
        return real(reply, *more)

    monkeypatch.setattr(fedkeel.federation.server, "screen", counting)
    for small in (2**28, 0):
        monkeypatch.setattr(fedkeel.federation.server, "SMALL", small)
        sites = Pretend(like, factors="b" if rule == "alternate" else "ab")
        held[small] = run_round(Global(0, like), sites, Roster(list("abc"), Federation(rule=rule), 1))
        assert (decoded == list("abc")) == bool(small)
        decoded.clear()
    together, anew = held.values()
    assert flat(together.state.adapter) == flat(anew.state.adapter)
    assert (together.error, together.state.drift) == (anew.error, anew.state.drift)


def test_left_out_modules_are_drawn_with_their_probability_and_never_all() -> None:
    paths = [f"layer.{n}" for n in range(20)]
    draws = [left_out(paths, 0.3, 7, f"site-{k}", r) for k in range(20) for r in range(10)]
    share = sum(map(len, draws)) / (200 * 20)
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert left_out(paths, 0.3, 7, "site-1", 2) == left_out(reversed(paths), 0.3, 7, "site-1", 2)
    assert len(set(draws)) > 150
    assert all(len(left_out(["x"], 0.9, seed, "s", 0)) == 0 for seed in range(20))


def test_blocks_are_left_out_the_oftener_the_higher_and_never_all() -> None:
    """Six blocks: none of the lower half, then 1/3, 2/3 and all of the amount; modules elsewhere say nothing of it."""
    paths = [f"model.layers.{n}.{name}" for n in range(6) for name in ("q", "v")] + ["vision.blocks.0.q", "head"]
    draws = [blocks_out(paths, 0.6, 7, f"site-{k}", r) for k in range(40) for r in range(25)]
    assert set().union(*draws) == {f"model.layers.{n}" for n in (3, 4, 5)}
    for n, chance in ((3, 0.2), (4, 0.4), (5, 0.6)):
        found = sum(f"model.layers.{n}" in out for out in draws)
        assert abs(found - 1000 * chance) < 4 * (1000 * chance * (1 - chance)) ** 0.5
    assert draws[0] == blocks_out(reversed(paths), 0.6, 7, "site-0", 0)
    upper = [f"layers.{n}.q" for n in (4, 5)]  # branches in the upper third alone: the lowest of them stays where all would go
    few = [blocks_out(upper, 0.6, 7, "a", r) for r in range(200)]
    assert set(few) == {frozenset(), frozenset({"layers.4"}), frozenset({"layers.5"})}
    assert blocks_out([], 0.5, 7, "a", 0) == blocks_out(["head"], 0.5, 7, "a", 0) == frozenset()


@pytest.mark.parametrize("name", chosen(ARCHITECTURES))
def test_a_coordinator_finds_the_blocks_of_the_stack_that_predicts(name: str) -> None:
    model = make(name)
    assert model.initial is not None
    assert list(blocks_with_branches(model.initial.lora).values()) == [path for path, _ in model.places.stack]


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "t5"))])
def test_a_site_that_holds_a_block_trains_the_model_written_out_without_it(name: str) -> None:
    held = ["structure.skip=0.9", "structure.hold=true", "federation.weighting=uniform"]
    recipe = recipe_of(*held)
    model, examples = setting(name)
    written, _ = setting(name)
    state = Global(next(r for r in range(9) if modules_left_out(recipe, model.read().lora)("here", r)), model.read())
    roster = Roster(["here"], recipe.federation, recipe.seed, hold=modules_left_out(recipe, model.read().lora))
    sites = {"here": Site("here", [examples], 10, recipe)}
    seen: list[Reply] = []
    after = run_round(state, LocalTransport(model, sites, {"here": Kept()}, seen.append), roster).state.adapter.tensors()
    cut(written, range(LAYERS - 1))
    written.write(state.adapter)
    train_round(written, examples, Round("here", 10, recipe_of("federation.weighting=uniform"), state, {}))
    expected, gone = written.read().tensors(), f"{model.places.stack[-1][0]}."
    for path, tensor in state.adapter.tensors().items():
        assert torch.equal(after[path], tensor) == (path.startswith(gone) or torch.equal(expected[path], tensor))
        torch.testing.assert_close(after[path], expected[path], rtol=1e-5, atol=1e-6)
    (reply,) = seen
    sent = open_envelope(reply.payload)[1]
    assert sent
    assert not any(gone in path for path in sent)
    assert all("forward" not in block.__dict__ for _, block in model.places.stack)


def test_blocks_of_another_stack_are_not_silently_run() -> None:
    model = make("llama")
    with pytest.raises(StructureError, match=r"encoder\.layers\.1 lies elsewhere"):
        hold_blocks(model.places, {"encoder.layers.1"})
    assert all("forward" not in block.__dict__ for _, block in model.places.stack)


def test_a_held_run_leaves_modules_out_of_its_messages(tiny_overrides: list[str]) -> None:
    _, folder, _ = go([*tiny_overrides, *LEAN, "structure.branch=0.5", "structure.hold=true"])
    sizes = bytes_of(folder, "bytes_up")
    assert len(set(sizes)) > 3
    plain = bytes_of(go([*tiny_overrides, *LEAN, "name=plain"])[1], "bytes_up")
    assert sum(sizes) < 0.8 * sum(plain)
    assert not same(adapter_of(folder.path), adapter_of(folder.path.parent / "plain"))


# ------------------------------------------------------------------------------------------------------------- optimisers


def test_a_server_optimiser_steps_as_its_formula_says(tiny_overrides: list[str]) -> None:
    """Momentum with rate ½ over two rounds, from the checkpoints: m₁ = Δ₁, m₂ = 0.9 m₁ + Δ₂, where the sites' own starting
    points are those of the run, so Δ is read off its own rounds."""
    like = make_adapter(0)
    sites, federation = Pretend(like), Federation(optimiser="momentum", server_lr=0.5)
    first = run_round(Global(0, like), sites, Roster(["a", "b"], federation, 1)).state
    second = run_round(first, sites, Roster(["a", "b"], federation, 1)).state
    for i, (name, tensor) in enumerate(like.tensors().items()):
        delta = sum(0.05 * numbers(ord(s) + i, *tensor.shape) for s in "ab")
        torch.testing.assert_close(first.adapter.tensors()[name], tensor + 0.5 * delta, rtol=0, atol=1e-5)
        torch.testing.assert_close(second.adapter.tensors()[name], tensor + 0.5 * delta * (1 + 1.9), rtol=0, atol=1e-5)


def test_checkpoints_without_what_they_promise_are_refused(tiny_overrides: list[str]) -> None:
    _, folder, model = go([*tiny_overrides, "evaluation.baselines=[]", "federation.codec_up=topk=0.2"])
    assert model.initial is not None
    kept, _ = folder.read_kept("federated", 3, model.initial)
    assert len(kept) == 3
    assert sorted(p.name for p in (folder.path / "checkpoints/federated").glob("kept-*")) == ["kept-0002", "kept-0003"]
    (folder.path / "checkpoints/federated/kept-0003/1.fkl").unlink()
    with pytest.raises(FedKeelError, match="kept-0003"):
        folder.read_kept("federated", 3, model.initial)


def test_the_ledger_holds_the_length_of_every_message(tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []

    class Listening(LocalTransport):
        def exchange(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
            replies = super().exchange(requests, deadline)
            by_site: Mapping[str, Reply] = {r.site: r for r in replies}
            seen.extend((r.site, len(r.payload), len(by_site[r.site].payload)) for r in requests)
            return replies

    monkeypatch.setattr(fedkeel.runs.here, "LocalTransport", Listening)
    _, folder, _ = go(quick(tiny_overrides, "stack", "federation.codec_up=int4"))
    rows = rows_of(folder)
    down = [(r["site"], int(r["value"])) for r in rows if r["name"] == "bytes_down"]
    up = [(r["site"], int(r["value"])) for r in rows if r["name"] == "bytes_up"]
    assert sorted(down) == sorted((site, d) for site, d, _ in seen)
    assert sorted(up) == sorted((site, u) for site, _, u in seen)
    assert json.loads(folder._state_file.read_text())["finished"]


# ------------------------------------------------------------------------------------------------- what a site cannot break


def reply_of(like: Adapter, change: Mapping[str, Tensor], **told: Any) -> Reply:
    header = {"positions": 1, "stats": {"loss": 1.0}, "seconds": "00000001.000", "tasks": {}, "held": 0} | told
    return Reply("a", pack("update", 0, like, change, "fp32", site="a", **header))


SMALL = {n: 0.1 * t for n, t in make_adapter(0).tensors().items()}
TOO_MUCH = {
    "more base shifts than there are": ({"held": 2**60}, "1152921504606846976 base shifts held, of 0"),
    "too many tasks": ({"tasks": dict.fromkeys(map(str, range(5000)), 1)}, "reports 5000 tasks"),
    "task names without end": ({"tasks": {"x" * 300_000: 1}}, "300000 letters"),
    "a stat with the name of a ledger row": ({"stats": {"loss": 1.0, "bytes_up": -1e12}}, "not for sites"),
    "a stat with an odd name": ({"stats": {"loss": 1.0, "gate a": 1.0}}, "not for sites"),
    "too many stats": ({"stats": {"loss": 1.0} | {f"s{n}": 1.0 for n in range(100)}}, "reports 101 stats"),
}


@pytest.mark.parametrize(("told", "error"), TOO_MUCH.values(), ids=TOO_MUCH.keys())
def test_numbers_that_would_break_a_checkpoint_or_the_ledger_are_refused(told: dict[str, Any], error: str) -> None:
    with pytest.raises(EnvelopeError, match=error):
        screen(reply_of(make_adapter(0), SMALL, **told), Expected(0, make_adapter(0)))


def test_a_change_that_overflows_once_it_is_added_is_refused() -> None:
    like = make_adapter(0)
    large = like.with_tensors({n: torch.full_like(t, 3e38) for n, t in like.tensors().items()})
    with pytest.raises(EnvelopeError, match="not finite once the change is added"):
        screen(reply_of(large, large.tensors()), Expected(0, large))


@pytest.mark.parametrize("rule", ["svd", "stack"])
def test_a_sum_that_overflows_stops_the_round_before_it_becomes_the_state(rule: str) -> None:
    like = make_adapter(0)

    class Huge:
        def exchange(self, requests: Sequence[Request], deadline: float) -> Sequence[Reply]:
            return [reply_of(like, {n: torch.full_like(t, 3e38) for n, t in like.tensors().items()})]

    with pytest.raises(FederationError, match="not finite once the updates are combined"):
        run_round(Global(0, like), Huge(), Roster(["a"], Federation(rule=rule), 1))


def test_a_shift_left_by_a_round_that_was_cut_off_is_written_anew(tmp_path: Path) -> None:
    like, folder = make_adapter(0), RunFolder(tmp_path)
    path = "layer.0.q"
    for value in (1.0, 2.0):  # the second time with another outcome
        folder.write_checkpoint("federated", Global(1, like, shifts=[{path: (torch.full((10, 1), value), torch.ones(1, 14))}]))
    assert float(folder.read_checkpoint("federated", 1, like).shifts[0][path][0][0, 0]) == 2.0


def test_a_site_that_was_never_asked_has_an_adapter_too(tiny_overrides: list[str]) -> None:
    _, folder, _ = go(quick(tiny_overrides, "share_a", "federation.sites_per_round=1", "federation.rounds=1"))
    assert len(list((folder.path / "adapter").iterdir())) == 3


def test_one_step_of_share_a_changes_only_what_stays(tiny_overrides: list[str]) -> None:
    """With B = 0 its A has no gradient: nothing that travels changes in round 1, and that is no error."""
    _, folder, _ = go(quick(tiny_overrides, "share_a", "train.local_steps=1", "federation.rounds=1"))
    assert len(list((folder.path / "adapter").iterdir())) == 3
