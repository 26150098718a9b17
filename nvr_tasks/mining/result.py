"""What mining gives back: negatives with their scores, and an account of every passage.

Shapes: R rows (a query, or a (query, positive) pair under policy `each`), K negatives, N corpus rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.arrays import Floats, Ints
from nvr_tasks.mining.formats import Format, columns
from nvr_tasks.mining.spec import MiningSpec

if TYPE_CHECKING:
    from datasets import Dataset

# Why a passage is not a negative of a row; the first that applies counts.
REASONS: Mapping[str, str] = {
    "positive": "a positive of the query",
    "duplicate_of_positive": "in the group of a positive",
    "excluded": "left out by the caller (judged relevant elsewhere), or in the group of such a passage",
    "near_duplicate": "as similar to a positive or an excluded passage as near-duplicates are, or in the group of such a one",
    "at_or_above_ceiling": "score not below the row's ceiling: likely an unlabelled positive",
    "shifted": "among the ranks that method shifted drops",
    "below_min_score": "among the best below the ceiling, but below min_score",
    "not_rescored": "not among the candidates that the reranker scored (only where a reranker is the teacher)",
    "not_selected": "not needed: ranked lower, a duplicate of one on the list, or left by the draw",
}


@dataclass(frozen=True)
class MiningResult:
    """Negatives of one spec.

    Attributes:
        spec: what was asked for.
        query_rows: row of the query, sorted, [R]; 0 … Q−1 unless the policy is `each`.
        positive_ids: corpus row of the positive that sets the ceiling, [R].
        positive_scores: its float64 score, [R].
        ceilings: every negative's score is strictly below, [R]; +inf where the method has none.
        negative_ids: corpus rows by falling score, ties by rising row; −1 where there is none, [R, K].
        negative_scores: float64 scores; NaN where there is none, [R, K].
        candidates: passages looked at: R · N.
        skipped_per_row: reason (see REASONS) → passages per row, [R]. For each row, N = kept + the sum over reasons.
            `not_rescored` is there only if a reranker scored.
    """

    spec: MiningSpec
    query_rows: Ints
    positive_ids: Ints
    positive_scores: Floats
    ceilings: Floats
    negative_ids: Ints
    negative_scores: Floats
    candidates: int
    skipped_per_row: Mapping[str, Ints]

    @cached_property
    def kept_per_row(self) -> Ints:
        """Negatives per row, [R]."""
        kept: Ints = np.count_nonzero(self.negative_ids >= 0, axis=1)
        return kept

    @property
    def kept(self) -> int:
        """Negatives in all: candidates == kept + sum(skipped.values())."""
        return int(self.kept_per_row.sum())

    @property
    def skipped(self) -> dict[str, int]:
        """Passages that are not negatives, by reason."""
        return {reason: int(count.sum()) for reason, count in self.skipped_per_row.items()}

    @property
    def short_rows(self) -> Ints:
        """Rows with fewer than K negatives, since no further passage was eligible."""
        return np.flatnonzero(self.kept_per_row < self.spec.num_negatives)

    def to_dataset(
        self, queries: Sequence[str], corpus: Sequence[str], format: Format = "triplet", *, drop_short: bool = False
    ) -> Dataset:
        """A `datasets.Dataset` to train sentence-transformers with; see `formats.columns` for formats and errors.

        Args:
            queries, corpus: texts in the order of the vectors that were mined.
            format: triplet, n-tuple, labeled-pair or labeled-list.
            drop_short: leave out rows with fewer than K negatives, which n-tuples cannot hold.
        """
        from datasets import Dataset

        return Dataset.from_dict(columns(self, queries, corpus, format, drop_short))

    def take(self, rows: Ints) -> MiningResult:
        """Some of the rows, in their order."""
        each = self.candidates // max(1, len(self.query_rows))
        return replace(
            self,
            query_rows=self.query_rows[rows],
            positive_ids=self.positive_ids[rows],
            positive_scores=self.positive_scores[rows],
            ceilings=self.ceilings[rows],
            negative_ids=self.negative_ids[rows],
            negative_scores=self.negative_scores[rows],
            candidates=each * len(rows),
            skipped_per_row={reason: count[rows] for reason, count in self.skipped_per_row.items()},
        )

    def keep(self, taken_RK: npt.NDArray[np.bool_]) -> MiningResult:
        """The result with some of its negatives only, [R, K]; the others count as not selected."""
        order = np.argsort(~taken_RK, axis=1, kind="stable")
        real = np.take_along_axis(taken_RK, order, axis=1)
        left: Ints = self.kept_per_row - real.sum(axis=1)
        skipped = {**self.skipped_per_row, "not_selected": self.skipped_per_row["not_selected"] + left}
        return replace(
            self,
            negative_ids=np.where(real, np.take_along_axis(self.negative_ids, order, axis=1), -1),
            negative_scores=np.where(real, np.take_along_axis(self.negative_scores, order, axis=1), np.nan),
            skipped_per_row=skipped,
        )

    def check_balance(self) -> None:
        """Raise NvrError unless every passage of every row is accounted for, none twice."""
        counts = list(self.skipped_per_row.values())
        per_row = self.kept_per_row + sum(counts)
        expected = self.candidates // len(per_row) if len(per_row) else 0
        if any((count < 0).any() for count in counts) or (per_row != expected).any():
            raise NvrError(
                f"mining lost count: {self.candidates:,} candidates, {self.kept:,} kept, skipped {self.skipped}; report this as a bug"
            )
