"""Differential privacy of a site's contribution: bounds, noise, ε, and what no longer travels."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import dp_accounting
import dp_accounting.rdp
import pytest
import shapes
import torch
from dp_accounting import pld
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run import Silent, go, rows_of
from tiny import tiny_rows, write_data
from training import recipe_of, setting
from typer.testing import CliRunner

import fedkeel.exchange.noise
import fedkeel.federation.local
import fedkeel.federation.server
from fedkeel.cli import app
from fedkeel.engines.coordinate import Away
from fedkeel.engines.hello import read_hello
from fedkeel.engines.work import Work
from fedkeel.exchange.channel import channel_of
from fedkeel.exchange.clip import Clip
from fedkeel.exchange.codecs import EnvelopeError, open_envelope
from fedkeel.exchange.messages import pack
from fedkeel.exchange.noise import Noise, deviation
from fedkeel.federation.local import LocalTransport
from fedkeel.federation.screen import Expected, screen
from fedkeel.federation.server import FederationError, Roster, run_round
from fedkeel.federation.train import SiteError, steps_a_round
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Federation, Privacy
from fedkeel.recipe.settings import ConfigError
from fedkeel.rng import secret_normal
from fedkeel.runs.dry import Dry
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.legs import Cast
from fedkeel.runs.prepare import prepare
from fedkeel.runs.privacy import Spending, check_budget, epsilon, noise_for, planned, row_epsilon, spending
from fedkeel.types import Adapter, Global, Lora, Reply

PRIVATE = ["privacy.unit=site", "privacy.clip=0.05", "privacy.noise=2.0", "federation.weighting=uniform"]
ALONE = ["evaluation.baselines=[]", "train.local_steps=2"]


def gaussian(noise: float, delta: float) -> float:
    """ε of one Gaussian, slowly: bisection on δ(ε) = Φ(1/2z − εz) − e^ε Φ(−1/2z − εz), theorem 8 of Balle & Wang 2018."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    low, high = 0.0, 200.0
    for _ in range(200):
        middle = (low + high) / 2
        found = phi(0.5 / noise - middle * noise) - math.exp(middle) * phi(-0.5 / noise - middle * noise)
        low, high = (middle, high) if found > delta else (low, middle)
    return high


@pytest.mark.parametrize(("noise", "published"), [(3.730632, 1.0), (1.0, 4.377178), (0.5, 10.99)])
def test_epsilon_is_the_published_one(noise: float, published: float) -> None:
    """At δ = 1e-5; σ = 3.73 for ε = 1 is Balle & Wang's own example of how far the classical 4.84 is off."""
    found = epsilon(Privacy("site", noise=noise), 1)
    assert found == pytest.approx(gaussian(noise, 1e-5), rel=1e-4)
    if noise >= 1:
        assert found == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(("noise", "rounds"), [(10.0, 100), (4.0, 7), (2.0, 30)])
def test_rounds_compose_as_an_accountant_of_loss_distributions_says(noise: float, rounds: int) -> None:
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(noise), rounds))
    assert epsilon(Privacy("site", noise=noise), rounds) == pytest.approx(accountant.get_epsilon(1e-5), rel=0.01)
    least = noise_for(3.0, lambda z: epsilon(Privacy("site", noise=z), rounds))
    assert epsilon(Privacy("site", noise=least), rounds) == pytest.approx(3.0, rel=2e-3)
    assert epsilon(Privacy("site", noise=least), rounds) <= 3.0


odd = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, -3.0, 1e19, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(odd, min_size=1, max_size=5), min_size=1, max_size=3), st.sampled_from([1e-6, 0.1, 1.0, 1e6]))
def test_no_change_is_longer_than_the_bound(values: list[list[float]], most: float) -> None:
    tensors = {str(n): torch.tensor(v, dtype=torch.float32) for n, v in enumerate(values)}
    left = Clip(most).leaves(tensors, {})
    length = math.sqrt(sum(float(t.double().square().sum()) for t in left.values()))
    assert length <= most
    assert all(torch.isfinite(t).all() for t in left.values())
    flat = torch.cat(list(tensors.values())).double()
    if not torch.isfinite(flat).all():
        assert length == 0
    elif float(flat.norm()) <= most * (1 - 1e-6):
        assert all(torch.equal(left[name], tensors[name]) for name in tensors)
    else:  # its direction stays
        assert torch.allclose(
            torch.cat(list(left.values())).double(), flat * (most / float(flat.norm())), rtol=1e-5, atol=1e-44
        )


