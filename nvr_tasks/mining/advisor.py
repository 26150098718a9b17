"""What a threshold would do, read off stored candidates in one pass: how much it keeps, how hard, what slips through.

The paper's 95 % is not universal (others settled on 90 % to 99 %), and nothing in a corpus says which is right but the
scores and the judgements at hand. Of a query with several known positives all but one can be hidden: those that come
back among its negatives show what a threshold lets through where positives are not known. Mining itself never takes
them, so this is no rate of its own errors: it is one if every query had all its positives but one missing.

Of passages in one group only the best counts, as when negatives are selected.

Shapes: R rows of a spec, E (query, positive) pairs, k stored depth, T thresholds, H pairs (row that is shown, positive
that is hidden).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.arrays import Floats, Ints
from nvr_tasks.mining.candidates import Candidates, best_of_groups
from nvr_tasks.mining.ceilings import ceilings, layout
from nvr_tasks.mining.intervals import wilson
from nvr_tasks.mining.spec import DEFAULT_THRESHOLDS, Method, MiningSpec

GRID: dict[Method, tuple[float, ...]] = {
    "perc_pos": tuple(round(0.70 + 0.01 * i, 2) for i in range(31)),
    "margin_pos": tuple(round(0.01 * i, 2) for i in range(31)),
    "abs": tuple(round(0.30 + 0.05 * i, 2) for i in range(14)),
}
QUANTILES = (0.1, 0.5, 0.9)
SHOWN_PER_QUERY = 4  # positives of a query that take their turn to be the one that is shown
LARGEST_SHARE = 0.05  # of negatives that may be positives, were all but one of a query's hidden
LARGEST_SHORT = 0.01  # rows that may be left with too few negatives
FEWEST_NEGATIVES = 400  # below which the share says little


@dataclass(frozen=True)
class Curve:
    """What each threshold of a method would do.

    Attributes:
        method, thresholds: [T].
        kept: share of the stored candidates below the ceiling, averaged over rows, [T].
        short: share of rows with fewer stored candidates below it than the spec takes its negatives from, [T].
        margin: quantiles 0.1, 0.5, 0.9 of s⁺ − s of the hardest negative (NaN: no row has one), [T, 3].
        false: hidden positives among the hardest negatives of rows whose query has others, [T].
        mined: those negatives; rows that the stored depth cannot answer are left out, [T].
    """

    method: Method
    thresholds: Floats
    kept: Floats
    short: Floats
    margin: Floats
    false: Ints
    mined: Ints


@dataclass(frozen=True)
class Suggestion:
    """A setting, and why."""

    method: Method
    threshold: float
    reasons: tuple[str, ...]


def curves(
    candidates: Candidates, spec: MiningSpec, *, seed: int = 0, grid: dict[Method, tuple[float, ...]] | None = None
) -> list[Curve]:
    """The curve of every method that has a threshold.

    Args:
        candidates: stored candidates.
        spec: policy, number of negatives and sampling of the rows; its method and threshold do not matter.
        seed: of the choice of positives to show, where a query has more than `SHOWN_PER_QUERY`.
        grid: thresholds per method.
    """
    stored = _Stored.of(candidates)
    hidden = _Hidden.of(candidates, stored, seed)
    grid = GRID if grid is None else grid
    return [_curve(method, grid[method], candidates, stored, hidden, spec) for method in grid]


@dataclass(frozen=True)
class _Stored:
    """The stored candidates, the best of each group.

    Attributes:
        rising: their scores, negated and sorted, +inf behind the last, [Q, k].
        count: how many there are, [Q].
        complete: whether there are no others, [Q].
    """

    rising: Floats
    count: Ints
    complete: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]

    @staticmethod
    def of(candidates: Candidates) -> _Stored:
        judged, ids, scores = candidates.judged, candidates.ids, candidates.scores
        every = (ids >= 0).sum(axis=1) == judged.corpus_rows - judged.blocked.counts.sum(axis=1)
        if judged.groups is not None:
            ids, scores = best_of_groups(ids, scores, judged.groups)
        return _Stored(np.where(ids >= 0, -scores, np.inf), (ids >= 0).sum(axis=1), every)

    def at_least(self, query: Ints, bound: Floats) -> Ints:
        """How many candidates of each query score at least the bound: a binary search in all rows at once."""
        low, high = np.zeros(len(query), np.int64), np.full(len(query), self.rising.shape[1])
        while (low < high).any():
            middle = (low + high) // 2
            inside = low < high
            over = inside & (self.rising[query, np.minimum(middle, self.rising.shape[1] - 1)] <= -bound)
            low, high = np.where(over, middle + 1, low), np.where(inside & ~over, middle, high)
        return low


@dataclass(frozen=True)
class _Hidden:
    """(query, positive) pairs that are shown, and the other positives of their queries, one per group.

    Attributes:
        query, score: of the shown pairs, [S].
        pair: index into them, [H]; hidden_score: of the hidden positive, [H].
        before: stored candidates that rank above it, [H]; rivals: other hidden positives that do, [H].
    """

    query: Ints
    score: Floats
    pair: Ints
    hidden_score: Floats
    before: Ints
    rivals: Ints

    @staticmethod
    def of(candidates: Candidates, stored: _Stored, seed: int) -> _Hidden:
        positives, scores = candidates.judged.positives, candidates.positive_scores
        owners, groups = positives.owners, candidates.judged.groups
        label = positives.values if groups is None else groups[positives.values]
        # The best positive of each query and group; its duplicates would never be mined beside it.
        order = np.lexsort((-scores, label, owners))
        first = np.ones(len(order), dtype=bool)
        first[1:] = (owners[order][1:] != owners[order][:-1]) | (label[order][1:] != label[order][:-1])
        one = np.sort(order[first])
        owner, score = owners[one], scores[one]
        sizes = np.bincount(owner, minlength=len(positives))
        starts = np.cumsum(sizes) - sizes
        best_first = np.lexsort((-score, owner))
        rank = np.empty(len(one), np.int64)  # among the positives of its query
        rank[best_first] = np.arange(len(one)) - starts[owner[best_first]]
        turn = np.lexsort((np.random.default_rng(seed).random(len(one)), owner))  # each query's positives, shuffled
        place = np.arange(len(one)) - starts[owner[turn]]
        shown = np.sort(turn[(place < SHOWN_PER_QUERY) & (sizes[owner[turn]] > 1)])
        many = sizes[owner[shown]]
        pair = np.repeat(np.arange(len(shown)), many)
        hidden = starts[owner[shown]][pair] + np.arange(len(pair)) - np.repeat(np.cumsum(many) - many, many)
        pair, hidden = pair[hidden != shown[pair]], hidden[hidden != shown[pair]]
        rivals = rank[hidden] - (rank[shown[pair]] < rank[hidden])
        before = stored.at_least(owner[hidden], score[hidden])
        return _Hidden(owner[shown], score[shown], pair, score[hidden], before, rivals)

    def mined(self, stored: _Stored, ceiling_S: Floats, wanted: int) -> tuple[int, int]:
        """(hidden positives among the hardest negatives, those negatives) of the rows that the candidates can answer."""
        above = stored.at_least(self.query, ceiling_S)
        left = stored.count[self.query] - above
        answered = (left >= wanted) | stored.complete[self.query]
        below = self.hidden_score < ceiling_S[self.pair]
        over = np.bincount(self.pair[~below], minlength=len(above))  # hidden ones at or above the ceiling
        rank = (self.before - above[self.pair]) + (self.rivals - over[self.pair])
        false = below & (rank < wanted) & answered[self.pair]
        available = left + np.bincount(self.pair[below], minlength=len(above))
        return int(false.sum()), int(np.minimum(available, wanted)[answered].sum())


def _curve(
    method: Method,
    thresholds: Sequence[float],
    candidates: Candidates,
    stored: _Stored,
    hidden: _Hidden,
    spec: MiningSpec,
) -> Curve:
    kept, short, margin, found = [], [], [], []
    for threshold in thresholds:
        at = MiningSpec(method, threshold, positive_policy=spec.positive_policy)
        rows = layout(at, candidates.judged.positives, candidates.positive_scores)
        above = stored.at_least(rows.query, rows.ceiling)
        count = stored.count[rows.query]
        left = count - above
        kept.append(left.sum() / max(1, count.sum()))
        short.append(float((left < spec.pool).mean()))
        some = np.flatnonzero(left > 0)
        hardest = -stored.rising[rows.query[some], above[some]]
        difference = rows.positive_score[some] - hardest
        margin.append(np.quantile(difference, QUANTILES) if len(some) else [np.nan] * len(QUANTILES))
        found.append(hidden.mined(stored, ceilings(at, hidden.score), spec.num_negatives))
    false, mined = np.array(found, dtype=np.int64).reshape(-1, 2).T
    return Curve(method, np.array(thresholds), np.array(kept), np.array(short), np.array(margin), false, mined)


def suggest(found: Sequence[Curve], method: Method) -> Suggestion:
    """The hardest threshold of a method that lets few hidden positives through and leaves few rows short.

    Raises:
        NvrError: the method has no threshold.
    """
    if method not in DEFAULT_THRESHOLDS:
        raise NvrError(f"method {method} has no threshold to suggest: one of {', '.join(DEFAULT_THRESHOLDS)}")
    [curve] = [c for c in found if c.method == method]
    hardest_first = np.argsort(curve.thresholds if method == "margin_pos" else -curve.thresholds, kind="stable")
    default = DEFAULT_THRESHOLDS[method]
    told = curve.mined >= FEWEST_NEGATIVES
    if not told.any():
        why = (
            f"of queries with several positives the stored candidates answer for {int(curve.mined.max(initial=0)):,} negatives "
            f"at most, too few (under {FEWEST_NEGATIVES}) to tell, so this is the paper's {default:g}; a larger mine.depth may "
            "answer for more"
        )
        return _described(curve, int(np.argmin(np.abs(curve.thresholds - default))), why)
    upper = np.array([wilson(int(f), int(m))[1] for f, m in zip(curve.false, curve.mined, strict=True)])
    fit = [int(i) for i in hardest_first if told[i] and curve.short[i] <= LARGEST_SHORT and upper[i] <= LARGEST_SHARE]
    if fit:
        why = f"the hardest that lets at most {LARGEST_SHARE:.0%} hidden positives in and leaves {LARGEST_SHORT:.0%} of rows short"
        return _described(curve, fit[0], why)
    fit = [int(i) for i in hardest_first if told[i] and upper[i] <= LARGEST_SHARE]
    if fit:
        why = f"the hardest that lets at most {LARGEST_SHARE:.0%} hidden positives in, though many rows need a deeper search"
        return _described(curve, fit[0], why)
    best = int(np.argmin(np.where(told, upper, np.inf)))
    return _described(
        curve, best, f"every threshold lets more than {LARGEST_SHARE:.0%} hidden positives in; this the fewest"
    )


def _described(curve: Curve, index: int, why: str) -> Suggestion:
    false, mined = int(curve.false[index]), int(curve.mined[index])
    facts = [
        why,
        f"keeps {curve.kept[index]:.1%} of the stored candidates",
        f"{curve.short[index]:.2%} of rows need more than what is stored",
        f"median margin s⁺ − s of the hardest negative {curve.margin[index, 1]:.4f}",
    ]
    if mined:
        low, high = wilson(false, mined)
        facts.append(
            f"with all but one positive of a query hidden, {false / mined:.2%} of {mined:,} negatives would be hidden "
            f"positives ({low:.2%} to {high:.2%})"
        )
    return Suggestion(curve.method, float(curve.thresholds[index]), tuple(facts))
