"""Secure aggregation: shares, masks that cancel, a masked change that is noise, exact sums, and sites that go at any point."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import quickly
from test_run import Silent, adapter_of, go, rows_of, same

pytest.importorskip("cryptography", reason="the extra fedkeel[privacy] is not installed")

from fedkeel.engines.store import Store
from fedkeel.exchange.codecs import header_of, open_envelope, seal
from fedkeel.exchange.masks import (
    PRIME,
    STEP,
    MaskError,
    agreed,
    hidden,
    join,
    mean_of,
    new_key,
    opened,
    pair_masks,
    public_of,
    split,
    stream,
    whole_numbers,
)
from fedkeel.federation.kept import Kept
from fedkeel.federation.local import LocalTransport
from fedkeel.federation.masked import needed
from fedkeel.federation.masking import masks_of, prepare
from fedkeel.federation.server import FederationError
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.settings import ConfigError
from fedkeel.types import Adapter, Reply, Request

MASKS = ["privacy.masks=true", "federation.weighting=uniform", "evaluation.baselines=[]"]


# -------------------------------------------------------------------------------------------------------------------- parts


@given(st.binary(min_size=32, max_size=32), st.integers(1, 6), st.integers(0, 4))
def test_any_threshold_of_shares_give_the_secret_back(secret: bytes, threshold: int, more: int) -> None:
    shares = split(secret, threshold, threshold + more)
    for chosen in combinations(range(1, threshold + more + 1), threshold):
        assert join({n: shares[n - 1] for n in chosen}) == secret


def test_a_share_too_few_says_nothing() -> None:
    """Two shares of three fit any secret: with a third value made for it, they give it back."""
    secret, other = bytes(range(32)), bytes(31) + b"\x07"
    first, second, _ = split(secret, 3, 3)
    known = {1: int.from_bytes(first, "big"), 2: int.from_bytes(second, "big")}
    # the parabola through (0, other), (1, s1), (2, s2) at 3, by Lagrange
    third = (int.from_bytes(other, "big") - 3 * known[1] + 3 * known[2]) % PRIME
    assert join({1: first, 2: second, 3: third.to_bytes(66, "big")}) == other


def test_shares_that_are_not_of_one_secret_are_told() -> None:
    one, other = split(bytes(32), 2, 3), split(bytes([1] * 32), 2, 3)
    with pytest.raises(MaskError, match="not of one secret"):
        join({1: one[0], 2: other[1]})
    with pytest.raises(MaskError, match="cannot be shared among 2 so that 3"):
        split(bytes(32), 3, 2)


def test_both_ends_agree_and_nobody_else_or_for_anything_else() -> None:
    (a, a_public), (b, b_public), (c, c_public) = new_key(), new_key(), new_key()
    assert agreed(a, b_public, "x") == agreed(b, a_public, "x")
    assert len({agreed(a, b_public, "x"), agreed(a, b_public, "y"), agreed(a, c_public, "x"), agreed(c, b_public, "x")}) == 4
    assert public_of(a) == a_public
    sealed = hidden(agreed(a, b_public, "x"), b"a share", "a to b")
    assert opened(agreed(b, a_public, "x"), sealed, "a to b") == b"a share"
    for key, text, about in (
        (agreed(c, a_public, "x"), sealed, "a to b"),
        (agreed(b, a_public, "x"), sealed, "a to c"),
        (agreed(b, a_public, "x"), sealed[:-1] + bytes([sealed[-1] ^ 1]), "a to b"),
        (agreed(b, a_public, "x"), b"", "a to b"),
    ):
        with pytest.raises(MaskError, match="altered on their way, or are not for this site"):
            opened(key, text, about)
    with pytest.raises(MaskError, match="none of X25519"):
        agreed(a, bytes(32), "x")


def test_the_stream_is_chacha20s() -> None:
    """RFC 8439, appendix A.1, test vector 1: key, nonce and counter of zeros."""
    assert stream(bytes(32), 4).tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_pair_masks_cancel_over_all_sites() -> None:
    pairs = {name: new_key() for name in ("a", "b", "c", "d")}
    public = {name: pair[1] for name, pair in pairs.items()}
    sums = [pair_masks(pairs[name][0], public, name, "mask 3", 1000) for name in pairs]
    assert not np.sum(sums, axis=0, dtype=np.uint32).any()
    assert all(mask.any() for mask in sums)


def test_a_masked_change_alone_is_noise() -> None:
    """Of a change of zeros, 400,000 bytes: each value as often as chance would have it, no bit with its neighbour's."""
    kept, told = begun(["a", "b", "c"])
    numbers = masked({"w": torch.zeros(100_000)}, told["a"], "a", kept["a"])
    counts = np.bincount(numbers.view(np.uint8), minlength=256)
    chi = float(((counts - 400_000 / 256) ** 2 / (400_000 / 256)).sum())
    assert abs(chi - 255) < 5 * (2 * 255) ** 0.5
    bits = np.unpackbits(numbers.view(np.uint8)).astype(float) - 0.5
    assert abs(float((bits[1:] * bits[:-1]).mean())) < 5 * 0.25 / len(bits) ** 0.5


