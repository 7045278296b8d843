"""The analytic anchor in runs: sums of sites, its classifier as teacher, baseline and beside the adapter; messages and
refusals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import shapes
import torch
from test_run import Silent, go, rows_of, same, without_time
from test_run import adapter_of as exported
from test_stream import GROUPS, stream_data  # noqa: F401 - a fixture
from torch import Tensor
from training import CLASSES, records, setting, whole_batch

from fedkeel.data.format import Example, Formatter
from fedkeel.exchange.codecs import EnvelopeError, open_envelope, seal
from fedkeel.exchange.messages import pack_global, unpack_global
from fedkeel.exchange.sums import pack_foretold, pack_sums, pack_trial, read_foretold, read_known, read_sums, read_trial
from fedkeel.federation.evidence import Anchor, known_sums, tried
from fedkeel.federation.gather import gather
from fedkeel.federation.server import FederationError, Roster
from fedkeel.method.objective import anchor
from fedkeel.method.structure.skip import hold_blocks
from fedkeel.model.features import Beside, Features, chances
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe, plain
from fedkeel.recipe.schema import Evidence, Federation
from fedkeel.recipe.settings import ConfigError
from fedkeel.runs.dry import Dry
from fedkeel.runs.folder import RunError, RunFolder
from fedkeel.runs.prepare import prepare
from fedkeel.runs.served import trained_model
from fedkeel.scores.evaluate import score
from fedkeel.types import Adapter, Global, Head, Record, Reply, Request, Sums

ANCHOR = ["evidence.anchor=1", "evidence.serve=0.5", 'evaluation.baselines=["analytic"]']


class Fresh:
    """A model as a run begins with it, and the run's encoded rows of the task with labels, by stage."""

    def __init__(self, overrides: Sequence[str]) -> None:
        self.recipe = load_recipe(None, [*overrides])
        self.prepared = prepare(self.recipe)
        self.model = Model(self.recipe.model, self.recipe.lora, self.recipe.seed)
        self.formatter = Formatter(self.model.tokenizer, "causal", self.recipe.data.max_length)
        self.stages = [self.formatter.encode_all([r for r in s.all("train") if r.labels]) for s in self.prepared.stages]

    def features(self, examples: Sequence[Example]) -> Tensor:
        return self.model.features([e.prompt for e in examples])


def refitted(features: Tensor, labels: Sequence[str], strength: float) -> tuple[list[str], Tensor]:
    """Ridge regression of one-hot labels, from rows, with λ as given."""
    known, x = sorted(set(labels)), features.double()
    y = torch.tensor([[float(label == one) for one in known] for label in labels], dtype=torch.float64)
    return known, torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1], dtype=torch.float64), x.T @ y).T


@pytest.fixture(scope="module")
def anchored(tiny_base: Path, stream_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], RunFolder]:  # noqa: F811
    """A stream of two stages of a growing label set, with all that the anchor is for."""
    import tiny

    given = [
        *tiny.overrides(tiny_base, stream_data, tmp_path_factory.mktemp("anchored")),
        "data.site_column=ward", "federation.rounds=2", "train.local_steps=2", "evaluation.validation_rows=2",
        "evaluation.max_new_tokens=2", *GROUPS, *ANCHOR,
    ]  # fmt: skip
    return given, go(given)[1]


def test_what_is_kept_are_the_sums_of_all_rows_of_all_sites_so_far(anchored: tuple[list[str], RunFolder]) -> None:
    overrides, folder = anchored
    fresh = Fresh(overrides)
    for stages in (1, 2):
        rows = [e for stage in fresh.stages[:stages] for e in stage]
        features = fresh.features(rows).to(torch.int64)
        for leg in ("federated", "analytic"):
            (known,) = folder.read_known(leg, stages).values()
            assert torch.equal(known.gram, features.T @ features)
            assert known.rows == {label: sum(e.label == label for e in rows) for label in sorted({e.label for e in rows})}
            for label, moment in known.moments.items():
                assert torch.equal(moment, features[[e.label == label for e in rows]].sum(0))
            assert known.stage == stages - 1


