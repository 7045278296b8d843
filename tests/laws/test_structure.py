"""Laws of every structure, on a toy model whose maps are small enough for dense twins."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from builders import numbers
from shapes import quickly
from torch import Tensor, nn

from fedkeel import tables
from fedkeel.method.structure.draw import SHARED, Draw
from fedkeel.method.structure.inject import Injection, strength
from fedkeel.method.structure.layers import depth_chance
from fedkeel.method.structure.weights import row_norms
from fedkeel.model.places import Branch, Place, Places, StructureError
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Structure
from fedkeel.rng import counter_normal, counter_uniform, derive

WIDTH, INNER, RANK, SCALE, UNITS, BLOCKS = 24, 150, 3, 2.0, 4, 4
AMOUNT = 0.4
STRUCTURES = [name for name, entry in tables.STRUCTURES.items() if not entry.learns]
ALL = dict.fromkeys(STRUCTURES, AMOUNT) | {"skip": 0.9, "adversary": 0.5}
every = pytest.mark.parametrize("name", STRUCTURES)
PER_ROW = ("heads", "channels", "layers", "rank", "weights")


class Branched(nn.Module):
    """y = base(x) + SCALE · b(a(x)), as PEFT puts it in place of a linear map."""

    def __init__(self, d_in: int, d_out: int, seed: int) -> None:
        super().__init__()
        self.in_features = d_in
        self.base, self.a, self.b = (
            nn.Linear(d_in, d_out),
            nn.Linear(d_in, RANK, bias=False),
            nn.Linear(RANK, d_out, bias=False),
        )
        self.base.requires_grad_(False)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(numbers(10 * seed + i, *parameter.shape) / math.sqrt(d_in))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + SCALE * self.b(self.a(x))


class Block(nn.Module):
    """A residual block of an `attention output map` and an up and a down projection, which are the toy's own."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = parts  # a tuple: they are registered once

    def forward(self, x: Tensor) -> Tensor:
        out, up, down = self.parts
        x = x + out(x)
        return x + down(up(x).tanh())