def test_whole_numbers_by_hand_and_what_would_run_over() -> None:
    tensors = {"b": torch.tensor([[STEP, -STEP]]), "a": torch.tensor([1.0, 1.4 * STEP])}
    assert whole_numbers(tensors, 3).tolist() == [2**22, 1, 1, 2**32 - 1]
    shapes = {"b": (1, 2), "a": (2,)}
    back, beside = mean_of(np.array([2**22, 3, 2**32 - 3, 6, 2**32 - 2**21], np.uint32), 3, shapes)
    assert beside == [-0.5]
    assert whole_numbers(tensors, 3, [-0.5]).tolist()[-1] == 2**32 - 2**21
    assert {name: t.tolist() for name, t in back.items()} == {"a": [pytest.approx(1 / 3), STEP], "b": [[-STEP, 2 * STEP]]}
    whole_numbers({"a": torch.tensor([170.0])}, 3)
    with pytest.raises(MaskError, match=r"a change of 171 in one number: 3 of such run over .* \(at most 171\)"):
        whole_numbers({"a": torch.tensor([171.0])}, 3)
    with pytest.raises(MaskError, match="a change of nan"):
        whole_numbers({"a": torch.tensor([float("nan")])}, 1)


@pytest.mark.parametrize(
    ("sites", "share", "want"), [(3, 0.66, 2), (3, 0.67, 3), (4, 0.5, 3), (2, 0.5, 2), (1, 0.5, 1), (16, 0.66, 11)]
)
def test_sites_that_must_stay(sites: int, share: float, want: int) -> None:
    assert needed(sites, share) == want


# ---------------------------------------------------------------------------------------------------------------- one site


def like() -> Adapter:
    return Adapter({}, {"w": torch.zeros(3)})


def question(kind: str, **more: Any) -> dict[str, Any]:
    from fedkeel.exchange.messages import layout

    return {"kind": kind, "round": 0, "layout": layout(like()), **more}


def begun(names: Sequence[str], threshold: int = 2) -> tuple[dict[str, Kept], dict[str, dict[str, Any]]]:
    """(what each site keeps, what the message down tells it) after keys and shares."""
    kept = {name: Kept() for name in names}
    keys = {name: header_of(prepare(question("keys"), like(), name, kept[name]))["keys"] for name in names}
    asked = question("shares", keys=keys, threshold=threshold)
    shares = {name: header_of(prepare(asked, like(), name, kept[name]))["shares"] for name in names}
    return kept, {name: {"among": list(names), "shares": {o: shares[o][name] for o in names}} for name in names}


def masked(change: dict[str, torch.Tensor], told: dict[str, Any], site: str, kept: Kept) -> np.ndarray:
    """As `client.answer` does, in round 0 at 32 bits."""
    masks = masks_of(told, 0, site, kept)
    return masks.over(whole_numbers(change, len(masks.among)))


def test_a_site_tells_of_each_other_one_of_two_secrets_and_once() -> None:
    kept, told = begun(["a", "b", "c"])
    for name in kept:
        masked({"w": torch.zeros(3)}, told[name], name, kept[name])
    answer = header_of(prepare(question("unmask", answered=["a", "b"]), like(), "a", kept["a"]))
    assert (sorted(answer["seeds"]), sorted(answer["keys"])) == (["a", "b"], ["c"])
    with pytest.raises(MaskError, match="site a: it has no keys of round 1"):
        prepare(question("unmask", answered=["a", "b", "c"]), like(), "a", kept["a"])
    for answered in (["b"], ["a", "b", "z"], "ab", None):
        with pytest.raises(MaskError, match=r"site b: masks are to be taken off .* 2 or more of these must have answered"):
            prepare(question("unmask", answered=answered), like(), "b", kept["b"])