def test_rows_are_foretold_as_by_refitting_without_each(anchored: tuple[list[str], RunFolder]) -> None:
    """In each stage, its own rows by all rows so far but the one; λ held."""
    overrides, folder = anchored
    fresh = Fresh(overrides)
    hits: dict[str, int] = {}
    for stages in (1, 2):
        (known,) = folder.read_known("federated", stages).values()
        rows = [e for stage in fresh.stages[:stages] for e in stage]
        features, strength = fresh.features(rows), anchor.cross_validated(known) * float(known.gram.diagonal().double().mean())
        for row in range(len(rows) - len(fresh.stages[stages - 1]), len(rows)):
            others = [n for n in range(len(rows)) if n != row]
            labels, weight = refitted(features[others], [rows[n].label for n in others], strength)
            said = labels[int((features[row].double() @ weight.T).argmax())]
            hits[said] = hits.get(said, 0) + (said == rows[row].label)
        assert dict(known.hits) == {label: count for label, count in sorted(hits.items()) if count}
        (told,) = [
            r for r in rows_of(folder) if r["name"] == "foretold" and r["method"] == "federated" and r["stage"] == stages - 1
        ]
        assert told["value"] == sum(hits.values()) / len(rows)


def test_the_analytic_baseline_answers_by_the_classifier_alone(anchored: tuple[list[str], RunFolder]) -> None:
    overrides, folder = anchored
    fresh = Fresh(overrides)
    for stages in (1, 2):
        (known,) = folder.read_known("analytic", stages).values()
        rows = [e for stage in fresh.stages[:stages] for e in stage]
        strength = anchor.cross_validated(known) * float(known.gram.diagonal().double().mean())
        labels, weight = refitted(fresh.features(rows), [e.label for e in rows], strength)
        tests = [r for r in fresh.prepared.stages[stages - 1].all("test") if r.labels]
        said = fresh.features(fresh.formatter.encode_all(tests)).double() @ weight.T
        right = sum(labels[int(s.argmax())] == r.output for s, r in zip(said, tests, strict=True))
        (told,) = [
            r["value"] for r in rows_of(folder)
            if (r["method"], r["name"], r["task"], r["split"]) == ("analytic", "score", "intent", "test")
            and r["stage"] == stages - 1
        ]  # fmt: skip
        assert told == pytest.approx(right / len(tests))


def test_the_dry_run_tells_what_the_ledger_then_holds(anchored: tuple[list[str], RunFolder]) -> None:
    """Of the anchor's messages and of the rounds', each way, to what numbers and names in headers take."""
    given, folder = anchored
    told = Dry(prepare(load_recipe(None, given))).traffic
    moved: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for row in rows_of(folder):
        if row["method"] == "federated" and row["name"] in ("bytes_down", "bytes_up"):
            moved[row["name"], row["site"], row["round"]].append(row["value"])
    first = {key: sizes for key, sizes in moved.items() if len(sizes) == 2}  # the anchor's come before the round's
    assert len(first) == 2 * (2 + 3)  # one site has rows of the second stage alone
    for way, planned in zip(("bytes_down", "bytes_up"), told.gathered, strict=True):
        assert planned == pytest.approx(sum(sizes[0] for key, sizes in first.items() if key[0] == way), rel=0.01)
    assert told.rounds == pytest.approx(sum(sizes[-1] for sizes in moved.values()), rel=0.01)
    plain = Dry(prepare(load_recipe(None, [*given, "evidence.anchor=0", "evidence.serve=0"]))).traffic
    assert plain.gathered == (0, 0)
    assert plain.rounds < 0.98 * told.rounds


