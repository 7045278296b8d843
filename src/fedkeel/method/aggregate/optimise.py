"""Server optimisers around any rule whose factors keep their basis (FedOpt: Reddi et al. 2021, arXiv:2003.00295)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkeel import tables
from fedkeel.types import Adapter


@dataclass(frozen=True)
class Rates:
    """lr: η > 0. beta1, beta2: decays in [0, 1). tau: what Adam calls ε, > 0. The defaults of the last three are those of the
    experiments in the paper; `momentum` reads lr and beta1, `average` lr alone."""

    lr: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3


# Δ of one tensor, its state by kind (`m`, `v`), rates -> the step to add, and the new state; all float64
Optimiser = Callable[[Tensor, Mapping[str, Tensor], Rates], tuple[Tensor, dict[str, Tensor]]]


def average(change: Tensor, state: Mapping[str, Tensor], rates: Rates) -> tuple[Tensor, dict[str, Tensor]]:
    """η Δ: server SGD, and with η = 1 plain averaging. No state."""
    return rates.lr * change, {}


def momentum(change: Tensor, state: Mapping[str, Tensor], rates: Rates) -> tuple[Tensor, dict[str, Tensor]]:
    """m ← β₁ m + Δ, step η m, from m = 0; of a steady Δ the step becomes η / (1 − β₁) Δ, ten times η Δ.

    Source: FedAvgM, Hsu et al. 2019, arXiv:1909.06335.
    """
    m = rates.beta1 * state.get("m", torch.zeros_like(change)) + change
    return rates.lr * m, {"m": m}


def adam(change: Tensor, state: Mapping[str, Tensor], rates: Rates) -> tuple[Tensor, dict[str, Tensor]]:
    """m ← β₁ m + (1 − β₁) Δ, v ← β₂ v + (1 − β₂) Δ², step η m / (√v + τ), from m = 0 and v = τ².

    Without a bias correction: Algorithm 2 (FedAdam) of the paper has none, and asks for v ≥ τ² at the start instead.
    """
    m = rates.beta1 * state.get("m", torch.zeros_like(change)) + (1.0 - rates.beta1) * change
    v = rates.beta2 * state.get("v", torch.full_like(change, rates.tau**2)) + (1.0 - rates.beta2) * change.square()
    return rates.lr * m / (v.sqrt() + rates.tau), {"m": m, "v": v}


def step(
    name: str, reference: Adapter, aggregated: Adapter, state: Mapping[str, Tensor], rates: Rates
) -> tuple[Adapter, dict[str, Tensor]]:
    """The next global adapter, from where the sites started (`reference`) and what a rule made of them, and the new state.

    name: of `tables.OPTIMISERS`. Δ = aggregated − reference on every tensor, of factors and dense parameters alike. state: as
    returned for the round before, empty at first: `m/<name>` and `v/<name>` by flat tensor name, float32.
    Computed in float64. `average` with lr = 1 returns `aggregated` itself. Only rules with `keeps_basis` yield a Δ that
    means a step. Raises ValueError if a tensor of `state` does not fit the adapter.
    """
    if name == "average" and rates.lr == 1.0:
        return aggregated, {}
    optimiser: Optimiser = tables.OPTIMISERS[name].load()
    before, after = reference.tensors(), aggregated.tensors()
    tensors: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for path, old in before.items():
        held = {kind: state[f"{kind}/{path}"] for kind in ("m", "v") if f"{kind}/{path}" in state}
        for kind, t in held.items():
            if t.shape != old.shape:
                raise ValueError(f"the server optimiser holds {kind}/{path} of shape {tuple(t.shape)}, not {tuple(old.shape)}")
        change = after[path].double() - old.double()
        moved, new = optimiser(change, {kind: t.double() for kind, t in held.items()}, rates)
        tensors[path] = (old.double() + moved).to(old.dtype)
        kept |= {f"{kind}/{path}": t.float() for kind, t in new.items()}
    return reference.with_tensors(tensors), kept
