"""What a threshold would do, read off stored candidates in one pass: how much it keeps, how hard, what slips through.

The paper's 95 % is not universal (others settled on 90 % to 99 %), and nothing in a corpus says which is right but the
scores and the judgements at hand. Of a query with several known positives all but one can be hidden: those that come
back among its negatives are false negatives, and their share of what is mined is a lower bound of the real one.

Shapes: R rows (query, positive), k stored depth, T thresholds, H pairs (row that is shown, positive that is hidden).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.arrays import Floats, Ints
from nvr_tasks.mining.candidates import Candidates
from nvr_tasks.mining.ceilings import ceilings
from nvr_tasks.mining.spec import DEFAULT_THRESHOLDS, Method, MiningSpec

GRID: dict[Method, tuple[float, ...]] = {
    "perc_pos": tuple(round(0.70 + 0.01 * i, 2) for i in range(31)),
    "margin_pos": tuple(round(0.01 * i, 2) for i in range(31)),
    "abs": tuple(round(0.30 + 0.05 * i, 2) for i in range(14)),
}
QUANTILES = (0.1, 0.5, 0.9)
SHOWN_PER_QUERY = 4  # positives of a query that take their turn to be the one that is shown
LARGEST_SHARE = 0.05  # of mined negatives that may be hidden positives
LARGEST_SHORT = 0.01  # rows that may be left with too few negatives
FEWEST_NEGATIVES = 400  # below which the share says little


@dataclass(frozen=True)
class Curve:
    """What each threshold of a method would do.

    Attributes:
        method, thresholds: [T].
        kept: share of the stored candidates below the ceiling, [T].
        short: share of rows with fewer than `num_negatives` stored candidates below it, [T].
        margin: quantiles 0.1, 0.5, 0.9 of s⁺ − s of the hardest negative (NaN: no row has one), [T, 3].
        false: hidden positives among the negatives mined for rows whose query has others, [T].
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
    candidates: Candidates, num_negatives: int, *, seed: int = 0, grid: dict[Method, tuple[float, ...]] | None = None
) -> list[Curve]:
    """The curve of every method that has a threshold.

    Args:
        candidates: stored candidates; each (query, positive) is a row.
        num_negatives: wanted per row.
        seed: of the choice of positives to show, where a query has more than `SHOWN_PER_QUERY`.
        grid: thresholds per method.

    Raises:
        NvrError: the stored depth is less than `num_negatives`.
    """
    if candidates.ids.shape[1] < num_negatives:
        raise NvrError(
            f"the stored candidates are {candidates.ids.shape[1]} deep, less than num_negatives {num_negatives}: "
            "mine with a greater depth"
        )
    rising = np.where(candidates.ids >= 0, -candidates.scores, np.inf)  # [Q, k], sorted
    stored = (candidates.ids >= 0).sum(axis=1)
    judged = candidates.judged
    complete = stored == judged.corpus_rows - judged.blocked.counts.sum(axis=1)
    rows = _Rows(judged.positives.owners, candidates.positive_scores, rising, stored, complete)
    hidden = _Hidden.of(candidates, rows, seed)
    return [
        _curve(method, thresholds, rows, hidden, num_negatives)
        for method, thresholds in (GRID if grid is None else grid).items()
    ]


@dataclass(frozen=True)
class _Rows:
    """Every (query, positive), and the stored candidates of the queries; `complete`: there are no others."""

    query: Ints  # [R]
    score: Floats  # of the positive, [R]
    rising: Floats  # scores of the candidates, negated, +inf behind the last, [Q, k]
    stored: Ints  # [Q]
    complete: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]  # [Q]

    def at_least(self, row: Ints, bound: Floats) -> Ints:
        """How many stored candidates of the rows' queries score at least the bound."""
        counts = np.empty(len(row), np.int64)
        for start in range(0, len(row), 16384):
            part = slice(start, start + 16384)
            counts[part] = (self.rising[self.query[row[part]]] <= -bound[part, None]).sum(axis=1)
        return counts


