"""Masked sums in few bits: exact in the integers, uniform alone, within their error, as narrow as they say, and resumed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masks import MASKS, begun, dropping
from test_run import Silent, adapter_of, go, rows_of, same

pytest.importorskip("cryptography", reason="the extra fedkeel[privacy] is not installed")

from fedkeel.exchange.codecs import EnvelopeError, header_of, make_codec, open_envelope, seal
from fedkeel.exchange.masks import MaskError, stream
from fedkeel.exchange.messages import about, pack, pack_global, shapes_of, unpack_global
from fedkeel.exchange.summands import Form, Narrow, first_reach, spread, summand
from fedkeel.federation.kept import Kept
from fedkeel.federation.local import LocalTransport
from fedkeel.federation.masked import run_masked_round
from fedkeel.federation.masking import KINDS, masks_of, prepare
from fedkeel.federation.server import Roster, run_round
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Federation, Privacy
from fedkeel.recipe.settings import ConfigError
from fedkeel.rng import derive
from fedkeel.runs.traffic import payload_bytes
from fedkeel.types import Adapter, Global, Lora, Reply, Request

INT8 = [*MASKS, "federation.codec_up=int8"]


def reach(tensors: Mapping[str, torch.Tensor], r: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: torch.full((min(math.prod(t.shape[:-1]), t.shape[-1]),), r) for name, t in tensors.items()}


@settings(max_examples=60, deadline=None)
@given(st.integers(5, 12), st.integers(1, 70), st.integers(0, 3), st.randoms())
def test_numbers_lie_bit_by_bit(bits: int, count: int, beside: int, random: Any) -> None:
    """Against one large whole number, Σ q_i 2^(m i); what is above m bits is left out."""
    whole = np.array([random.getrandbits(32) for _ in range(count + beside)], np.uint32)
    form = Form(count, bits, beside)
    sent = form.packed(whole)
    large = sum((int(q) % 2**bits) << (bits * i) for i, q in enumerate(whole[:count]))
    assert bytes(sent["sum"].tolist()) == large.to_bytes((count * bits + 7) // 8, "little")
    back = form.unpacked(sent)
    assert back[:count].tolist() == [int(q) % 2**bits for q in whole[:count]]
    assert back[count:].tolist() == whole[count:].tolist()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in sent.items()} == form.wire()


def test_blocks_meet_and_bits_after_the_last_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import fedkeel.exchange.summands as summands

    whole = np.arange(1003, dtype=np.uint32)
    once = Form(1003, 11, 0).packed(whole)["sum"]
    monkeypatch.setattr(summands, "BLOCK", 64)
    assert torch.equal(Form(1003, 11, 0).packed(whole)["sum"], once)
    assert Form(1003, 11, 0).unpacked({"sum": once, "beside": torch.zeros(0, dtype=torch.int32)}).tolist() == whole.tolist()
    once[-1] |= 128
    with pytest.raises(EnvelopeError, match="bits set after its last number"):
        Form(1003, 11, 0).unpacked({"sum": once, "beside": torch.zeros(0, dtype=torch.int32)})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sites", [1, 2, 8, 10, 11, 100, 1000])
def test_no_sum_can_wrap_and_the_widths(bits: int, sites: int) -> None:
    adds = Narrow(sites, bits, {})
    assert sites * adds.steps < 2**adds.width
    assert adds.steps >= 3
    wanted = {4: {11: 6, 100: 9, 1000: 12}, 8: {1000: 12}}[bits].get(sites, 5 * bits // 4)
    assert adds.width == wanted


@pytest.mark.parametrize("bits", [4, 8])
def test_a_sum_behind_masks_is_that_of_the_integers(bits: int) -> None:
    """Eight sites, the highest numbers there are among them; the mean is that of what each decodes by itself."""
    names = [f"s{n}" for n in range(8)]
    kept, told = begun(names, 5)
    changes = {
        name: {"b": torch.randn(30, 4, generator=torch.Generator().manual_seed(n)), "a": torch.full((7,), 9.0 if n else -9.0)}
        for n, name in enumerate(names)
    }
    shapes = shapes_of(changes["s0"])
    adds = Narrow(8, bits, reach(changes["s0"], 2.0))
    encoded = {name: adds.encode(changes[name], derive(1, name)) for name in names}
    top = [int(encoded[name]["a"][0]) for name in names]
    assert top == [0, *[adds.steps] * 7]
    form = adds.form(shapes, 1)
    masks = {name: masks_of(told[name], 0, name, kept[name]) for name in names}
    open_, hidden = [], []
    for n, name in enumerate(names):
        whole = adds.numbers(encoded[name], [n / 4])
        open_.append(whole[: form.change].astype(object))
        hidden.append(form.unpacked(form.packed(masks[name].over(whole))))
    total = np.sum(np.array(hidden, dtype=np.uint64), axis=0).astype(np.uint32)
    for name in names:  # the pairs' masks cancel; each site's own is taken off
        total = total - stream(bytes.fromhex(masks[name].secrets.seed), len(total))
    assert (total[: form.change] & np.uint32(2**adds.width - 1)).tolist() == list(sum(open_))
    change, beside, _ = adds.means(total, [derive(1, name) for name in names], shapes)
    assert beside == [7.0]
    alone = [adds.decode(encoded[name], shapes) for name in names]
    for name in shapes:
        assert torch.allclose(change[name], sum(one[name] for one in alone) / 8, atol=1e-6)


@pytest.mark.parametrize("bits", [5, 10])
def test_a_narrow_masked_change_alone_is_noise(bits: int) -> None:
    """Of a change of zeros, 200,000 numbers: χ² of the 2^m values, and of neighbours' differences, within five deviations."""
    kept, told = begun(["a", "b", "c"])
    count = 200_000
    form = Form(count, bits, 0)
    sent = form.packed(masks_of(told["a"], 0, "a", kept["a"]).over(np.zeros(count, np.uint32)))
    whole = form.unpacked({**sent, "beside": torch.zeros(0, dtype=torch.int32)})
    for numbers in (whole, (whole[1::2] - whole[::2]) & np.uint32(2**bits - 1)):
        counts, even = np.bincount(numbers, minlength=2**bits), len(numbers) / 2**bits
        assert len(counts) == 2**bits
        chi = float(((counts - even) ** 2 / even).sum())
        assert abs(chi - (2**bits - 1)) < 5 * (2 * (2**bits - 1)) ** 0.5


