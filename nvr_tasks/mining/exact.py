"""The score of a pair, in float64, the same on every device and under any block size or number of threads.

Products of two float32 numbers are exact in float64; they are added as a fixed tree (the second half onto the
first, again and again), elementwise, so no library chooses an order of summation. Equal vectors have equal scores.

Shapes: S pairs, D dimensions.
"""

from __future__ import annotations

import math

import torch  # noqa: TID253 - this package owns the search; nothing light imports it

PAIRS_AT_A_TIME = 1024  # 3 MB of products at D = 384: stays in cache


def pair_scores(x_QD: torch.Tensor, y_CD: torch.Tensor, x_index_S: torch.Tensor, y_index_S: torch.Tensor) -> torch.Tensor:
    """Dot products x[x_index] · y[y_index], float64 [S]."""
    scores_S = torch.empty(len(x_index_S), dtype=torch.float64, device=x_QD.device)
    for start in range(0, len(x_index_S), PAIRS_AT_A_TIME):
        part = slice(start, start + PAIRS_AT_A_TIME)
        products = x_QD.index_select(0, x_index_S[part]).double()
        products *= y_CD.index_select(0, y_index_S[part])
        width = products.shape[1]
        while width > 1:
            half = (width + 1) // 2
            products[:, : width - half] += products[:, half:width]
            width = half
        scores_S[part] = products[:, 0]
    return scores_S


def float32_error(dim: int) -> float:
    """Largest |fl32(x·y) − x·y| / (‖x‖‖y‖) of a float32 dot product in any order of summation, with or without FMA.

    γ_D = D·u / (1 − D·u), u = 2⁻²⁴ (Higham, Accuracy and Stability of Numerical Algorithms, §3.1; Σ|xᵢyᵢ| ≤ ‖x‖‖y‖ by
    Cauchy-Schwarz), and the like for `pair_scores` and the norms themselves in float64.
    """
    u = dim * 2.0**-24
    return (u / (1.0 - u) + dim * 2.0**-51) if u < 0.5 else math.inf


def underflow_error(dim: int) -> float:
    """What flushing subnormal products and sums to zero can add to that error."""
    return dim * 2.0**-124