@dataclass(frozen=True)
class _Hidden:
    """Rows that are shown, and the other positives of their queries.

    Attributes:
        shown: rows, [S]; pair: index into `shown`, [H]; hidden: row of the hidden positive, [H].
        before: stored candidates that rank above it, [H]; rivals: other hidden positives that do, [H].
    """

    shown: Ints
    pair: Ints
    hidden: Ints
    before: Ints
    rivals: Ints

    @staticmethod
    def of(candidates: Candidates, rows: _Rows, seed: int) -> _Hidden:
        positives = candidates.judged.positives
        sizes = np.diff(positives.offsets)
        draw = np.random.default_rng(seed).random(len(rows.query))
        turn = np.lexsort((draw, rows.query))  # each query's positives, shuffled
        place = np.arange(len(turn)) - np.repeat(positives.offsets[:-1], sizes)
        shown = np.sort(turn[(place < SHOWN_PER_QUERY) & (np.repeat(sizes, sizes) > 1)])
        query = rows.query[shown]
        pair = np.repeat(np.arange(len(shown)), sizes[query])
        start = np.repeat(np.cumsum(sizes[query]) - sizes[query], sizes[query])
        hidden = positives.offsets[query][pair] + np.arange(len(pair)) - start
        pair, hidden = pair[hidden != shown[pair]], hidden[hidden != shown[pair]]
        # Rank of every positive among those of its query, the best first.
        order = np.lexsort((-rows.score, rows.query))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order)) - np.repeat(positives.offsets[:-1], sizes)
        rivals = rank[hidden] - (rank[shown[pair]] < rank[hidden])
        return _Hidden(shown, pair, hidden, rows.at_least(hidden, rows.score[hidden]), rivals)

    def mined(self, rows: _Rows, ceiling_R: Floats, above_R: Ints, wanted: int) -> tuple[int, int]:
        """(hidden positives among the negatives, negatives) of the shown rows that the stored candidates can answer."""
        left = rows.stored[rows.query[self.shown]] - above_R[self.shown]
        answered = (left >= wanted) | rows.complete[rows.query[self.shown]]
        below = rows.score[self.hidden] < ceiling_R[self.shown][self.pair]
        over = np.bincount(self.pair[~below], minlength=len(self.shown))  # hidden ones at or above the ceiling
        rank = (self.before - above_R[self.shown][self.pair]) + (self.rivals - over[self.pair])
        false = below & (rank < wanted) & answered[self.pair]
        available = left + np.bincount(self.pair[below], minlength=len(self.shown))
        return int(false.sum()), int(np.minimum(available, wanted)[answered].sum())


def _curve(method: Method, thresholds: Sequence[float], rows: _Rows, hidden: _Hidden, wanted: int) -> Curve:
    everybody = np.arange(len(rows.query))
    stored_R = rows.stored[rows.query]
    kept, short, margin, found = [], [], [], []
    for threshold in thresholds:
        ceiling_R = ceilings(MiningSpec(method, threshold), rows.score)
        above_R = rows.at_least(everybody, ceiling_R)
        left_R = stored_R - above_R
        kept.append(left_R.sum() / max(1, stored_R.sum()))
        short.append(float((left_R < wanted).mean()))
        some = np.flatnonzero(left_R > 0)
        hardest = -rows.rising[rows.query[some], above_R[some]]
        margin.append(np.quantile(rows.score[some] - hardest, QUANTILES) if len(some) else [np.nan] * len(QUANTILES))
        found.append(hidden.mined(rows, ceiling_R, above_R, wanted))
    false, mined = np.array(found, dtype=np.int64).reshape(-1, 2).T
    return Curve(method, np.array(thresholds), np.array(kept), np.array(short), np.array(margin), false, mined)


def suggest(found: Sequence[Curve], method: Method) -> Suggestion:
    """The hardest threshold of a method under which few negatives are hidden positives and few rows run short.

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
        why = f"too few queries have several positives to count false negatives, so this is the paper's {default:g}"
        return _described(curve, int(np.argmin(np.abs(curve.thresholds - default))), why)
    upper = np.array([wilson(int(f), int(m))[1] for f, m in zip(curve.false, curve.mined, strict=True)])
    fit = [int(i) for i in hardest_first if told[i] and curve.short[i] <= LARGEST_SHORT and upper[i] <= LARGEST_SHARE]
    if fit:
        why = f"the hardest with at most {LARGEST_SHARE:.0%} known false negatives and {LARGEST_SHORT:.0%} short rows"
        return _described(curve, fit[0], why)
    fit = [int(i) for i in hardest_first if told[i] and upper[i] <= LARGEST_SHARE]
    if fit:
        why = (
            f"the hardest with at most {LARGEST_SHARE:.0%} known false negatives, though many rows need a deeper search"
        )
        return _described(curve, fit[0], why)
    best = int(np.argmin(np.where(told, upper, np.inf)))
    return _described(
        curve, best, f"no threshold has less than {LARGEST_SHARE:.0%} known false negatives; this has fewest"
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
        facts.append(f"of {mined:,} negatives {false / mined:.2%} are hidden positives ({low:.2%} to {high:.2%})")
    return Suggestion(curve.method, float(curve.thresholds[index]), tuple(facts))


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a proportion (95 % by default); (0, 1) without trials.

    E. B. Wilson (1927): Probable inference, the law of succession, and statistical inference.
    """
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    middle = share + z * z / (2 * trials)
    reach = z * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return float(max(0.0, (middle - reach) / scale)), float(min(1.0, (middle + reach) / scale))
