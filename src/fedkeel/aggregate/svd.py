"""The best rank-r approximation of the exact sum (FlexLoRA: Bai et al. 2024, arXiv:2402.11505)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedkeel.aggregate.common import Aggregate, exact_factors, mean_dense, measured_error
from fedkeel.types import Adapter, Lora, Update

# ‖row of A‖ at LoRA's initialisation, in expectation: entries are uniform in ±1/√d_in, so d_in · 1/(3 d_in) = 1/3.
ROW_NORM = 3**-0.5


def svd(reference: Adapter, updates: Sequence[Update], weights: Mapping[str, float]) -> Aggregate:
    """Σ p_k scale_k B_k A_k, truncated to the rank of `reference`; sites may differ in rank and scale.

    Through QR of the stacked factors and an SVD of the small core between them; no (d_out, d_in) matrix is formed. The
    singular values go into B, and the rows of A are orthogonal with the norm that LoRA starts from: one learning rate then
    means the same before and after a round, and a direction with singular value 0 can still be trained.
    """
    lora = {}
    for path, old in reference.lora.items():
        left, right = exact_factors(updates, weights, path)
        q_left, r_left = torch.linalg.qr(left)
        q_right, r_right = torch.linalg.qr(right.T)
        u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        rank = old.a.shape[0]
        b = (q_left @ u)[:, :rank] * (s[:rank] / (old.scale * ROW_NORM))
        a = ROW_NORM * (vh @ q_right.T)[:rank]
        if len(s) < rank:  # fewer directions than the rank asks for: keep old rows of A, with B = 0
            a = torch.cat([a, old.a[len(s) :].double()])
            b = torch.nn.functional.pad(b, (0, rank - len(s)))
        lora[path] = Lora(a.to(old.a.dtype).contiguous(), b.to(old.b.dtype).contiguous(), old.scale)
    dense = {path: mean_dense(updates, weights, path) for path in reference.dense}
    return Aggregate(Adapter(lora, dense), measured_error(lora, updates, weights))
