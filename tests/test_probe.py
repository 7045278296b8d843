"""What a probe finds, against changes made by hand and sites that are what they are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_run import go
from typer.testing import CliRunner

from fedkeel.cli import app
from fedkeel.evidence.probe import Probe, disagreement, told_codec, told_disagreement, told_rate
from fedkeel.evidence.report.verdicts import BAD, GOOD, LOOK
from fedkeel.exchange.codecs import make_codec
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import ConfigError
from fedkeel.rng import derive
from fedkeel.runs.prepare import prepare
from fedkeel.types import Record


def one(*values: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(values)}


def test_disagreement_by_hand_without_noise() -> None:
    """Two sites, (2, 0) and (0, 1), with shares ¼ and ¾: ¼·4 + ¾·1 = 1.75 over ‖(½, ¾)‖² = 0.8125."""
    moves = {"a": one(2, 0), "b": one(0, 1)}
    found = disagreement(moves, moves, {"a": 0.25, "b": 0.75})
    assert found.whole == pytest.approx(1.75 / 0.8125)
    assert found.skew == pytest.approx(1.75 / 0.8125)
    assert found.noise == pytest.approx(1)
    assert found.most == pytest.approx(1 / (1 / 16 + 9 / 16))
    assert found.spread == 0


def test_disagreement_takes_the_noise_out() -> None:
    """Eight sites that mean the same, of length 1, with noise of length 3 in 4,000 numbers: Γ would be 1, and is
    (1 + 9)/(1 + 9/8) = 4.71. Then two groups of four that mean things at right angles: Γ is 2 without noise."""
    torch.manual_seed(0)
    sites, size = [f"s{n}" for n in range(8)], 4000
    shares = dict.fromkeys(sites, 1 / 8)
    meant = torch.zeros(2, size)
    meant[0, 0] = meant[1, 1] = 1

    def drawn(groups: int) -> dict[str, dict[str, torch.Tensor]]:
        return {s: {"w": meant[n % groups] + 3 * torch.randn(size) / math.sqrt(size)} for n, s in enumerate(sites)}

    alike = disagreement(drawn(1), drawn(1), shares)
    assert alike.whole == pytest.approx(10 / (1 + 9 / 8), rel=0.1)
    assert alike.noise == pytest.approx(alike.whole, rel=0.1)
    assert alike.skew == pytest.approx(1, abs=0.25)
    assert alike.spread == pytest.approx(3 / math.sqrt(8), rel=0.1)
    assert told_disagreement(alike, 8).level == GOOD
    apart = disagreement(drawn(2), drawn(2), shares)
    assert apart.skew == pytest.approx(2, rel=0.25)
    assert apart.whole > apart.noise
    assert told_disagreement(replace(apart, skew=2.1), 8).level == LOOK
    assert told_disagreement(replace(apart, skew=math.inf), 8).level == LOOK


def test_the_smallest_harmless_codec() -> None:
    sizes = {"fp32": (4000, 0.0), "int8": (1000, 0.1), "int4": (500, 0.5), "topk=0.1+int4": (100, 0.6)}
    found = told_codec(sizes, 1.0, "fp32")
    assert (found.level, found.change) == (LOOK, "set federation.codec_up = 'int4'")
    assert "'int4' by 0.50, in 8.0 times fewer bytes" in found.told
    assert told_codec(sizes, 1.0, "int4").level == GOOD
    assert told_codec(sizes, 1.0, "topk=0.1+int4").level == GOOD  # under the noise itself
    wild = told_codec(sizes, 0.4, "topk=0.1+int4")
    assert (wild.level, "'int8'" in wild.change) == (LOOK, True)


@pytest.mark.parametrize(
    ("half", "once", "twice", "level", "word"),
    [
        (0.9, 0.7, 0.7, GOOD, ""),
        (0.6, 0.8, 0.9, LOOK, "0.0005"),
        (0.9, 0.8, 0.6, LOOK, "0.002"),
        (0.9, 1.5, 2.0, BAD, "0.00025"),
        (0.9, math.nan, math.nan, BAD, "0.00025"),
    ],
)
def test_rates_are_told_apart_beyond_the_noise_of_rows(half: float, once: float, twice: float, level: str, word: str) -> None:
    torch.manual_seed(0)
    rows, jitter = torch.rand(50, dtype=torch.float64), 0.1 * torch.rand(4, 50, dtype=torch.float64)
    ends = {0.0: 1.0, 0.5: half, 1.0: once, 2.0: twice}
    nats = {rate: rows + end + jitter[n] for n, (rate, end) in enumerate(ends.items())}
    found = told_rate(nats, 100, Recipe(train=replace(Recipe().train, lr=1e-3)))
    assert (found.level, word in found.change) == (level, True)
    assert f"{float(nats[0.5].sum()) / 100:.3f}" in found.told


def same_everywhere(records: list[Record]) -> list[Record]:
    """Three sites, each with the rows of all."""
    return [replace(r, site=f"ward-{n}", id=f"{r.id}{n}") for r in records for n in range(3)]


@pytest.mark.slow
def test_sites_with_the_same_rows_disagree_by_noise_alone(tiny_overrides: list[str]) -> None:
    recipe = load_recipe(None, [*tiny_overrides, "train.local_steps=6"])
    records = [*prepare(recipe).sites.all("train"), *prepare(recipe).sites.all("test")]

    def mean_of(records: list[Record] | None) -> tuple[float, float, float]:
        """Γ, that of noise alone, and Γ without noise: each estimate of a pair is off by 0.2 or so."""
        probe = Probe(prepare(recipe, records=records), None)
        draws = [probe.changes(n) for n in range(6)]
        found = [disagreement(draws[n], draws[n + 1], probe.shares) for n in (0, 2, 4)]
        return tuple(sum(getattr(f, name) for f in found) / 3 for name in ("whole", "noise", "skew"))  # type: ignore[return-value]

    whole, noise, skew = mean_of(same_everywhere(records))
    assert skew == pytest.approx(1, abs=0.25)
    assert whole == pytest.approx(noise, rel=0.15)
    whole, noise, natural = mean_of(None)
    assert natural > skew + 0.5  # a ward has one colour
    assert whole > noise + 0.5


def test_a_probe_of_a_run_begins_in_the_middle_and_leaves_it_alone(tiny_overrides: list[str], tmp_path: Path) -> None:
    given = [*tiny_overrides, "federation.rounds=4", "evaluation.baselines=[]"]
    folder = go(given)[1]
    before = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    probe = Probe(prepare(load_recipe(None, given)), folder.path)
    assert probe.state.round == 2
    first = probe.changes(0)
    exact = probe._codecs(first)
    spec = "topk=0.1+int4"
    codec, moved = make_codec(spec), 0.0
    got = {
        s: codec.decode(codec.encode(c, derive(1, "probe", s)), {n: tuple(t.shape) for n, t in c.items()})
        for s, c in first.items()
    }
    for name in next(iter(first.values())):
        off = sum(probe.shares[s] * (got[s][name].double() - first[s][name].double()) for s in first)
        moved += float(off.square().sum())
    assert exact[spec][1] == pytest.approx(math.sqrt(moved), rel=1e-6)
    assert exact["fp32"][1] < 1e-9
    assert exact[spec][0] < exact["int8"][0] < exact["fp32"][0]
    found = CliRunner().invoke(app, ["doctor", str(folder.path), "--probe"])
    assert found.exit_code == 0, found.output
    said = " ".join(found.output.replace("│", " ").split())
    for words in ("sites disagree by Γ", "half, once and twice", "of the noise of batches"):
        assert words in said
    assert before == {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}


def test_a_rate_that_breaks_the_model_is_found(tiny_overrides: list[str]) -> None:
    probe = Probe(prepare(load_recipe(None, [*tiny_overrides, "train.lr=3", "train.local_steps=20"])), None)
    assert any(v.level == BAD and "train.lr" in v.change for v in probe.verdicts())


def test_sites_of_several_ranks_are_refused(tiny_overrides: list[str]) -> None:
    given = [*tiny_overrides, "federation.rule=svd", "lora.site_ranks=[2, 4]"]
    with pytest.raises(ConfigError, match="several ranks"):
        Probe(prepare(load_recipe(None, given)), None)
