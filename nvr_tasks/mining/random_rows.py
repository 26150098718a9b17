"""Method `random`: passages drawn without regard to any score.

Shapes: Q queries, N corpus rows, D dimensions, R rows, K negatives.
"""

from __future__ import annotations

import numpy as np

from nvr_tasks.mining.arrays import Ints, Vectors
from nvr_tasks.mining.ceilings import Rows
from nvr_tasks.mining.corpus import Corpus
from nvr_tasks.mining.draws import Keys, uniform_rows
from nvr_tasks.mining.prepare import Judged, scores_with
from nvr_tasks.mining.result import MiningResult
from nvr_tasks.mining.selection import account
from nvr_tasks.mining.spec import MiningSpec


def draw(
    spec: MiningSpec, rows: Rows, queries: Vectors, corpus: Corpus, judged: Judged, keys: Keys, seed: int
) -> MiningResult:
    """Random negatives (the baseline of arXiv:2407.15831 Table 1), scored and sorted like all others."""
    count = min(spec.num_negatives, corpus.rows)
    ids = np.full((len(rows), count), -1, dtype=np.int64)
    for row, query in enumerate(rows.query.tolist()):
        blocked = set(judged.blocked.by_query[query].tolist())
        positive = int(rows.positive[row]) if spec.positive_policy == "each" else -1
        accept = _Accept(blocked, judged.groups)
        drawn = uniform_rows(seed, int(keys[query]), positive, corpus.rows, accept, count)
        ids[row, : len(drawn)] = drawn
    real = ids >= 0
    scores = np.full(ids.shape, -np.inf)
    scores[real] = scores_with(queries, corpus, np.repeat(rows.query, real.sum(axis=1)), ids[real])
    order = np.lexsort((ids, -scores), axis=1)
    ids, scores = np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
    scores = np.where(ids >= 0, scores, np.nan)
    none = np.zeros(len(rows), dtype=np.int64)
    return account(spec, rows, ids, scores, judged.blocked, corpus.rows, above=none, shifted=none, below=none)


class _Accept:
    """Takes a drawn passage unless it is blocked or one of its group was taken before."""

    def __init__(self, blocked: set[int], groups: Ints | None) -> None:
        self.blocked, self.groups, self.taken = blocked, groups, set[int]()

    def __call__(self, row: int) -> bool:
        if row in self.blocked:
            return False
        if self.groups is not None:
            if int(self.groups[row]) in self.taken:
                return False
            self.taken.add(int(self.groups[row]))
        return True