@pytest.mark.parametrize(("bits", "steps"), [(4, 3), (8, 127)])
def test_the_error_is_what_is_stated(bits: int, steps: int) -> None:
    """Of one number at any place of [−R, R]: at most s / 2, none in the mean, s² / 12 in variance; beyond R it saturates."""
    adds = Narrow(8, bits, {"w": torch.tensor([0.3])})
    assert adds.steps == steps
    s, count = 0.6 / steps, 40_000
    for value in (0.0, 0.01, -0.1234, 0.3, -0.3):
        got = adds.decode(adds.encode({"w": torch.full((count,), value)}, 7), {"w": (count,)})["w"].double() - value
        assert float(got.abs().max()) <= s / 2 * (1 + 1e-5)
        assert abs(float(got.mean())) < 4 * s / math.sqrt(12 * count)
        assert float(got.square().mean()) == pytest.approx(s * s / 12, rel=0.03)
    got = adds.decode(adds.encode({"w": torch.full((count,), 5.0)}, 7), {"w": (count,)})["w"]
    assert float((got - 0.3).abs().max()) <= s / 2 * (1 + 1e-5)


def test_the_reach_of_the_next_round_by_hand() -> None:
    """Rows along the longer axis; their root mean squares over the sites, held to 1/64 and 16 of the reach so far."""
    change = {
        "a": torch.tensor([[3.0, -3.0, 3.0], [0.0, 0.0, 0.0]]),
        "b": torch.tensor([[1.0, 400.0], [2.0, 400.0], [2.0, 400.0]]),
    }
    held = {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([1.0, 10.0])}
    adds = Narrow(2, 8, held)
    encoded = {k: adds.encode(change, k) for k in (1, 2)}
    total = adds.numbers(encoded[1], []) + adds.numbers(encoded[2], [])
    found = adds.means(total, [1, 2], shapes_of(change))[2]
    k = spread(adds.steps)
    assert k == pytest.approx(0.85 + 0.2 * math.log2(512))
    assert found["a"].tolist() == pytest.approx([3 * k, k / 64], rel=1e-5)
    assert found["b"].tolist() == pytest.approx([math.sqrt(3) * k, 160 * k], rel=1e-5)
    first = first_reach(adds, shapes_of(change), 0.03)
    assert {n: r.tolist() for n, r in first.items()} == {n: pytest.approx([0.01 * k] * 2) for n in "ab"}
    assert first_reach(summand("fp32", 2, {}), shapes_of(change), 0.03) == {}


def test_a_reach_that_is_none_is_refused() -> None:
    like = Adapter({"m": Lora(torch.ones(2, 3), torch.ones(4, 2), 1.0)})
    state = Global(1, like, reach=reach(like.tensors(), 0.5))
    assert {n: r.tolist() for n, r in unpack_global(pack_global("global", state), "global", like)[1].reach.items()} == {
        "m.a": [0.5, 0.5],
        "m.b": [0.5, 0.5],
    }
    assert "reach" not in header_of(pack_global("global", Global(1, like)))
    for wrong, said in (
        ({"m.a": torch.zeros(2)}, "not above 0"),
        ({"m.a": torch.ones(3)}, "where the codec sends"),
        ({"z": torch.ones(2)}, "no tensors of this adapter"),
    ):
        with pytest.raises(EnvelopeError, match=said):
            unpack_global(pack_global("global", Global(1, like, reach=wrong)), "global", like)
    with pytest.raises(MaskError, match=r"m\.a: the message tells no reach"):
        Narrow(2, 8, {}).encode(like.tensors(), 1)