class Toy(nn.Module):
    """Residual blocks, with LoRA on the first and the last of their maps."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.ModuleList(Branched(WIDTH, WIDTH, 3 * i) for i in range(BLOCKS))
        self.up = nn.ModuleList(Branched(WIDTH, INNER, 3 * i + 1) for i in range(BLOCKS))
        self.down = nn.ModuleList(Branched(INNER, WIDTH, 3 * i + 2) for i in range(BLOCKS))
        self.blocks = nn.ModuleList(map(Block, self.out, self.up, self.down))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def places_of(toy: Toy) -> Places:
    attention = tuple(Place(f"out.{i}", m, i, BLOCKS, UNITS) for i, m in enumerate(toy.out))
    down = tuple(Place(f"down.{i}", m, i, BLOCKS) for i, m in enumerate(toy.down))
    branches = tuple(
        Branch(f"{part}.{i}", m, m.base, m.a, m.b, i, BLOCKS)
        for part in ("out", "down")
        for i, m in enumerate(getattr(toy, part))
    )
    stack = tuple((f"blocks.{i}", block) for i, block in enumerate(toy.blocks))
    return Places("toy", attention, down, (*attention, *down), branches, stack, (0,) * BLOCKS)


@pytest.fixture
def toy() -> Iterator[Toy]:
    made = Toy()
    yield made
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in made.modules()]
    assert sum(hooks) == 0  # whatever a test did, `remove` left nothing behind
    assert all("forward" not in m.__dict__ for m in made.modules())


def switched_on(injection: Injection, key: int = 7, **fields: Any) -> Injection:
    for field, value in {"on": True, "strength": 1.0, "key": key, "row": 0, "rows": 0, **fields}.items():
        setattr(injection.draw, field, value)
    return injection


X = numbers(1, 8, 5, WIDTH)


def test_a_recipe_can_set_every_structure() -> None:
    assert Structure().amounts == {}
    for name in tables.STRUCTURES:
        assert load_recipe(None, [f"structure.{name}=0.25"]).structure.amount(name) == 0.25


@pytest.mark.parametrize("amounts", [*({n: AMOUNT} for n in STRUCTURES), {"adversary": 0.5}, ALL], ids=lambda a: "+".join(a))
def test_the_model_is_bit_for_bit_as_before_when_off_at_strength_0_and_after_remove(
    toy: Toy, amounts: dict[str, float]
) -> None:
    clean = toy(X)
    injection = Injection(places_of(toy), amounts)
    for learner in injection.learners.values():
        for b2, _ in learner.pairs:
            b2.data.fill_(1.0)  # else it is the identity anyway
    with switched_on(injection):
        assert not torch.equal(toy(X), clean)
        injection.draw.on = False
        assert torch.equal(toy(X), clean)
        injection.draw.on, injection.draw.strength = True, 0.0
        assert torch.equal(toy(X), clean)
        injection.draw.strength = 1.0
    assert torch.equal(toy(X), clean)


@every
def test_a_structure_that_is_off_hands_on_the_same_object(toy: Toy, name: str) -> None:
    seen: list[Tensor] = []
    with Injection(places_of(toy), {name: AMOUNT}):
        probe = toy.out[3].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
        toy.out[3](X)
        probe.remove()
    assert seen[0] is X


def test_amount_0_puts_no_hook_in(toy: Toy) -> None:
    with Injection(places_of(toy), dict.fromkeys(ALL, 0.0)) as injection:
        assert injection.learners == {}
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in toy.modules())


@pytest.mark.parametrize("name", [name for name in STRUCTURES if tables.STRUCTURES[name].unbiased])
@pytest.mark.parametrize("part", quickly(("out",), ["out", "down"]))
@torch.no_grad()
def test_a_structure_is_unbiased(toy: Toy, name: str, part: str) -> None:
    """The mean over keys of what the top map gives is within 4 standard errors of the clean value, in every output."""
    module = getattr(toy, part)[3]
    x = numbers(2, 1, 1, module.in_features)
    clean = module(x)[0, 0].double()
    with switched_on(Injection(places_of(toy), {name: AMOUNT})) as injection:
        got = torch.empty(600, WIDTH, dtype=torch.float64)
        for key in range(len(got)):
            injection.draw.key = derive(5, key)
            got[key] = module(x.expand(4, 1, -1)).double().mean((0, 1))
    touched = (name, part) not in {("heads", "down"), ("channels", "out")}
    assert (got.std(0).max() > 1e-3) == touched
    errors = got.std(0) / math.sqrt(len(got))
    assert ((got.mean(0) - clean).abs() <= 4.0 * errors + 1e-6).all()


@every
def test_a_structure_depends_on_its_key_alone(toy: Toy, name: str) -> None:
    def run(key: int) -> Tensor:
        with switched_on(Injection(places_of(toy), {name: AMOUNT}), key):
            return toy(X)

    torch.manual_seed(1)
    first = run(7)
    torch.manual_seed(2)
    assert torch.equal(run(7), first)
    assert not all(torch.equal(run(key), first) for key in (8, 9, 10, 11))  # what draws once a step may draw alike
    with switched_on(Injection(places_of(toy), {name: AMOUNT}), 8) as injection:  # nothing is kept from the pass before
        toy(X)
        injection.draw.key = 7
        assert torch.equal(toy(X), first)


def test_torchs_own_generator_is_left_alone(toy: Toy) -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    with switched_on(Injection(places_of(toy), ALL)) as injection:
        toy(X).sum().backward()
        injection.begin(3, "here", 0)
        injection.ascend()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("amounts", [*({n: AMOUNT} for n in STRUCTURES), ALL], ids=lambda a: "+".join(a))
def test_one_batch_of_8_rows_is_4_of_2(toy: Toy, amounts: dict[str, float]) -> None:
    with switched_on(Injection(places_of(toy), amounts), rows=8) as injection:
        whole = toy(X)
        parts = []
        for row in range(0, 8, 2):
            injection.draw.row, injection.draw.rows = row, 2
            parts.append(toy(X[row : row + 2]))
    # Kernels sum 2 rows in another order than 8: four layers of float32 differ by some 1e-5 on some processors.
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    with switched_on(Injection(places_of(toy), amounts)):
        alike = toy(X[:1].expand(8, -1, -1))
    drawn_by_row = any((alike[0] - row).abs().max() > 1e-3 for row in alike[1:])
    assert drawn_by_row == bool(set(PER_ROW) & amounts.keys())


@every
def test_rows_are_known_where_a_model_flattens_them(toy: Toy, name: str) -> None:
    """OPT runs its feed-forward part on (rows · time, d)."""
    with switched_on(Injection(places_of(toy), {name: AMOUNT}), rows=8, row=16):
        whole, flat = toy(X), toy(X.flatten(0, 1))
    torch.testing.assert_close(flat.view_as(whole), whole)


@every
def test_what_all_rows_share_is_drawn_alike_in_every_micro_batch(toy: Toy, name: str) -> None:
    """DeBERTa sends its relative positions, (1, positions, d), through maps that carry a branch."""
    shared = numbers(3, 1, 6, WIDTH)
    with switched_on(Injection(places_of(toy), {name: AMOUNT}), rows=4) as injection:
        first = toy(shared)
        injection.draw.row, injection.draw.rows = 4, 3
        assert torch.equal(toy(shared), first)


def uniform(key: int, name: str, place: int, row: int, unit: int) -> float:
    """One number of a sheet, drawn alone."""
    counter = torch.tensor([(place << 44) + (row << 20) + unit])
    return float(counter_uniform(derive(key, name), counter))


@pytest.mark.parametrize(("name", "part", "size"), [("heads", "out", WIDTH // UNITS), ("channels", "down", 64)])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_whole_heads_and_whole_blocks_of_channels_are_dropped(toy: Toy, name: str, part: str, size: int, share: float) -> None:
    seen: list[Tensor] = []
    module, p = getattr(toy, part)[2], AMOUNT * share
    x = numbers(4, 8, 5, module.in_features)
    with switched_on(Injection(places_of(toy), {name: AMOUNT}), row=3, strength=share) as injection:
        probe = module.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
        module(x)
        probe.remove()
    want, lost, count = x.clone(), 0, math.ceil(x.shape[-1] / size)
    for row in range(8):
        for unit in range(count):
            gone = uniform(7, name, 2, 3 + row, unit) < p
            lost += gone
            want[row, :, unit * size : (unit + 1) * size] *= 0.0 if gone else 1.0 / (1.0 - p)
    assert 0 < lost < 8 * count
    torch.testing.assert_close(seen[0], want, rtol=1e-6, atol=0.0)
    # the counts are of all places of the pass, though only one module ran
    drawn = [uniform(7, name, place, 3 + row, u) < p for place in range(BLOCKS) for row in range(8) for u in range(count)]
    assert (float(injection.draw.dropped), injection.draw.units) == (sum(drawn), len(drawn))


def test_places_of_different_widths_count_their_own_units(toy: Toy) -> None:
    wide = nn.Linear(6 * 64, WIDTH)
    places = Places("toy", (), (Place("down.0", toy.down[0], 0, 2), Place("wide", wide, 1, 2)), (), (), ())
    with switched_on(Injection(places, {"channels": AMOUNT})) as injection:
        toy.down[0](numbers(1, 2, 3, INNER))
    lost = [uniform(7, "channels", place, r, u) < AMOUNT for place, n in ((0, 3), (1, 6)) for r in range(2) for u in range(n)]
    assert (float(injection.draw.dropped), injection.draw.units) == (sum(lost), 2 * (3 + 6))


def test_bf16_stays_bf16_and_is_scaled_before_it_is_rounded(toy: Toy) -> None:
    seen: list[Tensor] = []
    x = numbers(4, 8, 5, WIDTH).bfloat16()
    toy.bfloat16()
    with switched_on(Injection(places_of(toy), {"heads": 0.05})):
        probe = toy.out[0].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
        toy.out[0](x)
        probe.remove()
    kept = seen[0] != 0
    assert seen[0].dtype == torch.bfloat16
    assert torch.equal(seen[0][kept], (x.float() / 0.95).bfloat16()[kept])


@every
def test_half_precision_and_autocast_keep_the_type(toy: Toy, name: str) -> None:
    with switched_on(Injection(places_of(toy), {name: AMOUNT})), torch.autocast("cpu", dtype=torch.bfloat16):
        assert toy.out[3](X).dtype == torch.bfloat16
    toy.bfloat16()
    with switched_on(Injection(places_of(toy), {name: AMOUNT})):
        assert toy(X.bfloat16()).dtype == torch.bfloat16


def dense(
    module: Branched, rank_gain: Tensor | None = None, rows: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """W + SCALE · diag(rows) B diag(rank_gain) A diag(columns), formed in full in float64."""

    def diagonal(values: Tensor | None, size: int) -> Tensor:
        return torch.diag(torch.ones(size) if values is None else values).double()

    d_out, d_in = module.base.weight.shape
    left = diagonal(rows, d_out) @ module.b.weight.double() @ diagonal(rank_gain, RANK)
    return module.base.weight.double() + SCALE * left @ module.a.weight.double() @ diagonal(columns, d_in)


@torch.no_grad()
def test_rank_is_b_times_i_plus_zeta_times_a(toy: Toy) -> None:
    with switched_on(Injection(places_of(toy), {"rank": AMOUNT}), row=2, strength=0.5):
        got = toy.down[1](X[..., :1].expand(-1, -1, INNER))
    place = BLOCKS + 1  # branches: out.0 … out.3, down.0 …
    for row in range(8):
        counters = (place << 44) + ((2 + row) << 20) + torch.arange(RANK)
        zeta = AMOUNT * 0.5 * counter_normal(derive(7, "rank"), counters)
        weight = dense(toy.down[1], rank_gain=1.0 + zeta)
        want = X[row, :, :1].double().expand(-1, INNER) @ weight.T + toy.down[1].base.bias.double()
        torch.testing.assert_close(got[row].double(), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_lodrop_is_masks_around_b_and_a(toy: Toy) -> None:
    def mask(name: str, size: int) -> Tensor:
        lost = [uniform(7, f"lodrop {name}", 2, 0, unit) < AMOUNT for unit in range(size)]
        assert 0 < sum(lost) < size
        return torch.tensor([0.0 if gone else 1.0 / (1.0 - AMOUNT) for gone in lost])

    with switched_on(Injection(places_of(toy), {"lodrop": AMOUNT}), row=6):
        got = toy.out[2](X)
    weight = dense(toy.out[2], rows=mask("rows", WIDTH), columns=mask("columns", WIDTH))
    torch.testing.assert_close(got.double(), X.double() @ weight.T + toy.out[2].base.bias.double(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_branch_leaves_out_a_branch_for_all_rows_of_a_step(toy: Toy) -> None:
    modules = {f"{part}.{i}": getattr(toy, part)[i] for part in ("out", "down") for i in range(BLOCKS)}
    with switched_on(Injection(places_of(toy), {"branch": AMOUNT})) as injection:
        lost = 0
        for path, module in modules.items():
            x = numbers(5, 4, 2, module.in_features)
            gone = derive(7, "branch", path) / 2**63 < AMOUNT
            lost += gone
            want = module.base(x) + (0.0 if gone else SCALE / (1.0 - AMOUNT)) * (x @ module.a.weight.T @ module.b.weight.T)
            torch.testing.assert_close(module(x), want)
    assert 0 < lost < len(modules)
    assert (injection.draw.dropped, injection.draw.units) == (lost, len(modules))


@pytest.mark.parametrize(
    ("block", "blocks", "want"),
    [(0, 1, 0.3), (0, 2, 0.0), (1, 2, 0.3), (0, 4, 0.0), (1, 4, 0.0), (2, 4, 0.15), (3, 4, 0.3), (1, 3, 0.1), (8, 12, 0.15)],
)
def test_depth_chances_by_hand(block: int, blocks: int, want: float) -> None:
    assert depth_chance(0.3, block, blocks) == pytest.approx(want)


@torch.no_grad()
def test_layers_leave_out_branches_of_the_upper_half_by_row(toy: Toy) -> None:
    chances = {0: 0.0, 1: 0.0, 2: 0.2, 3: 0.4}
    with switched_on(Injection(places_of(toy), {"layers": 0.4}), row=1):
        got = [module(X) for module in toy.out]
    for block, p in chances.items():
        clean = toy.out[block](X)
        for row in range(8):  # places that are hooked: out.2, out.3, down.2, down.3
            gone = p > 0.0 and uniform(7, "layers", block - 2, 1 + row, 0) < p
            torch.testing.assert_close(got[block][row], clean[row] * (0.0 if gone else 1.0 / (1.0 - p)))


@torch.no_grad()
def test_skip_leaves_out_whole_blocks_for_all_rows_of_a_step(toy: Toy) -> None:
    """The same toy written without the blocks that a uniform number of the key and the block's name is low for."""
    seen = set()
    for key in range(12):
        with switched_on(Injection(places_of(toy), {"skip": 0.8}), key, strength=0.5) as injection:
            got = toy(X)
        gone = [derive(key, "skip", f"blocks.{n}") / 2**63 < 0.5 * depth_chance(0.8, n, BLOCKS) for n in range(BLOCKS)]
        want = X
        for block, lost in zip(toy.blocks, gone, strict=True):
            want = want if lost else block(want)
        assert torch.equal(got, want)
        assert (injection.draw.dropped, injection.draw.units) == (sum(gone), 2)  # of the two upper blocks
        seen.add(tuple(gone))
    assert len(seen) > 1
    assert not any(one[0] or one[1] for one in seen)  # the lower half stays