def test_the_noise_has_its_deviation_and_no_seed() -> None:
    """A million numbers: mean, variance and kurtosis within four of their own standard errors; another million is another."""
    count = 10**6
    torch.manual_seed(0)
    first = secret_normal((count,))
    torch.manual_seed(0)
    second = secret_normal((1000, 1000)).reshape(-1)
    for numbers in (first, second):
        assert abs(float(numbers.mean())) < 4 / math.sqrt(count)
        assert abs(float(numbers.var()) - 1) < 4 * math.sqrt(2 / count)
        assert abs(float(numbers.pow(4).mean()) - 3) < 4 * math.sqrt(96 / count)
    assert abs(float((first * second).mean())) < 4 / math.sqrt(count)
    assert abs(float((first[:-1] * first[1:]).mean())) < 4 / math.sqrt(count)
    assert secret_normal(()).shape == ()
    assert secret_normal((3, 0)).shape == (3, 0)
    assert deviation(Privacy("site", clip=0.5, noise=3.0, together=4)) == pytest.approx(0.75)
    told = Noise(0.75).leaves({"w": torch.zeros(count)}, {})["w"]
    assert float(told.std()) == pytest.approx(0.75, abs=4 * 0.75 / math.sqrt(2 * count))


def ones(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float64)


def listening(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, torch.Tensor]]:
    """What each site would have sent, before the channel."""
    heard: list[Mapping[str, torch.Tensor]] = []

    def leaves(self: Clip, tensors: Any, memory: Any) -> Any:
        heard.append({name: t.clone() for name, t in tensors.items()})
        return real(self, tensors, memory)

    real = Clip.leaves
    monkeypatch.setattr(Clip, "leaves", leaves)
    return heard


