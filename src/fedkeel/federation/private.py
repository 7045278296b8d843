"""DP-SGD: the gradient of a step in which no row of a site counts more than it may, with noise (Abadi et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedkeel.exchange.clip import MARGIN, Clip
from fedkeel.exchange.noise import deviation, noised
from fedkeel.recipe.schema import Recipe
from fedkeel.rng import secret_draw

Backward = Callable[[Sequence[int]], float]  # rows -> their loss over all positions, with its gradient added to `.grad`


def drawn(rows: int, recipe: Recipe) -> list[int]:
    """The rows of a step: each by itself with probability batch_size / rows (Poisson sampling), from secret entropy."""
    return secret_draw(rows, min(1.0, recipe.train.batch_size / rows))


def private_gradient(net: nn.Module, backward: Backward, positions: Mapping[int, int], recipe: Recipe) -> None:
    """Into `.grad`: (Σ_i g_i · min(1, C/‖g_i‖) + N(0, z²C²)) / batch_size, g_i the gradient of row i's own mean loss.

    backward: as `Backward`, of the mean over the positions of all rows together. positions: drawn row -> its positions. A
    gradient that is not finite counts as zeros. All rows take one pass where every trained tensor is the weight of a linear map
    that keeps rows apart, and a pass each elsewhere. Source: Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """
    trained = [p for p in net.parameters() if p.requires_grad]
    total = _together(net, trained, backward, positions, recipe) if positions else None
    if total is None:
        total = _one_by_one(trained, backward, positions, recipe)
    for parameter, noisy in zip(trained, noised(total, deviation(recipe.privacy)).values(), strict=True):
        parameter.grad = (noisy / recipe.train.batch_size).to(parameter.dtype)


def _one_by_one(
    trained: Sequence[nn.Parameter], backward: Backward, positions: Mapping[int, int], recipe: Recipe
) -> dict[str, Tensor]:
    bound = Clip(recipe.privacy.clip)
    total = {str(n): torch.zeros_like(p, dtype=torch.float32) for n, p in enumerate(trained)}
    for index in positions:
        for parameter in trained:
            parameter.grad = None
        backward([index])
        own = {str(n): p.grad for n, p in enumerate(trained) if p.grad is not None}
        for name, gradient in bound.leaves(own, {}).items():
            total[name] += gradient
    return total


@dataclass
class _Heard:
    """What went into the linear maps and came back to them, pass by pass. odd: a map did not keep rows apart."""

    rows: int = 0
    odd: bool = False
    passes: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def came(self, name: str, x: Tensor, back: Tensor) -> None:
        """x: (rows, time, d_in) or (rows, d_in), and the gradient of what came of it."""
        self.odd = self.odd or x.dim() not in (2, 3) or x.shape[0] != back.shape[0]
        self.passes.setdefault(name, []).append((x.detach(), back))


def _listen(heard: _Heard, name: str, module: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
    if out.requires_grad:
        out.register_hook(partial(heard.came, name, given[0]))


@contextmanager
def _listening(maps: Mapping[str, nn.Module]) -> Iterator[_Heard]:
    heard = _Heard()
    handles = [module.register_forward_hook(partial(_listen, heard, name)) for name, module in maps.items()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _together(
    net: nn.Module, trained: Sequence[nn.Parameter], backward: Backward, positions: Mapping[int, int], recipe: Recipe
) -> dict[str, Tensor] | None:
    """Σ_i g_i · min(1, C/‖g_i‖) from one pass, or None where a row's gradient cannot be told from those of others.

    Of a map y = W x the gradient of row i is Σ_t δ_it x_itᵀ, with δ that of its output (Goodfellow 2015, arXiv:1510.01799).
    """
    of = {id(m.weight): m for m in net.modules() if isinstance(m, nn.Linear) and m.bias is None}
    if not all(id(p) in of for p in trained):
        return None
    maps = {str(n): of[id(p)] for n, p in enumerate(trained)}
    for parameter in trained:
        parameter.grad = None
    with _listening(maps) as heard:
        backward(list(positions))
    micro = recipe.train.at_once  # more rows may be drawn than a batch has
    counts = [min(micro, len(positions) - start) for start in range(0, len(positions), micro)]
    right = all([x.shape[0] for x, _ in heard.passes.get(name, [])] == counts for name in maps)
    if heard.odd or not right:
        return None
    # the loss is a mean over all positions: δ of row i times (all / its own) is that of its own mean
    own = torch.tensor(list(positions.values()), dtype=torch.float32)
    scales = (own.sum() / own).split(counts)
    squares = torch.zeros(len(positions), dtype=torch.float64)
    for passes in heard.passes.values():
        of_rows = [torch.einsum("rto,rti->roi", *_pair(x, d)).flatten(1).double().square().sum(1).cpu() for x, d in passes]
        squares += torch.cat(of_rows)
    lengths = squares.sqrt() * torch.cat(scales).double()
    weights = (recipe.privacy.clip * (1 - MARGIN) / lengths).clamp(max=1.0) * torch.cat(scales).double()
    weights = torch.where(torch.isfinite(lengths), weights, 0.0).float().split(counts)
    return {
        name: sum(
            (_weighted(x, d, w) for (x, d), w in zip(heard.passes[name], weights, strict=True)),
            torch.zeros_like(parameter, dtype=torch.float32),
        )
        for name, parameter in zip(maps, trained, strict=True)
    }


def _pair(x: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """(δ, x) in float32, each (rows, time, …)."""
    x, back = x.float(), back.float()
    return (back, x) if x.dim() == 3 else (back[:, None], x[:, None])


def _weighted(x: Tensor, back: Tensor, weights: Tensor) -> Tensor:
    """Σ_i w_i Σ_t δ_it x_itᵀ; a row of weight 0 is left out, whatever it holds."""
    delta, x = _pair(x, back)
    keep = (weights > 0).nonzero()[:, 0].to(x.device)
    delta, x = delta[keep] * weights.to(x.device)[keep, None, None], x[keep]
    return delta.flatten(0, 1).T @ x.flatten(0, 1)
