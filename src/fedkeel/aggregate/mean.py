"""Average the factors apart, as FedIT does (Zhang et al. 2023, arXiv:2305.05644)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedkeel.aggregate.common import Aggregate, mean_dense, mean_tensors, measured_error
from fedkeel.types import Adapter, Lora, Update


def mean(reference: Adapter, updates: Sequence[Update], weights: Mapping[str, float]) -> Aggregate:
    """A = Σ p_k A_k and B = Σ p_k B_k. The mean of products is not the product of means, so this errs; see `error`.

    Raises ValueError if the sites differ in rank or scale, where averaging the factors has no meaning.
    """
    ordered = sorted(updates, key=lambda u: u.site)
    shares = [weights[u.site] for u in ordered]
    lora = {}
    for path, old in reference.lora.items():
        factors = [u.adapter.lora[path] for u in ordered]
        for update, f in zip(ordered, factors, strict=True):
            if f.a.shape != old.a.shape or f.b.shape != old.b.shape or f.scale != old.scale:
                raise ValueError(f"site {update.site}: rank or scale of {path} differs; rule `mean` needs them equal")
        a, b = mean_tensors([f.a for f in factors], shares), mean_tensors([f.b for f in factors], shares)
        lora[path] = Lora(a, b, old.scale)
    dense = {path: mean_dense(updates, weights, path) for path in reference.dense}
    return Aggregate(Adapter(lora, dense), measured_error(lora, updates, weights))
