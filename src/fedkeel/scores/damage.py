"""Damage to a trained model at evaluation time, and the score under it (method.md §6, structural stability).

Damage is put into the whole model for a while and leaves no trace: hooks that are removed, or other tensors in the place of
frozen weights, which come back as they were, the same memory. It knows nothing of what training used (`structure`), so that
a report can tell apart the damage that a model was trained on. Unlike there, what is kept is never rescaled: this is damage.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedkeel import tables
from fedkeel.data.format import Formatter
from fedkeel.method.structure.drop import BLOCK
from fedkeel.model.depth import kept_blocks, without
from fedkeel.model.lora import Model
from fedkeel.model.places import Branch, Place, in_block, in_width
from fedkeel.recipe.schema import Evaluation
from fedkeel.rng import counter_normal, derive, numpy_generator
from fedkeel.scores.evaluate import Scored, overall, score
from fedkeel.scores.metrics import consistency, mean, stability_index
from fedkeel.types import FedKeelError

T = TypeVar("T")
GROUP = 32  # neighbours that share a scale in a base of llama.cpp's


class DamageError(FedKeelError):
    """Damage that does not exist, has an impossible strength or finds no place in this model."""


def _some(model: Model, found: Sequence[T], what: str) -> Sequence[T]:
    """`found`. Raises DamageError, naming the architecture, if it is empty."""
    if not found:
        raise DamageError(
            f"a model of type {model.places.architecture!r} has no {what} that FedKeel knows to damage; leave this family out"
        )
    return found


def _drawn(found: Sequence[T], count: int, seed: int) -> Sequence[T]:
    """`count` of `found`. With one seed a smaller draw is part of a larger one, so a curve over strengths has one cause."""
    return [found[n] for n in numpy_generator(seed, "drawn").permutation(len(found))[:count]]


def _share(found: Sequence[T], share: float, seed: int) -> Sequence[T]:
    """A random share of `found`, rounded, and at least one above share 0. Raises DamageError outside [0, 1]."""
    if not 0.0 <= share <= 1.0:
        raise DamageError(f"a strength that is a share is in [0, 1], not {share}")
    return _drawn(found, max(round(share * len(found)), int(share > 0.0)), seed)


def _silence(model: Model, places: Sequence[tuple[Place, int]], share: float, seed: int, undo: ExitStack) -> None:
    """Zero a share of the units in front of linear maps. places: with the number of channels that are one unit."""
    units = [(p, slice(at, at + width)) for p, width in places for at in range(0, in_width(p.module), width)]
    lost: dict[Place, list[slice]] = {}
    for place, channels in _share(units, share, seed):
        lost.setdefault(place, []).append(channels)
    for place, gone in lost.items():
        mask = torch.zeros(in_width(place.module), dtype=torch.bool, device=model.device)
        for channels in gone:
            mask[channels] = True
        undo.callback(place.module.register_forward_pre_hook(partial(_masked, mask)).remove)


def _masked(mask: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].masked_fill(mask, 0.0), *inputs[1:])


def heads(model: Model, share: float, seed: int, undo: ExitStack) -> None:
    """Zero a share of the heads of the whole model; under grouped-query attention, of the groups that share keys and values."""
    places = _some(model, model.places.attention, "attention output map")
    for place in places:
        if in_width(place.module) % place.units:
            raise DamageError(
                f"{place.path} of {model.places.architecture!r} is {in_width(place.module)} wide, which {place.units} heads "
                f"do not divide; leave heads out"
            )
    _silence(model, [(p, in_width(p.module) // p.units) for p in places], share, seed, undo)


def channels(model: Model, share: float, seed: int, undo: ExitStack) -> None:
    """Zero a share of the blocks of 64 feed-forward channels of the whole model; a map's last block may be shorter."""
    places = _some(model, model.places.down, "feed-forward down projection of its own")
    _silence(model, [(p, BLOCK) for p in places], share, seed, undo)


def _scale_outputs(modules: Sequence[nn.Module], factor: float, undo: ExitStack) -> None:
    for module in modules:
        undo.callback(module.register_forward_hook(partial(_scaled, factor)).remove)