class Sites:
    """Sites whose change is given, masked or through a codec."""

    def __init__(self, changes: Mapping[str, Mapping[str, torch.Tensor]], like: Adapter, codec: str) -> None:
        self.changes, self.like, self.codec = changes, like, codec
        self.kept = {name: Kept() for name in changes}

    def exchange(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
        return [Reply(r.site, self._answer(r.payload, r.site)) for r in requests]

    def _answer(self, payload: bytes, site: str) -> bytes:
        header, change, key = header_of(payload), self.changes[site], derive(1, "up", site, 0)
        if header["kind"] in KINDS:
            return prepare(header, self.like, site, self.kept[site])
        if "masked" in header:
            masks = masks_of(header["masked"], 0, site, self.kept[site])
            adds = summand(self.codec, len(masks.among), unpack_global(payload, "global", self.like)[1].reach)
            whole = masks.over(adds.numbers(adds.encode(change, key), []))
            return seal(about("masked", 0, self.like, site=site), adds.form(shapes_of(change), 0).packed(whole))
        told = {"site": site, "positions": 1, "stats": {"loss": 1.0}, "seconds": "00000000.000", "held": 0, "tasks": {}}
        return pack("update", 0, self.like, make_codec(self.codec).encode(change, key), self.codec, **told)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_eight_sites_send_at_most_1_3_times_the_codecs_own_bytes(codec: str) -> None:
    """Of all messages of a round, keys and shares too, for an adapter of a small encoder's size; and the mean is near."""
    lora = {f"layer.{n}": Lora(torch.zeros(8, 2000), torch.zeros(2000, 8), 2.0) for n in range(10)}
    like = Adapter(lora)
    draw = torch.Generator().manual_seed(1)
    shapes = shapes_of(like.tensors())
    changes = {
        f"s{n}": {name: 0.01 * torch.randn(shape, generator=draw).clamp(-2, 2) for name, shape in shapes.items()}
        for n in range(8)
    }
    up, error = {}, {}
    exact = {name: sum(c[name] for c in changes.values()) / 8 for name in shapes}
    for masks in (True, False):
        federation = Federation(weighting="uniform", codec_up=codec)
        roster = Roster(list(changes), federation, 1, privacy=Privacy(masks=masks), moves=0.03)
        result = (run_masked_round if masks else run_round)(Global(0, like), Sites(changes, like, codec), roster)
        up[masks] = sum(result.bytes_up.values())
        got = result.state.adapter.tensors()
        off = math.sqrt(sum(float((got[n] - exact[n]).square().sum()) for n in shapes))
        error[masks] = off / math.sqrt(sum(float(t.square().sum()) for t in exact.values()))
    assert up[True] <= 1.3 * up[False]
    assert up[True] > 1.2 * up[False]  # measured, not left out
    assert error[True] < (3 if codec == "int4" else 2) * error[False]


# ------------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "gone", ["global", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("", "keys", "shares", "unmask"))]
)
def test_a_site_that_goes_is_left_out_of_an_exact_sum(
    gone: str, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any point: what comes out of the masks is the sum of what the others put behind them, in the integers."""
    put: list[np.ndarray] = []
    sums: list[tuple[np.ndarray, int]] = []
    numbers, means = Narrow.numbers, Narrow.means

    def heard(self: Narrow, encoded: Any, beside: Any) -> np.ndarray:
        put.append(numbers(self, encoded, beside))
        return put[-1]

    def summed(self: Narrow, total: np.ndarray, keys: Any, shapes: Any) -> Any:
        size = sum(map(math.prod, shapes.values()))
        sums.append((total[:size] & np.uint32(2**self.width - 1), len(keys)))
        return means(self, total, keys, shapes)

    monkeypatch.setattr(Narrow, "numbers", heard)
    monkeypatch.setattr(Narrow, "means", summed)
    dropping(monkeypatch, lambda kind, site, round: kind == gone and site == "ward-1")
    go([*tiny_overrides, *INT8, "federation.rounds=1", "federation.quorum=0.6"])
    ((total, count),) = sums
    there = put if gone in ("", "unmask") else [put[0], put[-1]]  # where it answers nothing more, it put something all the same
    assert (len(put), count) == (2 if gone in ("keys", "shares") else 3, len(there))
    assert total.tolist() == np.sum([whole[: len(total)] for whole in there], axis=0, dtype=np.int64).tolist()


@pytest.mark.slow
def test_a_cut_off_run_goes_on_to_the_same_bits(tiny_overrides: list[str]) -> None:
    """The reach of the rows is part of the checkpoint, what was rounded off of what sites keep."""

    def stop(leg: str, done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    _, whole, _ = go([*tiny_overrides, *INT8, "name=whole"])
    with pytest.raises(KeyboardInterrupt):
        go([*tiny_overrides, *INT8, "name=cut"], Silent(stop))
    _, resumed, _ = go([*tiny_overrides, *INT8, "name=cut"], resume=True)
    assert same(adapter_of(resumed.path), adapter_of(whole.path))


def test_a_narrow_federation_learns_what_a_wide_one_does(tiny_overrides: list[str]) -> None:
    """Its adapter stays near that of the same sites without masks and codec, and its score is the same within what two rows of
    six make."""
    ends, scores = {}, {}
    for name, more in (
        ("exact", ["privacy.masks=false"]),
        ("masked", ["federation.codec_up=int8"]),
    ):
        _, folder, _ = go([*tiny_overrides, *MASKS, f"name={name}", *more])
        ends[name] = torch.cat([t.flatten() for _, t in sorted(adapter_of(folder.path).items())])
        of_test = [r for r in rows_of(folder) if r["name"] == "score" and r["split"] == "test" and not r["task"]]
        scores[name] = of_test[-1]["value"]
        if name == "masked":
            told = {r["name"] for r in rows_of(folder) if r["method"] == "federated" and r["site"]}
            assert told == {"positions", "bytes_up", "bytes_down", "own_score"}
    moved = float(ends["exact"].norm())
    assert float((ends["masked"] - ends["exact"]).norm()) < 0.1 * moved
    assert abs(scores["masked"] - scores["exact"]) <= 2 / 6


def test_a_site_answers_in_the_width_that_the_sum_has(tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Up go packed numbers, rows' sizes and the side of the bound, and nothing else."""
    sent: list[dict[str, torch.Tensor]] = []
    sizes: list[int] = []
    real = LocalTransport.exchange

    def exchange(self: LocalTransport, requests: Sequence[Request], deadline: float) -> list[Reply]:
        replies = real(self, requests, deadline)
        of_change = [r.payload for r in replies if header_of(r.payload)["kind"] == "masked"]
        sent.extend(open_envelope(payload)[1] for payload in of_change)
        sizes.extend(map(len, of_change))
        return replies

    monkeypatch.setattr(LocalTransport, "exchange", exchange)
    private = ["privacy.unit=site", "privacy.noise=1", "privacy.clip=0.1", "privacy.quantile=0.5", "federation.rounds=1"]
    _, folder, model = go([*tiny_overrides, *INT8, *private])
    assert model.initial is not None
    tensors = model.initial.tensors()
    numbers = sum(t.numel() for t in tensors.values())
    rows = sum(min(t.shape) for t in tensors.values())
    for one in sent:
        assert {n: (t.dtype, len(t)) for n, t in one.items()} == {
            "sum": (torch.uint8, (10 * numbers + 7) // 8),
            "beside": (torch.int32, rows + 1),
        }
    assert [r["value"] for r in rows_of(folder) if r["name"] == "clip"] == [0.1]
    recipe = load_recipe(None, [*tiny_overrides, *INT8, *private])
    planned = payload_bytes(shapes_of(tensors), recipe, 3)[1]
    assert all(abs(size - planned) < 20 for size in sizes)


def test_a_stage_begins_with_the_reach_of_its_rate(tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three sites and two steps at 0.01; in between it is what the sites' changes made it."""
    told: list[torch.Tensor] = []
    real = LocalTransport.exchange

    def exchange(self: LocalTransport, requests: Sequence[Request], deadline: float) -> list[Reply]:
        if header_of(requests[0].payload)["kind"] == "global":
            sent = open_envelope(requests[0].payload)[1]
            told.append(torch.cat([t for name, t in sorted(sent.items()) if name.startswith("reach/")]))
        return real(self, requests, deadline)

    monkeypatch.setattr(LocalTransport, "exchange", exchange)
    stream = ["stream.stages=colour,echo", "federation.rounds=2", "evaluation.validation_rows=0"]
    go([*tiny_overrides, *INT8, *stream])
    first = (0.85 + 0.2 * math.log2(1023 // 3 + 1)) * 0.02 / 3
    assert [bool((r - first).abs().max() < 1e-8) for r in told] == [True, False, True, False]


def test_noise_that_is_whole_in_the_sum_alone_is_not_rounded_before() -> None:
    private = [*INT8, "privacy.unit=site", "privacy.noise=1"]
    load_recipe(None, private)
    with pytest.raises(
        ConfigError, match=r"together = 3: noise hides a site in a sum .*codec_up = 'int8' rounds behind the bound"
    ):
        load_recipe(None, [*private, "privacy.together=3"])
