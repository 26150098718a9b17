"""What must hold of mined negatives before anyone trains on them, checked without the code that mined them.

Shapes: R rows, K negatives, N corpus rows.
"""

from __future__ import annotations

import numpy as np

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.arrays import Ints, Ragged
from nvr_tasks.mining.result import MiningResult


def verify(result: MiningResult, positives: Ragged, barred: Ragged, groups: Ints, corpus_rows: int) -> None:
    """Raise NvrError, naming the first row that breaks a rule, unless all of these hold.

    No negative is a positive of its query, another barred passage, or in the group of one; a row has at most one
    passage of a group; scores are finite, strictly below the row's ceiling, sorted, and there exactly where ids are;
    every passage is accounted for.
    """
    ids, scores = result.negative_ids, result.negative_scores
    real = ids >= 0
    _none(ids >= corpus_rows, "names a passage that is not in the corpus")
    _none(real != np.isfinite(scores), "has a negative without a finite score, or a score without a negative")
    _none(real & ~(scores < result.ceilings[:, None]), "has a negative that does not lie below its ceiling")
    _none(real[:, 1:] & ~real[:, :-1], "has a gap in its list")
    following = real[:, 1:] & real[:, :-1]
    unsorted = (scores[:, 1:] > scores[:, :-1]) | ((scores[:, 1:] == scores[:, :-1]) & (ids[:, 1:] <= ids[:, :-1]))
    _none(following & unsorted, "is not sorted by score, then by passage")

    _, label = np.unique(groups, return_inverse=True)
    labels_RK = np.where(real, label[np.where(real, ids, 0)], -1 - np.arange(ids.shape[1]))
    ordered = np.sort(labels_RK, axis=1)
    _none(ordered[:, 1:] == ordered[:, :-1], "has two negatives of one group")

    base = int(label.max()) + 1
    forbidden = np.concatenate([lists.owners * base + label[lists.values] for lists in (positives, barred)])
    mined = result.query_rows[:, None] * base + labels_RK
    _none(
        real & np.isin(mined, forbidden),
        "has a negative that is relevant to its query, or a duplicate of a relevant passage",
    )
    result.check_balance()


def _none(broken: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], fact: str) -> None:
    """Raise NvrError if any entry is true, [R, …]."""
    rows = np.flatnonzero(broken.any(axis=1))
    if len(rows):
        raise NvrError(
            f"row {rows[0]} of the mined negatives {fact} ({len(rows)} rows do); nothing was written; report this as a bug"
        )