def test_a_run_goes_on_in_the_same_bits(anchored: tuple[list[str], RunFolder], tmp_path: Path) -> None:
    """Stopped before the second stage's first round is saved, so that its anchor is made again, and between its rounds."""
    overrides, whole = anchored
    for when in (3, 4):

        def stop(leg: str, done: int, when: int = when) -> None:
            if (leg, done) == ("federated", when - 1):
                raise KeyboardInterrupt

        here = [*overrides, f"out={tmp_path / str(when)}"]
        with pytest.raises(KeyboardInterrupt):
            go(here, Silent(stop))
        resumed = go(here, resume=True)[1]
        assert same(exported(resumed.path), exported(whole.path))
        assert without_time(rows_of(resumed)) == without_time(rows_of(whole))


def test_progress_ends_where_it_said(anchored: tuple[list[str], RunFolder], tmp_path: Path) -> None:
    overrides, _ = anchored
    watch = Silent()
    go([*overrides, f"out={tmp_path}"], watch)
    assert watch.work == pytest.approx(watch.total)


def test_over_a_grid_as_in_this_process(anchored: tuple[list[str], RunFolder], tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="the extra fedkeel[flower] is not installed")
    from test_engines_agree import over_grid

    overrides, here = anchored
    there = over_grid([*overrides, f"out={tmp_path}"], tmp_path)
    assert same(exported(here.path), exported(there.path))
    assert without_time(rows_of(here)) == without_time(rows_of(there))


def test_what_is_served_adds_the_log_chances_of_both(anchored: tuple[list[str], RunFolder]) -> None:
    overrides, folder = anchored
    recipe = load_recipe(None, overrides)
    model = trained_model(recipe, folder.path)
    (head,) = model.beside.heads.values()
    assert model.beside.weight == 0.5
    formatter = Formatter(model.tokenizer, "causal", recipe.data.max_length)
    tests = [r for r in prepare(recipe).stages[-1].all("test") if r.labels][:5]
    both = score(model, formatter, tests, recipe.evaluation)
    model.beside = Beside({})
    alone = score(model, formatter, tests, recipe.evaluation)
    for row, with_head, without in zip(tests, both, alone, strict=True):
        prompt = formatter.encode(row).prompt
        told = chances(head, model.features([prompt]), row.labels)[0].tolist()
        wanted = [p * t**0.5 for p, t in zip(without.distribution, told, strict=True)]
        assert with_head.distribution == pytest.approx([w / sum(wanted) for w in wanted], rel=1e-4)
    assert any(a.distribution != b.distribution for a, b in zip(both, alone, strict=True))


def test_another_weight_is_tried_without_training_anew(anchored: tuple[list[str], RunFolder], tmp_path: Path) -> None:
    """`fedkeel evaluate RUN evidence.serve=…`; of a run that made no anchor it is refused."""
    overrides, folder = anchored
    for weight in (0.0, 4.0):
        recipe = load_recipe(None, [*overrides, f"evidence.serve={weight}"])
        assert trained_model(recipe, folder.path).beside.weight == weight
    _, none, _ = go([*overrides, f"out={tmp_path}", "evidence.anchor=0", "evidence.serve=0", "evaluation.baselines=[]"])
    with pytest.raises(RunError, match=r"evidence\.serve = 2: .*tiny made no analytic anchor"):
        trained_model(load_recipe(None, [*overrides, "evidence.serve=2"]), none.path)


def test_the_anchor_teaches_and_its_weight_zero_does_not(anchored: tuple[list[str], RunFolder], tmp_path: Path) -> None:
    overrides, folder = anchored
    _, off, _ = go([*overrides, f"out={tmp_path}", "evidence.anchor=0"])
    _, none, _ = go(
        [*overrides, f"out={tmp_path}", "name=none", "evidence.anchor=0", "evidence.serve=0", "evaluation.baselines=[]"]
    )
    assert not same(exported(folder.path), exported(off.path))
    assert same(exported(off.path), exported(none.path))  # what is served beside it changes no training
    assert {r["name"] for r in rows_of(folder)} - {r["name"] for r in rows_of(off)} == {"anchor_loss"}


