"""The best rank-r approximation of the exact sum (FlexLoRA: Bai et al. 2024, arXiv:2402.11505)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedkeel.method.aggregate.common import Aggregate, singular
from fedkeel.method.aggregate.exact import Stack, measured_error
from fedkeel.method.aggregate.rule import Options
from fedkeel.method.aggregate.updates import gather
from fedkeel.types import Adapter, Lora, Update

# ‖row of A‖ at LoRA's initialisation, in expectation: entries are uniform in ±1/√d_in, so d_in · 1/(3 d_in) = 1/3.
ROW_NORM = 3**-0.5


def svd(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], options: Options) -> Aggregate:
    """Σ p_k scale_k B_k A_k, truncated to the rank of `reference`; sites may differ in rank and scale.

    Through QR of the stacked factors and an SVD of the small core between them; no (d_out, d_in) matrix is formed, but the
    factors of all sites are held.
    """
    exact = Stack()
    dense = gather(reference, updates, weights, reference.dense, exact)
    lora = {path: fitted(*singular(*exact.factors(path)), old) for path, old in reference.lora.items()}
    adapter = Adapter(lora, dense)
    return Aggregate(adapter, measured_error(exact, adapter, {}))


def fitted(u: Tensor, s: Tensor, vt: Tensor, old: Lora) -> Lora:
    """u · diag(s) · vt, truncated to the rank of `old` and laid out as it is. u: (d_out, k), s: (k,) falling, vt: (k, d_in).

    The singular values go into B, and the rows of A are orthogonal with the norm that LoRA starts from: one learning rate
    then means the same before and after a round, and a direction with singular value 0 can still be trained.
    """
    rank = old.a.shape[0]
    b = u[:, :rank] * (s[:rank] / (old.scale * ROW_NORM))
    a = ROW_NORM * vt[:rank]
    if len(s) < rank:  # fewer directions than the rank asks for: keep old rows of A, with B = 0
        a = torch.cat([a, old.a[len(s) :].double()])
        b = torch.nn.functional.pad(b, (0, rank - len(s)))
    return Lora(a.to(old.a.dtype).contiguous(), b.to(old.b.dtype).contiguous(), old.scale)