def test_a_site_refuses_what_would_tell_its_change() -> None:
    kept, told = begun(["a", "b", "c"])
    change = {"w": torch.ones(3)}
    for wrong, said in (
        ({"among": ["a"], "shares": {"a": ""}}, "masks among ['a'] are asked for"),
        ({"among": ["b", "c"], "shares": {}}, "masks among ['b', 'c'] are asked for"),
        ({"among": ["a", "z"], "shares": {}}, "masks among ['a', 'z'] are asked for"),
        ({}, "masks among None are asked for"),
        ({"among": ["a", "b"], "shares": {"a": "00"}}, "shares of ['a'] came"),
    ):
        with pytest.raises(MaskError) as caught:
            masked(change, wrong, "a", kept["a"])
        assert said in str(caught.value)
    masked(change, told["a"], "a", kept["a"])
    less = {"among": ["a", "b"], "shares": {o: told["a"]["shares"][o] for o in ("a", "b")}}
    for again in (less, told["a"]):
        with pytest.raises(MaskError, match="site a: it was asked for its change of round 1 before"):
            masked(change, again, "a", kept["a"])
    public = {name: [32 * "00", 32 * "00"] for name in kept}
    with pytest.raises(MaskError, match="site b: it gave shares of round 1 before"):
        prepare(question("shares", keys=public, threshold=2), like(), "b", kept["b"])
    for threshold in (0, 1, 4, True, None):
        with pytest.raises(MaskError, match="more than half must be needed"):
            begun(["a", "b", "c"], threshold)  # type: ignore[arg-type]
    with pytest.raises(MaskError, match="asked for by another model, or of round True"):
        prepare({**question("keys"), "round": True}, like(), "a", Kept())


# ------------------------------------------------------------------------------------------------------------------- runs


def dropping(monkeypatch: pytest.MonkeyPatch, when: Callable[[str, str, int], bool]) -> list[tuple[str, str]]:
    """Sites that give no answer to (kind of message, site, round); what was asked, in order."""
    real, asked = LocalTransport.exchange, []

    def exchange(self: LocalTransport, requests: Sequence[Request], deadline: float) -> list[Reply]:
        kinds = {r.site: (header_of(r.payload)["kind"], header_of(r.payload)["round"]) for r in requests}
        asked.extend((kind, site) for site, (kind, _) in kinds.items())
        replies = real(self, requests, deadline)
        return [
            Reply(r.site, error="the line is dead") if when(kinds[r.site][0], r.site, kinds[r.site][1]) else r for r in replies
        ]

    monkeypatch.setattr(LocalTransport, "exchange", exchange)
    return asked


@pytest.fixture
def overrides(tiny_overrides: list[str]) -> list[str]:
    return [*tiny_overrides, *MASKS]