def test_what_is_skipped_is_not_trained(toy: Toy) -> None:
    key = next(k for k in range(99) if derive(k, "skip", "blocks.3") / 2**63 < 0.9 <= derive(k, "skip", "blocks.2") / 2**63 * 2)
    with switched_on(Injection(places_of(toy), {"skip": 0.9}), key):
        toy(X).sum().backward()
    assert toy.down[3].a.weight.grad is None
    assert toy.down[2].a.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_row_norms_are_those_of_the_frozen_weight(toy: Toy) -> None:
    class Transposed(nn.Module):  # as GPT-2 holds its maps, (in, out)
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(numbers(6, 300, 7)), nn.Parameter(5.0 * numbers(7, 7))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    base = Transposed()
    a, b = nn.Linear(300, RANK, bias=False), nn.Linear(RANK, 7, bias=False)
    torch.testing.assert_close(row_norms(Branch("x", base, base, a, b, 0, 1)), base.weight.norm(dim=0), rtol=1e-5, atol=0)
    for branch in places_of(toy).branches:
        torch.testing.assert_close(row_norms(branch), branch.base.weight.norm(dim=1))


@torch.no_grad()
def test_weight_noise_has_the_marginal_of_a_dense_change_of_the_weights(toy: Toy) -> None:
    """ΔW_ij ~ N(0, σ²‖W_i‖²/d_in), sampled in full, against the noise that the hook adds, at one input."""
    samples, sigma, module = 20_000, 0.3, toy.out[1]
    x = numbers(8, WIDTH)
    with switched_on(Injection(places_of(toy), {"weights": 0.6}), strength=0.5):
        noise = (module(x.expand(samples // 4, 4, -1)) - module.base(x) - SCALE * module.b(module.a(x))).flatten(0, 1).double()
    weight = module.base.weight.double().numpy()
    generator = np.random.default_rng(1)
    for output in (0, 5, 11, 23):
        deviation = sigma * np.linalg.norm(weight[output]) / math.sqrt(WIDTH)
        twin = (generator.standard_normal((samples, WIDTH)) * deviation) @ x.double().numpy()
        mine = noise[:, output].numpy()
        assert abs(mine.mean() - twin.mean()) < 4.0 * math.sqrt((mine.var() + twin.var()) / samples)
        assert abs(mine.var() - twin.var()) < 4.0 * math.sqrt(2.0 / samples * (mine.var() ** 2 + twin.var() ** 2))
    # outputs and positions are drawn each by itself
    correlations = torch.corrcoef(noise.T).fill_diagonal_(0.0)
    assert correlations.abs().max() < 5.0 / math.sqrt(samples)
    pairs = noise.view(-1, 4, WIDTH)
    assert abs(float((pairs[:, 0] * pairs[:, 1]).mean())) < 4.0 * float(noise.var()) / math.sqrt(samples // 4 * WIDTH)


@torch.no_grad()
def test_weight_noise_is_n_times_length_times_row_norm(toy: Toy) -> None:
    module = toy.out[1]
    with switched_on(Injection(places_of(toy), {"weights": 0.3}), row=2):
        got = module(X)
    counters = [[[((2 + r) << 40) + (t << 20) + o for o in range(WIDTH)] for t in range(5)] for r in range(8)]
    n = counter_normal(derive(7, "weights", "out.1"), torch.tensor(counters))
    noise = 0.3 * X.norm(dim=-1, keepdim=True) / math.sqrt(WIDTH) * module.base.weight.norm(dim=1) * n
    torch.testing.assert_close(got, module(X) + noise, rtol=1e-4, atol=1e-5)


@every
def test_the_strength_takes_effect_from_one_pass_to_the_next(toy: Toy, name: str) -> None:
    with switched_on(Injection(places_of(toy), {name: AMOUNT})) as injection:
        full = toy(X)
        injection.draw.strength = 0.02
        less = toy(X)
    assert not torch.equal(full, less)
    with switched_on(Injection(places_of(toy), {name: AMOUNT}), strength=0.02):
        assert torch.equal(toy(X), less)


def test_gradient_flows_through_the_length_of_the_input(toy: Toy) -> None:
    with switched_on(Injection(places_of(toy), {"weights": AMOUNT})):
        x = numbers(9, 2, 3, WIDTH).double().requires_grad_()
        toy.double()
        assert torch.autograd.gradcheck(lambda t: toy.out[0](t).sum(), x, eps=1e-3, atol=1e-2)  # noise is float32
        zero = torch.zeros(1, 1, WIDTH, dtype=torch.float64, requires_grad=True)
        toy.out[0](zero).sum().backward()
        assert zero.grad is not None
        assert zero.grad.isfinite().all()


@pytest.mark.parametrize(
    ("progress", "ramp", "anneal", "want"),
    [
        (0.0, 0.2, 0.1, 0.0),
        (0.1, 0.2, 0.1, 0.5),
        (0.2, 0.2, 0.1, 1.0),
        (0.5, 0.2, 0.1, 1.0),
        (0.9, 0.2, 0.1, 1.0),
        (0.95, 0.2, 0.1, 0.5),
        (1.0, 0.2, 0.1, 0.0),
        (0.0, 0.0, 0.0, 1.0),
        (1.0, 0.0, 0.0, 1.0),
        (0.5, 1.0, 1.0, 0.5),
    ],
)
def test_the_schedule_by_hand(progress: float, ramp: float, anneal: float, want: float) -> None:
    assert strength(progress, ramp, anneal) == pytest.approx(want)


@pytest.mark.parametrize("schedule", [(-0.1, 0.2, 0.1), (1.1, 0.2, 0.1), (0.5, -0.2, 0.1), (0.5, 0.2, -0.1)])
def test_an_impossible_schedule_is_an_error(schedule: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="schedule"):
        strength(*schedule)


@torch.no_grad()
def adversary_of(injection: Injection) -> Any:
    return injection.learners["adversary"]


def dense_norm(adversary: Any) -> float:
    return math.sqrt(sum(float((b2 @ a2).detach().double().square().sum()) for b2, a2 in adversary.pairs))


def test_the_adversary_begins_as_the_identity_and_ascends_inside_its_ball(toy: Toy) -> None:
    target = numbers(12, *X.shape)
    injection = switched_on(Injection(places_of(toy), {"adversary": 0.5}))
    adversary = adversary_of(injection)
    with injection:

        def loss() -> Tensor:
            return (toy(X) - target).square().mean()

        with torch.no_grad():
            injection.draw.on = False
            clean = float(loss())
            injection.draw.on = True
        losses = [loss()]
        assert losses[0].item() == clean
        for _ in range(12):
            losses[-1].backward()
            before = dense_norm(adversary)
            adversary.ascend(0.1)
            assert dense_norm(adversary) <= 0.5 * (1 + 1e-5)
            assert adversary.norm() == pytest.approx(dense_norm(adversary), rel=1e-5)
            assert all(p.grad is None for pair in adversary.pairs for p in pair)
            losses.append(loss())
        assert before == pytest.approx(0.5, rel=1e-5)  # it has come to the edge
        assert losses[1] > losses[0]
        assert losses[-1] > losses[1]
        injection.draw.strength = 0.5
        weakened = toy.out[0](X) - toy.out[0].base(X) - SCALE * toy.out[0].b(toy.out[0].a(X))
        b2, a2 = adversary.pairs[0]
        torch.testing.assert_close(weakened, 0.5 * X @ (b2 @ a2).T, rtol=1e-3, atol=1e-5)


def test_the_first_step_of_the_adversary_is_lr_along_the_gradient_over_all_pairs(toy: Toy) -> None:
    injection = switched_on(Injection(places_of(toy), {"adversary": 100.0}))
    adversary = adversary_of(injection)
    with injection:
        toy(X).square().mean().backward()
    flat = [p for pair in adversary.pairs for p in pair]
    before, gradients = [p.detach().clone() for p in flat], [p.grad.clone() for p in flat]
    length = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    adversary.ascend(0.3)
    for parameter, old, gradient in zip(flat, before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), old + 0.3 * gradient / length)
    adversary.ascend(0.3)  # without a backward pass nothing moves
    for parameter, old, gradient in zip(flat, before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), old + 0.3 * gradient / length)


def test_the_adversary_is_no_part_of_the_model(toy: Toy) -> None:
    mine = {id(p) for p in toy.parameters()}
    names = list(toy.state_dict())
    with switched_on(Injection(places_of(toy), {"adversary": 0.5})) as injection:
        assert [id(p) for p in toy.parameters() if id(p) not in mine] == []
        assert list(toy.state_dict()) == names
        toy(X).sum().backward()
        assert toy.out[0].a.weight.grad is not None  # one backward pass serves both
        assert adversary_of(injection).pairs[0][0].grad is not None


def test_a_round_of_the_adversary_begins_from_its_key(toy: Toy) -> None:
    first, second = (adversary_of(Injection(places_of(toy), {"adversary": 0.5})) for _ in range(2))
    first.pairs[0][0].data.fill_(3.0)
    first.pairs[0][0].grad = torch.ones_like(first.pairs[0][0])
    first.reset(5)
    second.reset(5)
    for (b2, a2), (_, other) in zip(first.pairs, second.pairs, strict=True):
        assert not b2.any()
        assert b2.grad is None
        assert torch.equal(a2, other)
        assert abs(float(a2.detach().var()) * a2.shape[1] - 1.0) < 4.0 * math.sqrt(2.0 / a2.numel())
    assert not torch.equal(first.pairs[0][1], first.pairs[1][1])
    second.reset(6)
    assert not torch.equal(first.pairs[0][1], second.pairs[0][1])


@pytest.mark.parametrize(
    ("amounts", "text"),
    [
        ({"head": 0.1}, "no structure 'head'; there are heads, channels"),
        ({"heads": 1.0}, "'heads'.*probability in \\[0, 1\\), not 1.0"),
        ({"lodrop": -0.1}, "'lodrop'.*not -0.1"),
        ({"rank": math.inf}, "'rank'.*finite"),
        ({"weights": math.nan}, "'weights'.*nan"),
        ({"adversary": -1.0}, "'adversary'.*≥ 0"),
    ],
)
def test_impossible_amounts_are_errors(toy: Toy, amounts: dict[str, float], text: str) -> None:
    with pytest.raises(StructureError, match=text):
        Injection(places_of(toy), amounts)


@pytest.mark.parametrize("name", [*STRUCTURES, "adversary"])
def test_no_place_is_an_error_that_names_both_and_leaves_no_hook(toy: Toy, name: str) -> None:
    found = places_of(toy)
    if name in ("heads", "channels", "layers"):
        other, places = "rank", Places("odd-net", (), (), (), found.branches, ())
    else:
        other, places = "heads", Places("odd-net", found.attention, found.down, found.residual, (), ())
    with pytest.raises(StructureError, match=f"{name}.*odd-net"):
        Injection(places, {other: 0.1, name: 0.1}).attach()


def test_heads_that_do_not_divide_the_width_are_an_error(toy: Toy) -> None:
    place = Place("out.0", toy.out[0], 0, 1, 5)
    with pytest.raises(StructureError, match=r"out\.0 of 'toy' is 24 wide, which 5 heads do not divide"):
        Injection(Places("toy", (place,), (), (), (), ()), {"heads": 0.1}).attach()


def test_attaching_twice_does_not_disturb_twice(toy: Toy) -> None:
    injection = switched_on(Injection(places_of(toy), {"heads": AMOUNT}))
    with injection:
        once = toy(X)
        injection.attach()
        assert torch.equal(toy(X), once)


def test_hooks_are_gone_after_an_error(toy: Toy) -> None:
    with pytest.raises(RuntimeError, match="stop"), Injection(places_of(toy), ALL):
        raise RuntimeError("stop")  # the fixture looks for hooks


def test_a_draw_begins_switched_off() -> None:
    draw = Draw()
    assert (draw.on, draw.strength, draw.active) == (False, 0.0, False)
    assert SHARED > 10**6
