"""A clipping bound that follows a quantile: the update, its accounting, its noise, what travels, and resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import pld
from test_privacy import ALONE, PRIVATE, listening, ones
from test_run import Silent, adapter_of, go, rows_of, same

import fedkeel.exchange.noise
import fedkeel.exchange.quantile
from fedkeel.evidence.report.tables import method_table
from fedkeel.exchange.codecs import EnvelopeError, header_of
from fedkeel.exchange.noise import Noise, deviation, of_change, of_count
from fedkeel.exchange.quantile import as_now, heard, next_bound, read_bound, side, told
from fedkeel.federation.local import LocalTransport
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Privacy
from fedkeel.recipe.settings import ConfigError
from fedkeel.runs.privacy import epsilon
from fedkeel.types import Reply, Request, Row

MOVES = [*PRIVATE, *ALONE, "privacy.quantile=0.5", "privacy.clip=0.001", "privacy.clip_rate=3", "privacy.noise=0.1"]
WAYS = {
    "sites": ["privacy.together=2"],
    "coordinator": ["privacy.noise_at=coordinator"],
    "masks": ["privacy.together=3", "privacy.masks=true"],
}


def injected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of ones wherever it is drawn."""
    monkeypatch.setattr(fedkeel.exchange.noise, "secret_normal", ones)
    monkeypatch.setattr(fedkeel.exchange.quantile, "secret_normal", ones)


def bounds_of(folder: Any) -> list[float]:
    return [r["value"] for r in rows_of(folder) if r["name"] == "clip"]