@pytest.mark.parametrize("at", ["sites", "coordinator"])
@pytest.mark.parametrize("rule", ["mean", "freeze_a"])
def test_a_round_is_the_mean_of_clipped_changes_and_noise(
    at: str, rule: str, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With noise of ones: at the sites z · C / √together on each, at the coordinator z · C over the sum of three."""
    heard = listening(monkeypatch)
    monkeypatch.setattr(fedkeel.exchange.noise, "secret_normal", ones)
    together = ["privacy.together=2"] if at == "sites" else []
    given = [*tiny_overrides, *PRIVATE, *ALONE, *together, f"privacy.noise_at={at}", f"federation.rule={rule}"]
    watch = Silent()
    go([*given, "federation.rounds=1"], watch)
    ((_, result),) = watch.results
    assert len(heard) == 3
    shift = 2.0 * 0.05 / math.sqrt(2) if at == "sites" else 2.0 * 0.05 / 3
    recipe = load_recipe(None, given)
    from fedkeel.model.lora import Model

    initial = Model(recipe.model, recipe.lora, recipe.seed).initial
    assert initial is not None
    after, before = result.state.adapter.tensors(), initial.tensors()
    lengths = [math.sqrt(sum(float(t.double().square().sum()) for t in change.values())) for change in heard]
    assert max(lengths) > 0.05  # the bound is felt
    for name in before:
        if name not in heard[0]:
            assert torch.equal(after[name], before[name])
            continue
        clipped = [c[name].double() * min(1.0, 0.05 / n) for c, n in zip(heard, lengths, strict=True)]
        assert torch.allclose(after[name].double(), before[name].double() + sum(clipped) / 3 + shift, atol=1e-6), name


def test_the_coordinators_noise_is_that_of_the_sum_of_those_who_answered(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three: with noise of ones the mean has z · C / 2, or the sum of two would have less than was promised."""
    heard = listening(monkeypatch)
    monkeypatch.setattr(fedkeel.exchange.noise, "secret_normal", ones)

    def answer(payload: bytes, model: Any, site: Any, *more: Any) -> bytes:
        if site.name == "ward-1":
            raise SiteError("out of memory")
        return real(payload, model, site, *more)

    real = fedkeel.federation.local.answer
    monkeypatch.setattr(fedkeel.federation.local, "answer", answer)
    given = [*tiny_overrides, *PRIVATE, *ALONE, "privacy.noise_at=coordinator", "privacy.clip=1e6", "federation.quorum=0.6"]
    watch = Silent()
    recipe, _, model = go([*given, "federation.rounds=1"], watch)
    ((_, result),) = watch.results
    assert len(heard) == 2
    assert model.initial is not None
    after, before = result.state.adapter.tensors(), model.initial.tensors()
    for name in heard[0]:
        mean = sum(change[name].double() for change in heard) / 2
        shift = after[name].double() - before[name].double() - mean
        assert torch.allclose(shift, torch.full_like(shift, recipe.privacy.noise * 1e6 / 2), rtol=1e-5)


def test_what_a_site_sends_tells_nothing_beside_its_change(tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    def answer(*given: Any) -> bytes:
        sent.append(real(*given))
        return sent[-1]

    real = fedkeel.federation.local.answer
    monkeypatch.setattr(fedkeel.federation.local, "answer", answer)
    _, folder, _ = go([*tiny_overrides, *PRIVATE, *ALONE, "federation.rounds=2", "privacy.noise_at=coordinator"])
    headers = [open_envelope(payload)[0] for payload in sent]
    assert {(h["positions"], json.dumps(h["stats"]), h["seconds"], json.dumps(h["tasks"])) for h in headers} == {
        (1, "{}", "00000000.000", "{}")
    }
    assert len({len(payload) for payload in sent}) == 1
    told = {r["name"] for r in rows_of(folder) if r["method"] == "federated" and not r["split"]}
    assert told == {
        "seconds", "cpu_seconds", "aggregation_seconds", "positions", "bytes_down", "bytes_up", "epsilon", "test_seconds",
    }  # fmt: skip


def test_the_server_takes_no_numbers_about_private_rows() -> None:
    like = Adapter({"m": Lora(torch.zeros(2, 3), torch.zeros(4, 2), 1.0)})
    sent = dict(like.tensors())
    quiet = {"site": "a", "tasks": {}, "seconds": "00000000.000"}
    expected = Expected(0, like, privacy=Privacy("site"))
    assert screen(Reply("a", pack("update", 0, like, sent, "fp32", **quiet, positions=1, stats={})), expected).positions == 1
    for more in ({"positions": 7, "stats": {}}, {"positions": 1, "stats": {"loss": 1.0}}):
        with pytest.raises(EnvelopeError, match=r"numbers about its site's rows"):
            screen(Reply("a", pack("update", 0, like, sent, "fp32", **quiet, **more)), expected)


def test_epsilon_is_told_each_round_and_counts_what_was_asked_for_twice(tiny_overrides: list[str]) -> None:
    """Four rounds; the third is cut off after the sites have answered, and asked for again by the resumed run."""
    given = [*tiny_overrides, *PRIVATE, *ALONE, "federation.rounds=4"]
    privacy = load_recipe(None, given).privacy
    watch = Silent()
    _, whole, _ = go([*given, "name=whole"], watch)
    found = [r["value"] for r in rows_of(whole) if r["name"] == "epsilon"]
    assert found == pytest.approx([epsilon(privacy, n) for n in (1, 2, 3, 4)])
    assert sum("private so far" in note for note in watch.notes) == 4

    class Cut(Silent):
        def advance(self, work: float) -> None:
            super().advance(work)
            if len(self.results) == 2 and self.work > self.at + 40:
                raise KeyboardInterrupt

        def round(self, leg: str, done: int, rounds: int, result: Any) -> None:
            super().round(leg, done, rounds, result)
            self.at = self.work

    with pytest.raises(KeyboardInterrupt):
        go([*given, "name=cut"], Cut())
    _, resumed, _ = go([*given, "name=cut"], resume=True)
    last = [r["value"] for r in rows_of(resumed) if r["name"] == "epsilon"][-1]
    assert last == pytest.approx(epsilon(privacy, 5))


def interrupted(at: int) -> Any:
    """A site's answer, after `at` of which somebody presses Ctrl-C."""
    real, calls = fedkeel.federation.local.answer, itertools.count()

    def answer(*asked: Any) -> bytes:
        if next(calls) == at:
            raise KeyboardInterrupt
        return real(*asked)

    return answer


def test_a_round_whose_checkpoint_was_torn_counts_too(tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sent cannot be taken back: rounds 1, 2, half of 3, and 2 and 3 again are five."""
    given = [*tiny_overrides, *PRIVATE, *ALONE, "federation.rounds=3", "name=torn"]
    out = Path(next(o for o in given if o.startswith("out="))[4:]) / "torn"
    with monkeypatch.context() as patch:
        patch.setattr(fedkeel.federation.local, "answer", interrupted(7))
        with pytest.raises(KeyboardInterrupt):
            go(given)
    checkpoint = out / "checkpoints" / "federated" / "round-0002.fkl"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-7])
    recipe, folder, _ = go(given, resume=True)
    last = [r["value"] for r in rows_of(folder) if r["name"] == "epsilon"][-1]
    assert last == pytest.approx(epsilon(recipe.privacy, 5))


def test_a_site_that_is_drawn_seldom_spends_less(tiny_overrides: list[str]) -> None:
    recipe = load_recipe(None, [*tiny_overrides, *PRIVATE, "federation.sites_per_round=1", "federation.rounds=9"])
    sites = ["ward-0", "ward-1", "ward-2"]
    counts = dict.fromkeys(sites, 0)
    for round in range(9):
        (name,) = fedkeel.federation.server.sample_sites(sites, 1, recipe.seed, round)
        counts[name] += 1
    cast = prepare(recipe).cast
    assert dict(planned(cast)) == {name: count for name, count in counts.items() if count}
    assert max(counts.values()) < 9
    told = check_budget(cast)
    assert f"ε = {epsilon(recipe.privacy, max(counts.values())):.3g} at δ = 1e-05" in told


def test_a_run_over_its_budget_is_refused_and_the_dry_run_says_what_would_do(tiny_overrides: list[str]) -> None:
    given = [*tiny_overrides, *PRIVATE, *ALONE, "federation.rounds=4"]
    with pytest.raises(ConfigError, match=r"come to ε = .* set fewer rounds, or privacy.noise = (\S+)") as refused:
        go([*given, "privacy.epsilon=1"])
    enough = str(refused.value).rpartition("privacy.noise = ")[2]
    assert check_budget(prepare(load_recipe(None, [*given, f"privacy.noise={float(enough) + 1e-3}", "privacy.epsilon=1"])).cast)
    told = CliRunner().invoke(app, ["run", *given, "--dry-run"])
    assert told.exit_code == 0, told.output
    said = " ".join(told.output.replace("│", " ").split())
    assert "for each site, by noise 2 in 4 rounds" in said
    least = noise_for(3.0, lambda z: epsilon(Privacy("site", noise=z), 4))
    assert f"ε = 3 asks {least:.3g}" in said


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (["privacy.noise=1"], "need privacy.unit = 'site'"),
        (["privacy.unit=site", "federation.weighting=uniform"], "without noise promises nothing"),
        (["privacy.unit=site", "privacy.noise=1"], "tells of its rows"),
        ([*PRIVATE, "distill.weight=1"], "send counts of a site's rows"),
        ([*PRIVATE, "federation.rule=svd", "privacy.noise_at=coordinator"], "federation.rule = 'svd' is no sum .mean, "),
        (
            [*PRIVATE, "privacy.noise_at=coordinator", "structure.branch=0.3", "structure.hold=true"],
            "what few sites train is divided by those few",
        ),
        ([*PRIVATE, "privacy.together=2", "structure.skip=0.3", "structure.hold=true"], "is divided by those few"),
        ([*PRIVATE, "privacy.noise_at=coordinator", "federation.codec_up=topk=0.1"], "codec_up = 'topk=0.1' rounds behind"),
        ([*PRIVATE, "privacy.together=2", "federation.codec_up=bf16"], "codec_up = 'bf16' rounds behind the bound"),
        ([*PRIVATE, "federation.rule=share_a"], "keeps a factor at each site"),
        ([*PRIVATE, "privacy.noise_at=coordinator", "privacy.together=2"], "none does: set 1"),
    ],
)
def test_what_would_promise_too_much_is_refused(wrong: list[str], text: str, tiny_overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=text):
        load_recipe(None, [*tiny_overrides, *wrong])


def test_noise_that_would_not_add_up_is_refused_before_the_first_round(tiny_overrides: list[str]) -> None:
    given = [*tiny_overrides, *PRIVATE, *ALONE, "privacy.together=3", "federation.quorum=0.6"]
    with pytest.raises(ConfigError, match="may go on with 2 of 3 sites"):
        go(given)
    # and by whoever has fewer sites in a round than were planned
    roster = Roster(["a", "b", "c"], Federation(quorum=0.6), 0, privacy=Privacy(unit="site", noise=2.0, together=3))
    with pytest.raises(FederationError, match="may go on with 2 of 3 sites, whose noise would not add up"):
        run_round(Global(0, Adapter({}, {"x": torch.zeros(1)})), LocalTransport(None, {}, {}), roster)


def test_a_private_run_is_another_each_time_and_lossy_codecs_come_behind_the_noise(tiny_overrides: list[str]) -> None:
    given = [*tiny_overrides, *PRIVATE, *ALONE, "federation.rounds=1", "federation.codec_up=int8"]
    ends = []
    for name in ("one", "two"):
        watch = Silent()
        go([*given, f"name={name}"], watch)
        ends.append(watch.results[0][1].state.adapter.tensors())
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert list(channel_of(load_recipe(None, given)).steps) == ["clip", "noise", "residual"]


def test_over_machines_no_count_and_no_score_leaves_a_site(
    tiny_overrides: list[str], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flwr", reason="the extra fedkeel[flower] is not installed")
    from flower_grid import FakeGrid
    from flwr.app import Context, RecordDict

    from fedkeel.engines.flower.apps import client_app, server_app
    from fedkeel.recipe.settings import to_toml

    hellos: list[dict[str, Any]] = []

    def hello(self: Work, site: str) -> dict[str, Any]:
        hellos.append(real(self, site))
        return hellos[-1]

    real = Work.hello
    monkeypatch.setattr(Work, "hello", hello)
    files = []
    for name in ("ward-0", "ward-1", "ward-2"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in tiny_rows() if r["department"] == name))
        (folder / "tasks.json").write_text(json.dumps({"colour": {"labels": ["red", "green", "blue"]}}))
        text = f'name = "{name}"\nthreads = 1\n[model]\nbase = "{tiny_base}"\n[data]\nroot = "."\n[worker]\nwarm = false\n'
        (folder / "site.toml").write_text(text)
        files.append(folder / "site.toml")
    recipe = load_recipe(None, [*tiny_overrides, *PRIVATE, "name=there", "evaluation.baselines=base"])
    made = tmp_path / "app"
    made.mkdir()
    (made / "recipe.toml").write_text(to_toml(recipe).replace(recipe.model.base, "tiny_base").replace(recipe.data.root, ""))
    monkeypatch.syspath_prepend(str(made))
    server_app(
        FakeGrid(client_app, 3, None, files), Context(77, 1, {}, RecordDict(), {"sites": "ward-0,ward-1,ward-2", "wait": 60.0})
    )
    run = RunFolder(Path(recipe.out) / "there")
    assert run.state().finished
    assert (run.path / "adapter" / "adapter_model.safetensors").exists()
    assert {count for told in hellos for stage in told["rows"] for count in stage.values()} <= {0, 1}
    assert {count for told in hellos for count in told["encoded"]} == {1}
    rows = rows_of(run)
    assert not [r for r in rows if r["split"]]
    assert [r["value"] for r in rows if r["name"] == "epsilon"] == pytest.approx(
        [epsilon(recipe.privacy, n) for n in (1, 2, 3)]
    )


def test_what_went_wrong_in_a_private_round_stays_at_the_site(
    tiny_overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A loss that breaks, and its number, are of private rows."""
    from fedkeel.engines.work import handle
    from fedkeel.exchange.messages import pack_global
    from fedkeel.recipe.settings import to_toml
    from fedkeel.types import Global

    answers = {}
    for name, more in (("open", []), ("private", PRIVATE)):
        text = to_toml(load_recipe(None, [*tiny_overrides, *more, "train.lr=1e30", "train.local_steps=6"]))
        about = {
            "run": name,
            "id": "1",
            "site": "",
            "recipe": text,
            "kept": "",
            "leg": "federated",
            "steps": 0,
            "rounds": 3,
            "rank": 0,
        }
        handle({**about, "kind": "hello"}, b"", state=tmp_path)
        _, start = handle({**about, "kind": "start"}, b"", state=tmp_path)
        from fedkeel.engines.coordinate import read_start

        down = pack_global("global", Global(0, read_start(start)), since=0, tasks={})
        answers[name] = handle({**about, "kind": "train"}, down, state=tmp_path)[0]["error"]
    assert "the loss became" in answers["open"]
    assert "loss" not in answers["private"]
    assert "stands in the log of that site" in answers["private"]
    assert "the loss became" in capfd.readouterr().err


@pytest.mark.parametrize("more", [PRIVATE, ["privacy.unit=row", "privacy.noise=1.1"], ["privacy.masks=true"]])
def test_why_rows_cannot_be_read_stays_at_the_site_and_how_long_it_took(
    more: list[str], tiny_overrides: list[str], tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An error names the file and the line, a duration says how many rows there are; what is wrong with the request is told."""
    from fedkeel.engines.work import handle
    from fedkeel.recipe.settings import to_toml

    shutil.copytree(tiny_data, tmp_path / "data")
    rows = tmp_path / "data" / "rows.jsonl"
    answers = {}
    for name, keys in (("open", []), ("hides", [*more, "federation.weighting=uniform"])):
        recipe = load_recipe(None, [*tiny_overrides, *keys, f"data.root={tmp_path / 'data'}"])
        asked = {"run": name, "id": "1", "site": "", "recipe": to_toml(recipe), "kind": "hello"}
        found = handle(asked, b"", state=tmp_path)[0]
        answers[name, "times"] = [found["hello"]["load_seconds"] > 0, found["cpu"] > 0]
        answers[name, "another"] = handle({**asked, "site": "ward-9"}, b"", state=tmp_path)[0]["error"]
        whole = rows.read_text()
        rows.write_text(whole + '{"secret": "a name"}\n')
        answers[name, "broken"] = handle(asked, b"", state=tmp_path)[0]["error"]
        rows.write_text(whole)
    assert "rows.jsonl:73" in answers["open", "broken"]
    assert answers["hides", "broken"] == "it failed; what went wrong stands in the log of that site, as its rows are private"
    assert "rows.jsonl:73" in capfd.readouterr().err
    assert "the message is for site 'ward-9'" in answers["open", "another"]
    assert answers["hides", "another"] == answers["open", "another"]
    assert (answers["open", "times"], answers["hides", "times"]) == ([True, True], [False, False])


ROWS = ["privacy.unit=row", "privacy.clip=0.1", "privacy.noise=1.1", "federation.weighting=uniform"]


def test_epsilon_of_rows_is_the_published_one() -> None:
    """TensorFlow Privacy's example, 60,000 rows, batches of 256, 60 epochs, noise 1.12, δ = 1e-5: ε = 2.92 by the conversion of
    Mironov 2017; that of Canonne et al. 2020, which is used here, says less of the same divergences. One row in each step is
    plain composition, and an accountant of loss distributions stays just below."""
    steps, rate = 60 * 60_000 // 256, 256 / 60_000
    old = dp_accounting.rdp.RdpAccountant()
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(1.12))
    old.compose(dp_accounting.SelfComposedDpEvent(event, steps))
    published = min(d + math.log(1e5) / (a - 1) for d, a in zip(old._rdp, old._orders, strict=True) if a > 1)
    assert published == pytest.approx(2.92, rel=0.01)
    assert 0.8 * published < row_epsilon(1.12, rate, steps, 1e-5) < published
    whole = gaussian(8 / 3, 1e-5)
    assert whole <= row_epsilon(8.0, 1.0, 9, 1e-5) <= 1.12 * whole
    assert row_epsilon(1.0, 0.1, 0, 1e-5) == 0
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    sampled = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.5))
    accountant.compose(dp_accounting.SelfComposedDpEvent(sampled, 200))
    assert accountant.get_epsilon(1e-5) <= row_epsilon(1.5, 0.05, 200, 1e-5) <= 1.15 * accountant.get_epsilon(1e-5)


def test_rows_that_do_not_fit_are_not_those_that_are_drawn(tiny_overrides: list[str], tmp_path: Path) -> None:
    """A site with rows whose answer is too long draws each of the others as often as one that never had them, and ε says so:
    before a run, in it, and at a coordinator."""
    rows = tiny_rows()
    long = [{**row, "input": f"{row['input']} again", "output": "stone " * 300} for row in rows if row["task"] == "echo"]
    told = []
    for name, held in (("few", rows), ("more", rows + [row for row in long if row["split"] == "train"])):
        (tmp_path / name).mkdir()
        write_data(tmp_path / name)
        (tmp_path / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
        given = [*tiny_overrides, *ROWS, *ALONE, f"data.root={tmp_path / name}", f"name=run-{name}"]
        given = [*given, "train.batch_size=4", "federation.rounds=1"]
        recipe, folder, _ = go(given)
        epsilons = [r["value"] for r in rows_of(folder) if r["name"] == "epsilon"]
        dry = CliRunner().invoke(app, ["run", *given, "--dry-run"]).output
        hello = Work(recipe).hello("ward-0")
        told.append((epsilons, re.findall(r"ε = (\S+) at δ", dry), hello["encoded"], Dry(prepare(recipe)).cast.rows))
        counts = prepare(recipe).cast.rows[0]["ward-0"]
        away = Away(recipe, ["ward-0"], cast(Any, SimpleNamespace(hellos={"ward-0": read_hello(hello)})), folder, Silent())
        assert away.cast().rows == [{"ward-0": hello["encoded"][0]}]
    assert told[0] == told[1]
    assert counts > told[0][2][0] == 18
    assert told[0][0] == pytest.approx([row_epsilon(1.1, 4 / 12, 2, 1e-5)])


@pytest.mark.slow
def test_the_site_with_the_fewest_rows_spends_most(tiny_overrides: list[str]) -> None:
    """Sites of 12 and 18 rows, 3 rounds of 2 steps of 4 rows."""
    prepared = prepare(load_recipe(None, [*tiny_overrides, *ROWS, "train.batch_size=4"]))
    sizes = {name: len(held["train"]) for name, held in prepared.sites.rows.items()}
    assert set(sizes.values()) == {12, 18}
    spends = spending(prepared.cast)
    assert spends.after(planned(prepared.cast)) == pytest.approx(row_epsilon(1.1, 4 / 12, 6, 1e-5))
    largest = next(name for name, count in sizes.items() if count == 18)
    assert spends.after({largest: 2}) == pytest.approx(row_epsilon(1.1, 4 / 18, 4, 1e-5))
    assert "for each row, by noise 1.1 in 3 rounds" in check_budget(prepared.cast)


@pytest.mark.parametrize("train", ["train.local_steps=3", "train.local_steps=0 train.local_epochs=1"])
def test_the_most_is_that_of_all_sites_and_is_told_without_a_warning(train: str, caplog: pytest.LogCaptureFixture) -> None:
    """By steps, the fewest rows; by epochs, more rows are drawn less often in more steps. Of 83 rows some orders do not end."""
    recipe = load_recipe(None, [*ROWS, "train.batch_size=8", *train.split()])
    rows, asked = {"a": 5, "b": 83, "c": 90, "d": 300}, {"a": 1, "b": 4, "c": 4, "d": 6}
    every = [
        row_epsilon(1.1, min(1.0, 8 / rows[site]), rounds * steps_a_round(recipe.train, rows[site]), 1e-5)
        for site, rounds in asked.items()
    ]
    assert Spending(recipe, {site: (count, count) for site, count in rows.items()}).after(asked) == max(every)
    assert not caplog.records


def test_rows_that_came_or_went_in_between_make_epsilon_no_less(tiny_overrides: list[str]) -> None:
    """A coordinator that begins again hears of rows anew: they are drawn as of the fewest, in the steps of the most."""
    recipe = load_recipe(None, [*tiny_overrides, *ROWS, "train.batch_size=4", "train.local_steps=0", "train.local_epochs=1"])
    before = spending(Cast(recipe, [{"a": 12, "b": 40}])).rows
    now = spending(Cast(recipe, [{"a": 40, "b": 40, "c": 16}]), before)
    assert {site: tuple(counts) for site, counts in now.rows.items()} == {"a": (12, 40), "b": (40, 40), "c": (16, 16)}
    assert now.after({"a": 3}) == row_epsilon(1.1, 4 / 12, 30, 1e-5)
    assert now.after({"b": 3}) == row_epsilon(1.1, 4 / 40, 30, 1e-5)


def test_a_run_does_not_pass_the_epsilon_that_it_was_given(tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds fill it; the second is cut off, so there is no room for the third. With a higher one it goes on."""
    given = [*tiny_overrides, *PRIVATE, *ALONE, "federation.rounds=3", "name=full"]
    most = epsilon(load_recipe(None, given).privacy, 3) + 1e-6
    with monkeypatch.context() as patch:
        patch.setattr(fedkeel.federation.local, "answer", interrupted(4))
        with pytest.raises(KeyboardInterrupt):
            go([*given, f"privacy.epsilon={most}"])
    with pytest.raises(FederationError, match=r"round 3 would come to ε = .*, over privacy\.epsilon = .*ends with round 2"):
        go([*given, f"privacy.epsilon={most}"], resume=True)
    _, folder, _ = go([*given, "privacy.epsilon=1000"], resume=True)
    last = [r["value"] for r in rows_of(folder) if r["name"] == "epsilon"]
    assert last == pytest.approx([epsilon(load_recipe(None, given).privacy, n) for n in (1, 3, 4)])


@pytest.mark.parametrize("micro", [0, 2])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("chosen", [[0, 3, 7], [0, 1, 3, 7, 8, 9]], ids=["fewer", "more than a batch"])
def test_a_step_is_the_sum_of_clipped_gradients_of_rows_and_noise(
    micro: int, together: bool, chosen: list[int], tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd on each row by itself through the whole model, with drawn rows and noise known."""
    import fedkeel.federation.private as private
    from fedkeel.federation.train import Log, Round, lesson_of
    from fedkeel.model.lora import Model
    from fedkeel.runs.encode import formatter_of
    from fedkeel.types import Global

    monkeypatch.setattr(fedkeel.exchange.noise, "secret_normal", ones)
    other = "_one_by_one" if together else "_together"
    monkeypatch.setattr(private, other, lambda *given: pytest.fail("not asked") if together else None)
    recipe = load_recipe(None, [*tiny_overrides, *ROWS, "train.batch_size=4", f"train.micro_batch_size={micro}"])
    model, prepared = Model(recipe.model, recipe.lora, recipe.seed), prepare(recipe)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    examples = formatter_of(model, prepared).encode_all(prepared.sites.rows["ward-0"]["train"])
    with lesson_of(model, examples, Round("ward-0", 3, recipe, Global(0, model.read()))) as lesson:
        backward = partial(lesson.of_rows, lesson.moment(0), Log())
        private.private_gradient(model.net, backward, {i: examples[i].positions for i in chosen}, recipe)
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    expected = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    lengths = []
    for index in chosen:
        ids = torch.tensor([examples[index].ids])
        labels = torch.where(torch.tensor([examples[index].supervised]), ids, -100)
        own = torch.autograd.grad(model.net(input_ids=ids, labels=labels).loss, model.parameters())
        lengths.append(math.sqrt(sum(float(g.double().square().sum()) for g in own)))
        for total, gradient in zip(expected, own, strict=True):
            total += gradient.double() * min(1.0, 0.1 / lengths[-1])
    assert max(lengths) > 0.1
    for mine, total in zip(found, expected, strict=True):
        assert torch.allclose(mine.double(), (total + 1.1 * 0.1) / 4, rtol=1e-3, atol=1e-6)


def test_rows_are_drawn_by_nobodys_seed_each_with_its_chance() -> None:
    """10,000 rows at 0.3: their number within four deviations, and never the same twice."""
    from fedkeel.rng import secret_draw

    draws = [secret_draw(10_000, 0.3) for _ in range(2)]
    for draw in draws:
        assert abs(len(draw) - 3000) < 4 * math.sqrt(10_000 * 0.3 * 0.7)
        assert draw == sorted(set(draw))
    assert draws[0] != draws[1]
    assert secret_draw(5, 1.0) == [0, 1, 2, 3, 4]


def test_a_federation_with_private_rows_runs_and_tells_what_it_spent(tiny_overrides: list[str]) -> None:
    given = [*tiny_overrides, *ROWS, *ALONE, "train.batch_size=4", "federation.rounds=2"]
    recipe, folder, _ = go(given)
    told = [r["value"] for r in rows_of(folder) if r["name"] == "epsilon"]
    assert told == pytest.approx([row_epsilon(1.1, 4 / 12, 2 * n, 1e-5) for n in (1, 2)])
    assert not [r for r in rows_of(folder) if r["name"] == "loss" and r["method"] == "federated"]
    assert recipe.privacy.unit == "row"


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (["evidence.task=restricted"], r"evidence\.task"),
        (["train.sam=0.05"], r"train\.sam"),
        (["train.proximal=0.1"], r"train\.proximal"),
        (["structure.rank=0.1"], r"structure\.\*"),
        (["privacy.noise_at=coordinator"], "the noise is in each step"),
    ],
)
def test_what_would_couple_rows_is_refused(wrong: list[str], text: str, tiny_overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=text):
        load_recipe(None, [*tiny_overrides, *ROWS, *wrong])


@pytest.mark.parametrize("name", shapes.chosen(["llama", "qwen2", "gpt2", "opt", "bert", "modernbert", "t5", "bart"]))
def test_rows_taken_together_are_rows_taken_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every kind of architecture; where rows cannot be told apart, they are taken by themselves."""
    import fedkeel.federation.private as private
    from fedkeel.federation.train import Log, Round, lesson_of
    from fedkeel.types import Global

    monkeypatch.setattr(fedkeel.exchange.noise, "secret_normal", lambda shape: torch.zeros(shape, dtype=torch.float64))
    model, examples = setting(name)
    recipe = recipe_of(*ROWS, "privacy.clip=0.5")
    ends = []
    for way in ("together", "apart"):
        if way == "apart":
            monkeypatch.setattr(private, "_together", lambda *given: None)
        with lesson_of(model, examples, Round("site", 3, recipe, Global(0, model.read()))) as lesson:
            backward = partial(lesson.of_rows, lesson.moment(0), Log())
            private.private_gradient(model.net, backward, {i: examples[i].positions for i in range(len(examples))}, recipe)
            ends.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, two in zip(*ends, strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-6)