def test_a_site_without_an_answer_is_left_out_or_ends_the_run(
    anchored: tuple[list[str], RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedkeel.federation.client as client

    overrides, whole = anchored
    real = client.known_sums
    east = {r.id for r in prepare(load_recipe(None, overrides)).sites.rows["east"]["train"]}

    def known(features: object, examples: Sequence[Example], stage: int) -> dict[str, Sums]:
        if any(e.record in east for e in examples):
            raise RuntimeError("the disk is gone")
        return real(features, examples, stage)

    monkeypatch.setattr(client, "known_sums", known)
    with pytest.raises(FederationError, match=r"(?s)anchor of stage 2 cannot be made: 2 of 3 sites told .*the disk is gone"):
        go([*overrides, f"out={tmp_path / 'all'}"])
    watch = Silent()
    _, folder, _ = go([*overrides, f"out={tmp_path}", "federation.quorum=0.6"], watch)
    assert any("stage 2: the anchor is without what site east knows" in note for note in watch.notes)
    (less,), (more,) = (f.read_known("federated", 2).values() for f in (folder, whole))
    missing = [r for r in prepare(load_recipe(None, overrides)).stages[1].rows["east"]["train"] if r.labels]
    assert sum(more.rows.values()) - sum(less.rows.values()) == len(missing) > 0


def test_a_site_that_tells_no_outcome_is_left_out_whole(
    anchored: tuple[list[str], RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows would stand beside those that were tried as if nobody had foretold them."""
    import fedkeel.federation.client as client

    overrides, _ = anchored
    real = client.tried

    def tried(features: Features, examples: Sequence[Example], *more: Any) -> object:
        if any(e.record in east for e in examples):
            raise RuntimeError("the disk is gone")
        return real(features, examples, *more)

    east = {r.id for r in prepare(load_recipe(None, overrides)).sites.rows["east"]["train"]}
    monkeypatch.setattr(client, "tried", tried)
    given = [*overrides, "evaluation.baselines=[]", "federation.quorum=0.6"]
    folder = go([*given, f"out={tmp_path}"])[1]
    (known,) = folder.read_known("federated", 2).values()
    others = [e for stage in Fresh(overrides).stages for e in stage if e.record not in east]
    assert sum(known.rows.values()) == len(others)
    with pytest.raises(FederationError, match=r"(?s)anchor of stage 2 cannot be made: 2 of 3 sites told"):
        go([*given, "federation.quorum=1", f"out={tmp_path / 'all'}"])


def test_a_site_of_other_features_is_left_out() -> None:
    like = Adapter({}, {"w": torch.zeros(1)})
    wide = {site: 3 if site == "b" else 2 for site in "abc"}

    def answered(site: str, payload: bytes) -> bytes:
        x = torch.eye(wide[site], dtype=torch.int16)[:2]
        sums = anchor.sums_of(x, ["p", "q"])
        if open_envelope(payload)[0]["kind"] == "gather":
            return pack_sums(site, 0, like, {"t": sums})
        return pack_foretold(site, 0, like, {"t": ({"p": 1}, [1.0] * len(anchor.SCALES))})

    class Sites:
        def exchange(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
            return [Reply(request.site, answered(request.site, request.payload)) for request in requests]

    def roster(quorum: float) -> Roster:
        return Roster(list("abc"), Federation(quorum=quorum), 0)

    found = gather({}, Sites(), roster(0.6), like, 0, 0)
    assert found.failures == {"b": "its features are 3 numbers, and those of the others 2"}
    assert found.known["t"].rows == {"p": 2, "q": 2}
    with pytest.raises(FederationError, match=r"(?s)2 of 3 sites told .*b: its features are 3 numbers"):
        gather({}, Sites(), roster(1.0), like, 0, 0)


def test_rows_that_are_replayed_are_in_the_sums_once(
    anchored: tuple[list[str], RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their task's classifier teaches on."""
    import fedkeel.federation.train as train

    taught: list[list[str]] = []
    real = train.Anchor

    def watched(features: Features, heads: Mapping[str, Head], config: object) -> Any:
        taught.append(sorted(heads))
        return real(features, heads, config)

    monkeypatch.setattr(train, "Anchor", watched)
    overrides, whole = anchored
    folder = go([*overrides, f"out={tmp_path}", "stream.replay=3", "evaluation.baselines=[]"])[1]
    (known,), (once,) = (f.read_known("federated", 2).values() for f in (folder, whole))
    assert known.rows == once.rows
    assert torch.equal(known.gram, once.gram)
    assert taught
    assert all(taught)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_features_do_not_depend_on_the_batch_and_are_the_bases(name: str) -> None:
    model, examples = setting(name)
    prompts = [e.prompt for e in examples[:5]]
    together = model.features(prompts)
    width = model.net.config.hidden_size if name != "t5" else model.net.config.d_model
    assert together.shape == (5, (2 if name == "llama" else 1) * width + 1)
    model.features._held.clear()
    alone = torch.cat([model.features([prompt]) for prompt in prompts])
    assert (together - alone).abs().max() <= 1  # a step of the grid, where rounding differs
    assert model.initial is not None
    model.features._held.clear()
    shapes.randomise(model, 11)
    assert torch.equal(model.features(prompts), together)  # whatever the adapter
    model.features._held.clear()
    last = model.places.stack[-1][0]
    patches = hold_blocks(model.places, {last})
    assert torch.equal(model.features(prompts), together)  # and whatever is held out of the site's round
    assert all("forward" in block.__dict__ for path, block in model.places.stack if path == last)
    for patch in patches:
        patch.remove()


def test_a_position_is_told_the_classifiers_chances_and_counts_its_trust() -> None:
    model, examples = setting("bert")
    sums = known_sums(model.features, examples, 0)
    heads = {task: replace(anchor.head_of(known, 0.1), trust=torch.tensor([0.25, 0.5, 1.0])[: len(known.rows)])
             for task, known in sums.items()}  # fmt: skip
    batch = whole_batch(model, examples)
    for trust in (True, False):
        soft = Anchor(model.features, {"topic": heads["topic"]}, Evidence(trust=trust))(batch, examples)
        assert soft is not None
        for n, example in enumerate(examples):
            at = soft.place == n
            if example.task != "topic":
                assert not at.any()
                assert soft.weight[n] == 0
                continue
            head = heads["topic"]
            likely = chances(head, model.features([example.prompt]), example.labels)[0]
            assert dict(zip(soft.token[at].tolist(), soft.value[at].tolist(), strict=True)) == pytest.approx(
                dict(zip((CLASSES.index(label) for label in example.labels), likely.tolist(), strict=True)), rel=1e-5
            )
            assert float(soft.weight[n]) == pytest.approx(float(head.trust[head.labels.index(example.label)]) if trust else 1.0)
    assert Anchor(model.features, {}, Evidence())(batch, examples) is None


# ------------------------------------------------------------------------------------------------------------------ messages


@pytest.fixture(scope="module")
def told() -> tuple[Model, list[Example], dict[str, Sums]]:
    model, examples = setting("bert")
    return model, examples, known_sums(model.features, examples, 3)


def test_sums_trial_and_outcome_come_back(told: tuple[Model, list[Example], dict[str, Sums]], tmp_path: Path) -> None:
    model, examples, sums = told
    like = model.initial
    back = read_sums(Reply("a", pack_sums("a", 7, like, sums)), 7, 3, like)
    heads, inverses = {}, {}
    for task, known in sums.items():
        assert torch.equal(back[task].gram, known.gram)
        assert (back[task].rows, back[task].stage) == (known.rows, 3)
        assert all(torch.equal(back[task].moments[label], moment) for label, moment in known.moments.items())
        heads[task], inverses[task] = anchor.head_of(known, 0.1), anchor.inverse(known, 0.1)
    gotten, inverse = read_trial(pack_trial(7, 3, like, heads, inverses))
    outcome = tried(model.features, examples, gotten, inverse)
    # the inverse travels in float32, whose rounding a scale of 50 and a row's leverage bring into the fourth digit
    exactly = tried(model.features, examples, heads, inverses)
    assert outcome == {task: (hits, pytest.approx(nats, rel=1e-3)) for task, (hits, nats) in exactly.items()}
    found = read_foretold(Reply("a", pack_foretold("a", 7, like, outcome)), 7, like, back)
    assert {task: (known.hits, list(known.nats)) for task, known in found.items()} == outcome
    large = replace(sums["topic"], gram=sums["topic"].gram * 2**31 // 2**8 * 2**8)
    assert open_envelope(pack_sums("a", 7, like, {"topic": large}))[1]["gram/0"].dtype == torch.int64
    state = Global(5, like, heads=heads)
    _, again = unpack_global(pack_global("checkpoint", state), "checkpoint", like)
    assert again.heads.keys() == heads.keys()
    for task, head in heads.items():
        other = again.heads[task]
        assert torch.equal(other.weight, head.weight)
        assert torch.equal(other.trust, head.trust)
        assert (other.labels, other.scale, other.stage) == (head.labels, head.scale, head.stage)


def changed(payload: bytes, **header: object) -> bytes:
    before, tensors = open_envelope(payload)
    return seal({**before, **header}, tensors)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"site": "b"}, "site = 'b' where 'a' belongs"),
        ({"round": 8}, "round = 8 where 7 belongs"),
        ({"layout": "x"}, "layout = 'x'"),
        ({"width": True}, "sums of True features"),
        ({"width": 2**20}, "sums of 1048576 features"),
        ({"tasks": []}, "reports no tasks"),
        ({"tasks": {"topic": {"sport": 0}}}, "a label without any"),
        ({"tasks": {"topic": {"sport": 4, "science": 4}, "side": {"world": 2, "science": 2, "x": 1}}}, "moments/0"),
        ({"wide": 1}, "features"),
    ],
)
def test_sums_that_are_not_as_promised_are_refused(
    told: tuple[Model, list[Example], dict[str, Sums]], header: dict[str, object], said: str
) -> None:
    model, _, sums = told
    with pytest.raises(EnvelopeError, match=said):
        read_sums(Reply("a", changed(pack_sums("a", 7, model.initial, sums), **header)), 7, 3, model.initial)


def test_sums_that_no_rows_have_are_refused(told: tuple[Model, list[Example], dict[str, Sums]]) -> None:
    model, _, sums = told
    known = sums["topic"]
    label = next(iter(known.rows))
    for wrong in (
        replace(known, gram=known.gram * 2**12),
        replace(known, gram=-known.gram),
        replace(known, moments={**known.moments, label: known.moments[label] * 2**12}),
    ):
        with pytest.raises(EnvelopeError, match="the sums of task topic are not those of 8 rows"):
            read_sums(Reply("a", pack_sums("a", 7, model.initial, {"topic": wrong})), 7, 3, model.initial)
    twisted = known.gram.clone()
    twisted[0, 1] = twisted[1, 0] = 2 * int((known.gram[0, 0] * known.gram[1, 1]).double().sqrt()) + 1
    wrong = replace(known, gram=twisted)
    with pytest.raises(EnvelopeError, match="topic are not those of any rows: their matrix has an eigenvalue below 0"):
        read_sums(Reply("a", pack_sums("a", 7, model.initial, {"topic": wrong})), 7, 3, model.initial)
    endless = replace(known, gram=known.gram * 2**40, rows={**known.rows, label: 2**53})
    with pytest.raises(EnvelopeError, match=r"topic are of \d+ rows; at most 2147483648 are taken"):
        read_sums(Reply("a", pack_sums("a", 7, model.initial, {"topic": endless})), 7, 3, model.initial)
    nothing = replace(known, gram=0 * known.gram)  # of rows whose features are all 0
    read_sums(Reply("a", pack_sums("a", 7, model.initial, {"topic": nothing})), 7, 3, model.initial)
    with pytest.raises(anchor.SumsError, match="sums that no rows have"):
        anchor.head_of(nothing, 0.1)
    with pytest.raises(EnvelopeError, match="no sums of rows"):
        read_known(pack_sums("a", 7, model.initial, sums))


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ({}, "not that of the tasks"),
        ({"topic": {"hits": {"sport": 99}, "nats": [0.0] * 6}}, "more rows foretold"),
        ({"topic": {"hits": {"zebra": 1}, "nats": [0.0] * 6}}, "more rows foretold"),
        ({"topic": {"hits": {}, "nats": [0.0] * 5}}, "where 6 numbers belong"),
        ({"topic": {"hits": {}, "nats": [-1.0] * 6}}, "where 6 numbers belong"),
        ({"topic": {"hits": {}, "nats": [1.7e308] * 6}}, "where 6 numbers belong, at most 8e.09 each"),
        ({"topic": {"hits": [], "nats": [0.0] * 6}}, "task names with whole numbers"),
        ({"topic": None}, "task names with whole numbers"),
    ],
)
def test_an_outcome_that_cannot_be_is_refused(
    told: tuple[Model, list[Example], dict[str, Sums]], tasks: dict[str, object], said: str
) -> None:
    model, _, sums = told
    payload = changed(pack_foretold("a", 7, model.initial, {}), tasks=tasks)
    with pytest.raises(EnvelopeError, match=said):
        read_foretold(Reply("a", payload), 7, model.initial, {"topic": sums["topic"]})