@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_the_papers(way: str, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against algorithm 1 by hand, over what the three sites would have sent, with noise of ones: the bounds, and the step of
    the second round, which is the mean of changes clipped to C₁ plus z_Δ · C₁. The coordinator writes no side down."""
    if way == "masks":
        pytest.importorskip("cryptography")
    changes, watch = listening(monkeypatch), Silent()
    injected(monkeypatch)
    recipe, folder, _ = go([*tiny_overrides, *MOVES, *WAYS[way]], watch)
    lengths = [math.sqrt(sum(float(t.double().square().sum()) for t in change.values())) for change in changes]
    assert len(lengths) == 9
    at_sites, root = way != "coordinator", math.sqrt(recipe.privacy.together)
    sigma = 0.15  # a twentieth of the three sites, of two of them 0.1: z
    sigma = sigma if recipe.privacy.together == 3 or not at_sites else 0.1
    bound, wanted = 0.001, []
    for n in range(0, 9, 3):
        wanted.append(bound)
        share = (sum(length <= bound for length in lengths[n : n + 3]) + (3 * sigma / root if at_sites else sigma)) / 3
        bound *= math.exp(-3 * (share - 0.5))
    assert bounds_of(folder) == pytest.approx(wanted, rel=1e-5)  # masks count in steps of 2⁻²²
    assert wanted[-1] > 3 * wanted[0]  # it moved
    spent = [r["value"] for r in rows_of(folder) if r["name"] == "epsilon"]
    assert spent == [epsilon(Privacy("site", noise=0.1), n) for n in (1, 2, 3)]  # what a fixed bound spends
    first, second = (result.state.adapter.tensors() for _, result in watch.results[:2])
    z = (0.1**-2 - (2 * sigma) ** -2) ** -0.5
    shift = z * wanted[1] * (1 / root if at_sites else 1 / 3)
    for name in first:
        clipped = [c[name].double() * min(1.0, wanted[1] / n) for c, n in zip(changes[3:6], lengths[3:6], strict=True)]
        assert torch.allclose(second[name].double(), first[name].double() + sum(clipped) / 3 + shift, atol=1e-6), name
    if way == "coordinator":
        assert all(update.side == 0 for _, result in watch.results for update in result.updates)
        assert "side" not in folder.rows_file.read_text()
    notes = method_table([Row.from_json(row) for row in rows_of(folder)]).notes
    assert any(f"clipped to C = 0.001 at first and {wanted[-1]:.3g} at last" in note for note in notes)
    assert any(f"were clipped to {wanted[-1]:.3g}" in note for note in watch.notes)


@pytest.mark.parametrize(("noise", "sigma"), [(1.0, 5.0), (2.0, 2.0), (0.7, 0.36)])
def test_change_and_count_are_together_one_gaussian_of_z(noise: float, sigma: float) -> None:
    """By the identity, and by an accountant of loss distributions that composes the two by themselves."""
    privacy = Privacy("site", noise=noise, count_noise=sigma, quantile=0.5, noise_at="coordinator")
    apart = of_change(privacy, 100)
    assert apart**-2 + (2 * sigma) ** -2 == pytest.approx(noise**-2)
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_accounting.GaussianDpEvent(apart), 3)
    accountant.compose(dp_accounting.GaussianDpEvent(sigma / 0.5), 3)  # a site moves the count by ½
    assert epsilon(privacy, 3) == pytest.approx(accountant.get_epsilon(1e-5), rel=0.01)


def test_the_noise_of_the_count_by_itself() -> None:
    many, few = (Privacy("site", noise=z, quantile=0.5, noise_at="coordinator") for z in (1.0, 3.0))
    assert (of_count(many, 100), of_count(few, 8)) == (5.0, 3.0)
    assert of_change(few, 8) == pytest.approx(3 * math.sqrt(4 / 3))
    assert of_count(Privacy("site", noise=1.0, quantile=0.5, together=60), 8) == 3.0  # of those whose noise adds up
    assert of_change(Privacy("site", noise=1.0), 8) == 1.0
    assert deviation(Privacy("site", clip=0.5, noise=1.0, quantile=0.5, count_noise=5, together=4)) == pytest.approx(
        0.25 / math.sqrt(1 - 0.01)
    )


@pytest.mark.parametrize("gamma", [0.2, 0.5, 0.9])
def test_the_bound_comes_to_the_quantile_of_fixed_lengths(gamma: float) -> None:
    """A hundred sites of log-normal lengths, from a bound far below and one far above, with the paper's own η and σ_b."""
    lengths = np.exp(np.random.default_rng(1).normal(0.0, 1.0, 100))
    for start in (0.01, 100.0):
        privacy = Privacy("site", clip=start, noise=1.0, quantile=gamma, noise_at="coordinator")
        shares = []
        for round in range(500):
            inside = int((lengths <= privacy.clip).sum())
            privacy = as_now(privacy, next_bound(privacy, inside - 50.0, 100, 100))
            shares += [inside / 100] if round >= 400 else []
        assert np.mean(shares) == pytest.approx(gamma, abs=0.03)
        assert privacy.clip == pytest.approx(np.quantile(lengths, gamma), rel=0.3)


def test_the_noise_of_the_count_is_what_is_stated() -> None:
    """At the sites σ_b / √together on each, at the coordinator σ_b on the sum: deviations within four of their own errors."""
    count, change = 4000, {"w": torch.tensor([3.0, 4.0])}
    at_sites = Privacy("site", clip=5.0, noise=1.0, quantile=0.5, count_noise=6.0, together=9)
    found = np.array([side(change, at_sites) for _ in range(count)])
    assert float(found.mean()) == pytest.approx(0.5, abs=4 * 2.0 / math.sqrt(count))
    assert float(found.std()) == pytest.approx(2.0, abs=4 * 2.0 / math.sqrt(2 * count))
    there = Privacy("site", clip=1.0, noise=1.0, quantile=0.5, count_noise=6.0, noise_at="coordinator", clip_rate=0.2)
    assert side(change, there) == -0.5  # longer than 1
    sums = np.array([-math.log(next_bound(there, 7.0, 50, 50)) * 50 / 0.2 for _ in range(count)])
    assert float(sums.mean()) == pytest.approx(7.0, abs=4 * 6.0 / math.sqrt(count))
    assert float(sums.std()) == pytest.approx(6.0, abs=4 * 6.0 / math.sqrt(2 * count))
    noisy = Noise(deviation(at_sites)).leaves({"w": torch.zeros(10**5)}, {})["w"]
    wanted = (1 - 1 / 144) ** -0.5 * 5.0 / 3
    assert float(noisy.std()) == pytest.approx(wanted, abs=4 * wanted / math.sqrt(2 * 10**5))


@pytest.mark.parametrize("way", ["coordinator", *(pytest.param(way, marks=pytest.mark.slow) for way in ("sites", "masks"))])
def test_a_cut_off_run_goes_on_to_the_same_bits(way: str, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """C is part of the checkpoint."""
    if way == "masks":
        pytest.importorskip("cryptography")
    injected(monkeypatch)
    given = [*tiny_overrides, *MOVES, *WAYS[way], "federation.codec_up=fp32"]

    def stop(leg: str, done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    _, whole, _ = go([*given, "name=whole"])
    with pytest.raises(KeyboardInterrupt):
        go([*given, "name=cut"], Silent(stop))
    _, resumed, _ = go([*given, "name=cut"], resume=True)
    assert bounds_of(resumed) == bounds_of(whole)
    assert len(set(bounds_of(whole))) == 3
    assert same(adapter_of(resumed.path), adapter_of(whole.path))


@pytest.mark.parametrize("moves", [True, False])
def test_what_travels(moves: bool, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Down the bound, once there is one of its own; up a side of one width. Without a quantile neither."""
    down: list[dict[str, Any]] = []
    up: list[bytes] = []
    real = LocalTransport.exchange

    def exchange(self: LocalTransport, requests: Sequence[Request], deadline: float) -> list[Reply]:
        replies = real(self, requests, deadline)
        down.extend(header_of(r.payload) for r in requests)
        up.extend(r.payload for r in replies)
        return replies

    monkeypatch.setattr(LocalTransport, "exchange", exchange)
    _, folder, _ = go([*tiny_overrides, *MOVES, "federation.rounds=2", *([] if moves else ["privacy.quantile=0"])])
    headers = [header_of(payload) for payload in up]
    assert len({len(payload) for payload in up}) == 1
    assert ["clip" in header for header in down] == [False] * 3 + [moves] * 3
    assert ["side" in header for header in headers] == [moves] * 6
    if moves:
        assert [header["clip"] for header in down[3::3]] == bounds_of(folder)[1:]
        assert all(abs(float(header["side"])) != 0.5 for header in headers)  # noised where the sites add it


def test_sides_and_bounds_that_are_none_are_refused() -> None:
    at_sites, there = Privacy("site", quantile=0.5), Privacy("site", quantile=0.5, noise_at="coordinator")
    assert heard(told(-12.25), at_sites) == -12.25
    assert heard(told(0.5), there) == 0.5
    for text in (None, 0.5, "nan", "0.5", told(1e120), "+5.0e-01"):
        with pytest.raises(EnvelopeError, match="whether its change was within"):
            heard(text, at_sites)
    with pytest.raises(EnvelopeError, match="whether its change was within"):
        heard(told(0.75), there)
    assert read_bound(0) == 0
    assert read_bound(json.loads("0.1")) == 0.1
    for value in (-1.0, math.inf, 1e60, "1", True, None, 2):
        with pytest.raises(EnvelopeError, match="a clipping bound of"):
            read_bound(value)
    with pytest.raises(ValueError, match=r"the clipping bound became e\^-99\.5; a lower privacy\.clip_rate"):
        next_bound(Privacy("site", quantile=0.5, clip_rate=199.0, noise=1.0), 0.5, 1, 1)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (["privacy.unit=row"], "a row's gradient has a fixed one"),
        (["privacy.unit=none", "privacy.noise=0"], "privacy.quantile 'site'"),
        (["privacy.quantile=1"], "would grow without end"),
        (["privacy.count_noise=0.05"], "set it above half of that, or 0"),
        (["privacy.quantile=0", "privacy.count_noise=1"], "of the count that privacy.quantile asks for"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: list[str], text: str, tiny_overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=text):
        load_recipe(None, [*tiny_overrides, *MOVES, *wrong])