def test_a_masked_run_is_the_plain_one_in_steps_of_the_grid(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit it is itself, whatever the masks. Of the plain mean it differs by rounding to 2⁻²² in each round."""
    sent: dict[str, list[np.ndarray]] = {"one": [], "two": []}
    real = LocalTransport.exchange
    name = "one"

    def exchange(self: LocalTransport, requests: Sequence[Request], deadline: float) -> list[Reply]:
        replies = real(self, requests, deadline)
        sent[name].extend(
            open_envelope(r.payload)[1]["sum"].numpy() for r in replies if header_of(r.payload)["kind"] == "masked"
        )
        return replies

    monkeypatch.setattr(LocalTransport, "exchange", exchange)
    _, first, _ = go([*overrides, "name=one"])
    name = "two"
    _, second, _ = go([*overrides, "name=two"])
    assert same(adapter_of(first.path), adapter_of(second.path))
    assert len(sent["one"]) == len(sent["two"]) == 9
    assert all((a == b).mean() < 0.01 for a, b in zip(sent["one"], sent["two"], strict=True))  # other masks each time
    _, plain, _ = go([*overrides, "name=plain", "privacy.masks=false"])
    mine, theirs = adapter_of(first.path), adapter_of(plain.path)
    assert max(float((mine[n] - theirs[n]).abs().max()) for n in mine) < 1e-4
    up = [sum(r["value"] for r in rows_of(f) if r["name"] == "bytes_up") for f in (first, plain)]
    assert up[0] < 1.1 * up[1]
    told = {r["name"] for r in rows_of(first) if r["method"] == "federated" and r["site"]}
    assert told == {"positions", "bytes_up", "bytes_down", "own_score"}  # no loss, no length, no seconds of one site
    assert all(r["value"] == 1 for r in rows_of(first) if r["name"] == "positions")


@pytest.mark.parametrize("gone", quickly(("keys", "unmask"), ["keys", "shares", "global", "unmask"]))
def test_a_site_that_goes_at_any_point_is_left_out(overrides: list[str], gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum is that of the others: of all three where the one that goes has sent its change already."""
    rounds = ["federation.rounds=1", "federation.quorum=0.6"]
    dropping(monkeypatch, lambda kind, site, round: kind == gone and site == "ward-1")
    watch = Silent()
    _, folder, _ = go([*overrides, *rounds, "name=less"], watch)
    assert any("site ward-1 failed and was left out" in note and "the line is dead" in note for note in watch.notes)
    monkeypatch.undo()
    wards = {"ward-0", "ward-2"} if gone != "unmask" else {"ward-0", "ward-1", "ward-2"}
    assert {r["site"] for r in rows_of(folder) if r["name"] == "positions"} == wards
    if gone != "unmask":
        dropping(monkeypatch, lambda kind, site, round: site == "ward-1")
    _, plain, _ = go([*overrides, *rounds, "name=plain", "privacy.masks=false"])
    mine, theirs = adapter_of(folder.path), adapter_of(plain.path)
    assert max(float((mine[n] - theirs[n]).abs().max()) for n in mine) < 1e-6


def test_a_key_that_nobody_can_agree_with_is_its_sites_failure(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A point of low order, which every other site would stumble over."""
    real = LocalTransport.exchange

    def exchange(self: LocalTransport, requests: Sequence[Request], deadline: float) -> list[Reply]:
        replies = real(self, requests, deadline)
        for n, reply in enumerate(replies):
            header = header_of(reply.payload)
            if (header["kind"], reply.site) == ("keys", "ward-1"):
                replies[n] = Reply(reply.site, seal({**header, "keys": [header["keys"][0], 64 * "0"]}, {}))
        return list(replies)

    monkeypatch.setattr(LocalTransport, "exchange", exchange)
    watch = Silent()
    _, folder, _ = go([*overrides, "federation.rounds=1", "federation.quorum=0.6"], watch)
    assert {r["site"] for r in rows_of(folder) if r["name"] == "positions"} == {"ward-0", "ward-2"}
    assert any("site ward-1 failed and was left out" in note and "a key that is none of X25519" in note for note in watch.notes)


def test_one_more_that_goes_is_too_many(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dropping(monkeypatch, lambda kind, site, round: kind == "unmask" and site != "ward-0")
    with pytest.raises(FederationError) as caught:
        go([*overrides, "federation.quorum=0.3"])
    told = "round 1 stopped: 1 of 3 sites helped to take the masks off; secure aggregation needs 2, and federation.quorum = 0.3"
    assert told in str(caught.value)
    assert "--- ward-1: the line is dead" in str(caught.value)


@pytest.mark.slow
def test_a_cut_off_round_begins_anew_with_other_keys(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole, _ = go([*overrides, "name=whole"])
    asked = dropping(monkeypatch, lambda kind, site, round: False)
    real = LocalTransport.exchange

    def stop(self: LocalTransport, requests: Sequence[Request], deadline: float) -> list[Reply]:
        header = header_of(requests[0].payload)
        if header["kind"] == "unmask" and header["round"] == 1:
            raise KeyboardInterrupt
        return real(self, requests, deadline)

    monkeypatch.setattr(LocalTransport, "exchange", stop)
    with pytest.raises(KeyboardInterrupt):
        go(overrides)
    monkeypatch.setattr(LocalTransport, "exchange", real)
    resumed = go(overrides, resume=True)[1]
    assert same(adapter_of(resumed.path), adapter_of(whole.path))
    assert Counter(kind for kind, _ in asked) == {"keys": 12, "shares": 12, "global": 12, "unmask": 9}


@pytest.mark.parametrize("codec", ["fp32", pytest.param("int8", marks=pytest.mark.slow)])
def test_over_a_grid_as_in_this_process(
    codec: str, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at the sites no secret of a round outlasts it."""
    pytest.importorskip("flwr", reason="the extra fedkeel[flower] is not installed")
    from test_engines_agree import over_grid

    given = [*overrides, f"federation.codec_up={codec}"]
    _, here, _ = go(given)
    real, wrote = Store.write_masks, Counter[bool]()

    def write_masks(self: Store, secrets: bytes) -> None:
        real(self, secrets)
        wrote[bool(secrets)] += 1

    monkeypatch.setattr(Store, "write_masks", write_masks)
    there = over_grid([*given, "name=there"], tmp_path)
    assert wrote == {
        True: 3 * 3 * 3,
        False: 3 * 3,
    }  # keys, shares, change; and the shares of all, of three sites in three rounds
    assert not list(tmp_path.rglob("masks.json"))
    assert same(adapter_of(here.path), adapter_of(there.path))


def test_noise_of_the_sites_hides_in_the_sum(overrides: list[str]) -> None:
    """With masks the noise of three sites together is that of the sum: clip and noise stand before the mask."""
    private = ["privacy.unit=site", "privacy.clip=1", "privacy.noise=0.5", "privacy.together=3", "federation.rounds=1"]
    _, folder, _ = go([*overrides, *private])
    _, plain, _ = go([*overrides, "name=plain", "federation.rounds=1"])
    mine, theirs = adapter_of(folder.path), adapter_of(plain.path)
    difference = torch.cat([(mine[n] - theirs[n]).flatten() for n in mine]).double()
    # of the mean of three, σ is z · C / 3, wherever the rounds change anything
    assert float(difference.std()) == pytest.approx(0.5 / 3, rel=0.1)


def test_a_site_gives_no_keys_where_its_recipe_asks_for_none(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedkeel.federation.client import Site, SiteError, answer
    from fedkeel.model.lora import Model

    recipe = load_recipe(None, [*tiny_overrides])
    model = Model(recipe.model, recipe.lora, 1)
    with pytest.raises(SiteError, match=r"keys for masks are asked for, and this leg has privacy\.masks = false"):
        answer(seal(question("keys"), {}), model, Site("a", [[]], 1, recipe), Kept())


@pytest.mark.parametrize(
    "key",
    [
        "federation.rule=svd", "federation.rule=alternate", "federation.weighting=positions", "federation.codec_up=bf16",
        "federation.codec_up=topk=0.1+int8",
        "federation.max_update_norm=3", "structure.hold=true", "evidence.anchor=1", "evidence.prototype=0.1",
        "evidence.serve=1", "evidence.serve_from=[0.5, 1.0]", "model.head=analytic", 'evaluation.baselines=["analytic"]',
        "distill.weight=1",
    ],
)  # fmt: skip
def test_what_masks_cannot_go_with_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.masks shows the coordinator the sum"):
        load_recipe(None, ["privacy.masks=true", "federation.weighting=uniform", "structure.branch=0.1", key])


def test_a_missing_library_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import fedkeel.recipe.checks as checks

    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"privacy\.masks goes through `cryptography`: pip install 'fedkeel\[privacy\]'"):
        load_recipe(None, ["privacy.masks=true", "federation.weighting=uniform"])


def test_a_sites_disk_holds_secrets_for_a_round_and_gives_them_to_no_older_state(tmp_path: Path) -> None:
    """Between messages they lie beside what the site keeps; told once, they are gone, whatever state is named."""
    store, kept = Store(tmp_path, "a"), Kept(memory={"residual": {"w": torch.ones(3)}})
    _, told = begun(["a", "b"])
    prepare(question("keys"), like(), "a", kept)
    assert set(kept.tensors()) == {"residual/w"}
    store.write_masks(kept.masks)
    older = store.write("1", kept.tensors())
    again = Kept(masks=store.read_masks()).restored(store.read(older))
    assert (again.masks, set(again.memory)) == (kept.masks, {"residual"})
    files = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    secrets = json.loads(files.pop("masks.json"))
    assert files.keys() == {"kept-1.fkl"}
    assert not any(secrets[name].encode() in content for name in ("channel", "mask", "seed") for content in files.values())
    store.write_masks(b"")
    assert not list(tmp_path.rglob("masks.json"))
    with pytest.raises(MaskError, match="site a: it has no keys of round 1"):
        masked({"w": torch.ones(3)}, told["a"], "a", Kept(masks=store.read_masks()).restored(store.read(older)))