def _scaled(factor: float, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * factor


def skip(model: Model, count: float, seed: int, undo: ExitStack) -> None:
    """Skip `count` blocks: nothing of theirs is added to the residual stream. Encoder and decoder blocks count alike."""
    blocks: dict[tuple[str, int], list[nn.Module]] = {}
    for place in _some(model, model.places.residual, "residual branch"):
        stack = place.path.partition(f".{place.block}.")[0]
        blocks.setdefault((stack, place.block), []).append(place.module)
    if not (0 <= count <= len(blocks) and count == int(count)):
        raise DamageError(f"this model has {len(blocks)} blocks; the number to skip is one of 0 … {len(blocks)}, not {count}")
    for modules in _drawn(list(blocks.values()), int(count), seed):
        _scale_outputs(modules, 0.0, undo)


def depth(model: Model, share: float, seed: int, undo: ExitStack) -> None:
    """Cut a share of the blocks, rounded, off the top of the stack that predicts; what stands above them stays."""
    places = model.places
    stack = _some(model, places.stack if places.forms else (), "stack of blocks")
    if not 0.0 <= share < 1.0:
        raise DamageError(f"a share of the blocks from 0 to under 1 can be cut off, not {share}")
    left = len(kept_blocks(len(stack), 1 - share))
    if left < len(stack):
        undo.enter_context(without([block for _, block in stack[left:]], places.forms[left:]))


def _branches(model: Model) -> Sequence[Branch]:
    return _some(model, model.places.branches, "adapter branch")


def modules(model: Model, share: float, seed: int, undo: ExitStack) -> None:
    """Leave a share of the adapter's modules out: the frozen map alone answers there."""
    _scale_outputs([b.b for b in _share(_branches(model), share, seed)], 0.0, undo)


def scale(model: Model, factor: float, seed: int, undo: ExitStack) -> None:
    """Multiply the adapter's scale by `factor` ≥ 0; its dense parameters, such as a fresh head, stay."""
    if not 0.0 <= factor < math.inf:
        raise DamageError(f"a factor of the adapter's scale is a finite number ≥ 0, not {factor}")
    _scale_outputs([b.b for b in _branches(model)], factor, undo)


def _rewrite(model: Model, change: Callable[[Branch, Tensor], Tensor], undo: ExitStack) -> None:
    """Put change(branch, W) in the place of every frozen target weight W, (d_out, d_in) float32 whatever the map's layout.

    The clean tensor is set aside and put back itself. Frozen weights only: autocast keeps casts of trained ones.
    """
    for branch in _branches(model):
        weight = branch.base.weight
        if not (isinstance(weight, nn.Parameter) and weight.dim() == 2 and weight.is_floating_point()):
            raise DamageError(f"{branch.path} of {model.places.architecture!r} holds no plain weight matrix to damage")
        _put(weight, isinstance(branch.base, Conv1D), partial(change, branch), undo)


def _put(weight: nn.Parameter, transposed: bool, change: Callable[[Tensor], Tensor], undo: ExitStack) -> None:
    """change(W) in the place of a frozen W (…, d_out, d_in), float32 there; transposed: it is held as (d_in, d_out)."""
    clean = weight.data
    undo.callback(setattr, weight, "data", clean)
    rows = change((clean.T if transposed else clean).float()).to(clean.dtype)
    weight.data = (rows.T if transposed else rows).contiguous()


@torch.no_grad()
def noise(model: Model, sigma: float, seed: int, undo: ExitStack) -> None:
    """W_ij += σ · (‖W_i‖/√d_in) · n, n ~ N(0, 1), on every frozen target weight: σ is the noise in the entries' own unit."""
    if not 0.0 <= sigma < math.inf:
        raise DamageError(f"σ of the weight noise is a finite number ≥ 0, not {sigma}")

    def noisy(branch: Branch, w: Tensor) -> Tensor:
        n = counter_normal(derive(seed, branch.path), torch.arange(w.numel(), device=w.device)).view(w.shape)
        return w + sigma / math.sqrt(w.shape[1]) * w.norm(dim=1, keepdim=True) * n

    _rewrite(model, noisy, undo)


def quantised(w: Tensor, bits: int) -> Tensor:
    """W (d_out, d_in) rounded to 2^bits − 1 values a row: multiples of max_j |W_ij| / (2^(bits−1) − 1). A row of 0 stays.

    Round to nearest (ties to even), symmetric; in float, as fake quantisation does.
    """
    steps = 2 ** (bits - 1) - 1
    step = w.abs().amax(1, keepdim=True) / steps
    return torch.where(step > 0.0, (w / step).round() * step, 0.0)


@torch.no_grad()
def bits(model: Model, bits: float, seed: int, undo: ExitStack) -> None:
    """Quantise every frozen target weight, see `quantised`. The adapter, norms and embeddings stay."""
    if bits not in range(2, 17):
        raise DamageError(f"weights are quantised to 2 … 16 bits, not {bits}")
    _rewrite(model, lambda branch, w: quantised(w, int(bits)), undo)


def in_groups(w: Tensor, bits: int) -> Tensor:
    """W (…, d_in) as llama.cpp rounds it: 32 neighbours on one scale, which is kept in half precision. 8 bits (Q8_0): ±127
    steps of max |w| / 127. 4 bits (Q4_0): steps −8 to 7 of the entry that is largest by size, over −8. The last group of a row
    may be shorter.

    Source: `quantize_row_q8_0_ref`, `quantize_row_q4_0_ref` of ggml.
    """
    width = w.shape[-1]
    groups = nn.functional.pad(w, (0, -width % GROUP)).unflatten(-1, (-1, GROUP)).double()
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    step = (largest.abs() / 127 if bits == 8 else largest / -8).float().double()
    times = torch.where(step != 0, groups / step, 0.0)
    # halves go away from 0, and of four bits up
    whole = times.sign() * (times.abs() + 0.5).floor() if bits == 8 else (times + 8.5).floor().clamp(0, 15) - 8
    return (whole * step.half().double()).flatten(-2)[..., :width].to(w.dtype)


@torch.no_grad()
def base(model: Model, bits: float, seed: int, undo: ExitStack) -> None:
    """Quantise every frozen matrix of the blocks, routers of experts too and whether an adapter is on it or not, see
    `in_groups`. Embeddings, convolutions, the output map, norms and the adapter stay."""
    if bits not in (4, 8):
        raise DamageError(f"a base is quantised to 4 or 8 bits, not {bits}")
    matrices = [
        (weight, isinstance(module, Conv1D))
        for path, module in model.net.get_base_model().named_modules()
        if in_block(path) and not isinstance(module, nn.Embedding | nn.Conv1d)
        for weight in module.parameters(recurse=False)
        if weight.dim() > 1 and weight.is_floating_point() and not weight.requires_grad
    ]
    for weight, transposed in _some(model, matrices, "frozen matrix in a block"):
        _put(weight, transposed, partial(in_groups, bits=int(bits)), undo)


def step_of(bits: float) -> float:
    """The quantisation step as a share of a row's largest entry: 0 would be no quantisation."""
    return 1.0 / (2.0 ** (bits - 1.0) - 1.0)


def _family(name: str) -> tables.Damage:
    if name not in tables.DAMAGES:
        raise DamageError(f"no family of damage {name!r}; there are {', '.join(tables.DAMAGES)}")
    return tables.DAMAGES[name]


@contextmanager
def damaged(model: Model, family: str, strength: float, seed: int) -> Iterator[None]:
    """While it lasts, `model` carries damage of this family; after it, also after an error inside, it is bit for bit as before.

    strength: a share of the whole model's units (heads, channels, modules), a number of blocks (skip), a factor (scale), σ
    (noise) or a number of bits (bits). The damage depends on (model's architecture, family, strength, seed) alone, and under
    one seed a greater share, or more blocks, contains the smaller. Raises DamageError for an unknown family, a strength out
    of range or an architecture without a place for it, with the model untouched.
    """
    put = _family(family).load()
    with ExitStack() as undo:
        put(model, strength, derive(seed, "damage", family), undo)
        yield


class Outcome(NamedTuple):
    """One scoring. score: the mean over tasks. family "": no damage.

    agreement: share of rows answered as without damage. consistency: of the distributions over the candidate labels with
    those without damage, see `metrics.consistency`, over the rows that have any; None where none has, as in generation.
    """

    family: str
    strength: float
    draw: int
    score: float
    agreement: float
    consistency: float | None


def compare(family: str, strength: float, draw: int, scored: Sequence[Scored], clean: Sequence[Scored]) -> Outcome:
    """The outcome of a scoring beside that of the same rows without damage. Raises ValueError on no rows, or others."""
    same = [float(a.prediction == b.prediction) for a, b in zip(scored, clean, strict=True)]
    pairs = [(a.distribution, b.distribution) for a, b in zip(scored, clean, strict=True) if b.distribution]
    width = max((len(b) for _, b in pairs), default=0)
    # rows of fewer labels are filled up: an outcome of chance 0 on both sides adds nothing
    sides = [[row + (0.0,) * (width - len(row)) for row in side] for side in zip(*pairs, strict=True)]
    return Outcome(family, strength, draw, overall(scored), mean(same), consistency(*sides) if sides else None)


def check(model: Model, families: Mapping[str, Sequence[float]]) -> None:
    """Raise DamageError, see `damaged`, where the model cannot be damaged so: told now, not after hours of scoring."""
    for family, strengths in families.items():
        for strength in strengths:
            with damaged(model, family, strength, 0):
                pass


@contextmanager
def _lower_blocks_once(model: Model) -> Iterator[None]:
    """While it lasts, the blocks of an encoder below its first adapter branch are run once for a batch that comes again.

    What the last of them says is kept by what the first is given, bit for bit, so nothing changes but the time: half of it
    with branches in the upper half of the blocks. Other kinds of model keep keys and values in each block, and run as ever.
    """
    first = min((branch.block for branch in model.places.branches), default=0) if model.kind == "classifier" else 0
    lower = [module for _, module in model.places.stack[:first]]
    said: dict[bytes, Tensor] = {}
    batch = b""

    def run(at: int, forward: Callable[..., Any], hidden_states: Tensor, *rest: Any, **more: Any) -> Any:
        nonlocal batch
        if at == 0:
            batch = hashlib.sha256(hidden_states.contiguous().view(torch.uint8).cpu().numpy().tobytes()).digest()
        if batch in said:
            return said[batch] if at == first - 1 else hidden_states
        output = forward(hidden_states, *rest, **more)
        if at == first - 1 and isinstance(output, Tensor):
            said[batch] = output
        return output

    with ExitStack() as undo:
        for at, block in enumerate(lower):
            forward = block.forward
            undo.callback(block.__dict__.pop, "forward", None)
            block.forward = partial(run, at, forward)
        yield


@dataclass(frozen=True)
class Subject:
    """A model that is damaged, and how it is scored. draws: of each random damage; draw d of one seed is the same damage in
    every model of an architecture."""

    model: Model
    formatter: Formatter
    config: Evaluation
    draws: int = 20
    seed: int = 0


def outcomes(subject: Subject, clean: Sequence[Scored], family: str, strengths: Sequence[float]) -> Iterator[Outcome]:
    """Scores of `clean`'s rows under every strength and draw of one family, as they come; without chance there is one draw.

    clean: the scores without damage.
    """
    model, records = subject.model, [s.record for s in clean]
    with _lower_blocks_once(model) if tables.DAMAGES[family].branches else nullcontext():
        for strength in strengths:
            for draw in range(subject.draws if tables.DAMAGES[family].random else 1):
                with damaged(model, family, strength, derive(subject.seed, draw)):
                    scored = score(model, subject.formatter, records, subject.config)
                yield compare(family, strength, draw, scored, clean)


def family_index(family: str, scores: Mapping[float, float], clean: float) -> float:
    """`metrics.stability_index` of a family: strength -> mean score, over `tables.Damage.apart`, equal distances averaged.

    So a scale of 0.75 and one of 1.25 are one point of the curve. Raises DamageError, or ValueError as the index does.
    """
    distance = _family(family).apart
    curve: dict[float, list[float]] = {}
    for strength, value in scores.items():
        curve.setdefault(round(distance(strength), 12), []).append(value)
    return stability_index(sorted(curve), [mean(curve[at]) for at in sorted(curve)], clean)