@pytest.mark.parametrize(
    "wrong",
    [
        None, [1], [{"task": "t"}], [{"task": 1, "labels": ["a"], "width": 3, "scale": 1.0, "stage": 0}],
        [{"task": "t", "labels": [], "width": 3, "scale": 1.0, "stage": 0}],
        [{"task": "t", "labels": ["a"], "width": True, "scale": 1.0, "stage": 0}],
        [{"task": "t", "labels": ["a"], "width": 3, "scale": 0.0, "stage": 0}],
        [{"task": "t", "labels": ["a"], "width": 3, "scale": 1.0, "stage": -1}],
    ],
)  # fmt: skip
def test_heads_that_cannot_be_are_refused(told: tuple[Model, list[Example], dict[str, Sums]], wrong: object) -> None:
    like = told[0].initial
    payload = changed(pack_global("global", Global(1, like, heads={"t": Head(("a",), torch.ones(1, 3), 1.0, torch.ones(1))})),
                      heads=wrong)  # fmt: skip
    with pytest.raises(EnvelopeError, match=r"the message reports head|not a tensor that"):
        unpack_global(payload, "global", like)


# ------------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["evidence.anchor=1", "federation.rule=residual"], "evidence.anchor = 1: the anchor looks through the frozen base"),
        (["evidence.serve=2", "federation.rule=stack"], "evidence.serve = 2: the anchor looks"),
        (
            ["evidence.anchor=1", "privacy.unit=site", "privacy.noise=1", "federation.weighting=uniform"],
            "evidence.anchor = 1: sites send sums over their rows, without noise",
        ),
        (
            ['evaluation.baselines=["analytic"]', "privacy.unit=site", "privacy.noise=1", "federation.weighting=uniform"],
            "evaluation.baselines = analytic: sites send sums",
        ),
    ],
)
def test_what_the_anchor_cannot_go_with_is_refused(keys: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, keys)
    assert said in str(caught.value)


def test_baselines_do_without_it() -> None:
    off = plain(load_recipe(None, ["evidence.anchor=1", "evidence.serve=1"]))
    assert (off.evidence.anchor, off.evidence.serve) == (0.0, 0.0)


def test_rows_of_free_text_have_no_part_in_it() -> None:
    model, _ = setting("llama")
    formatter = Formatter(model.tokenizer, "causal", 128)
    free = formatter.encode_all(records(4))
    assert known_sums(model.features, free, 0) == {}
    chat = Record("c", "talk", "train", "yes", messages=(("user", "well"), ("assistant", "yes")))
    assert chat.labels == ()
