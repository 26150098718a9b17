"""The score of a pair, in float64, the same on every device and under any block size or number of threads.

Products of two float32 numbers are exact in float64; they are added as a fixed tree (the second half onto the
first, again and again), elementwise, so no library chooses an order of summation. Equal vectors have equal scores.

Shapes: S pairs, D dimensions.
"""

from __future__ import annotations

import math

import numpy as np
import torch  # noqa: TID253 - this package owns the search; nothing light imports it

from nvr_tasks.mining.kernels import exact_dots

PAIRS_ON_DEVICE = 1 << 16


def pair_scores(
    x_QD: torch.Tensor, y_CD: torch.Tensor, x_index_S: torch.Tensor, y_index_S: torch.Tensor
) -> torch.Tensor:
    """Dot products x[x_index] · y[y_index], float64 [S]."""
    if x_QD.device.type == "cpu":
        scores = np.empty(len(x_index_S))
        exact_dots(x_QD.numpy(), y_CD.numpy(), x_index_S.numpy(), y_index_S.numpy(), scores)
        return torch.from_numpy(scores)
    scores_S = torch.empty(len(x_index_S), dtype=torch.float64, device=x_QD.device)
    for start in range(0, len(x_index_S), PAIRS_ON_DEVICE):
        part = slice(start, start + PAIRS_ON_DEVICE)
        products = x_QD.index_select(0, x_index_S[part]).double()
        products *= y_CD.index_select(0, y_index_S[part])
        scores_S[part] = _add_up(products)
    return scores_S


def _add_up(products_SD: torch.Tensor) -> torch.Tensor:
    """Row sums as a fixed tree, [S, D] → [S]; the products are overwritten."""
    width = products_SD.shape[1]
    while width > 1:
        half = (width + 1) // 2
        products_SD[:, : width - half] += products_SD[:, half:width]
        width = half
    return products_SD[:, 0]


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
