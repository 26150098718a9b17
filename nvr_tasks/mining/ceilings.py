"""The paper's rules as one ceiling per row: a candidate is kept only if its score is strictly below.

Shapes: R rows, Q queries, E positives of all queries together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nvr_tasks.mining.arrays import Floats, Ints, Ragged
from nvr_tasks.mining.spec import MiningSpec


@dataclass(frozen=True)
class Rows:
    """The rows of one spec, sorted by query.

    Attributes:
        query: row of `query_vectors`, [R].
        positive: corpus row of the positive that sets the ceiling, [R].
        positive_score: its score, float64 [R].
        ceiling: scores must lie strictly below it, float64 [R]; +inf where the method has none.
    """

    query: Ints
    positive: Ints
    positive_score: Floats
    ceiling: Floats

    def __len__(self) -> int:
        return len(self.query)

    def take(self, index: Ints) -> Rows:
        """Some of the rows."""
        return Rows(self.query[index], self.positive[index], self.positive_score[index], self.ceiling[index])


def ceilings(spec: MiningSpec, positive_scores_R: Floats) -> Floats:
    """Ceiling of each row from the score of its positive, float64 [R] → [R]."""
    t = spec.resolved_threshold
    if spec.method == "perc_pos":
        # arXiv:2407.15831 §3.1, TopK-PercPos: s < s⁺·perc. For s⁺ < 0 that ceiling would lie above the positive;
        # s⁺ − |s⁺|·(1 − perc) is the same for s⁺ ≥ 0 and lies below it always (sentence-transformers #3819).
        return positive_scores_R - np.abs(positive_scores_R) * (1.0 - t)
    if spec.method == "margin_pos":
        return positive_scores_R - t  # arXiv:2407.15831 §3.1, TopK-MarginPos
    if spec.method == "abs":
        return np.full_like(positive_scores_R, t)
    return np.full_like(positive_scores_R, np.inf)  # shifted, naive and random look at ranks, not at scores


def layout(spec: MiningSpec, positives: Ragged, scores_E: Floats) -> Rows:
    """The rows of a spec: one per query, or one per (query, positive) under policy `each`.

    Args:
        spec: method and policy.
        positives: corpus rows per query, at least one each.
        scores_E: float64 score of every positive with its query, in the order of `positives.values`.
    """
    if spec.positive_policy == "each":
        pick = np.arange(len(positives.values), dtype=np.int64)
    else:
        # All ceilings grow with s⁺, so the lowest positive has the lowest ceiling. Ties: the lowest corpus row.
        sign = 1.0 if spec.positive_policy == "min" else -1.0
        order = np.lexsort((positives.values, sign * scores_E, positives.owners))
        pick = order[positives.offsets[:-1]]
    return Rows(positives.owners[pick], positives.values[pick], scores_E[pick], ceilings(spec, scores_E[pick]))
