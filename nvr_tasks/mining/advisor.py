"""What a threshold would do, read off stored candidates in one pass: how much it keeps, how hard, and what slips through.

The paper's 95 % is not universal (others settled on 90 % to 99 %), and nothing in a corpus says which is right but the
scores themselves and the judgements at hand. Of a query with two known positives one can be hidden: a threshold under
which the other one's ceiling would let it be mined makes false negatives, at a rate that can be counted.

Shapes: R rows (query, positive), k stored depth, T thresholds, H hidden positives.
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
MOST_HIDDEN = 200_000  # pairs of positives that are tried
LARGEST_LEAK = 0.05  # hidden positives that may come back as negatives
LARGEST_SHORT = 0.01  # rows that may be left with too few negatives
FEWEST_HIDDEN = 100  # pairs below which the share that leaks says little


@dataclass(frozen=True)
class Curve:
    """What each threshold of a method would do.

    Attributes:
        method, thresholds: [T].
        kept: share of the stored candidates below the ceiling, [T].
        short: share of rows with fewer than `num_negatives` stored candidates below it, [T].
        margin: quantiles 0.1, 0.5, 0.9 of s⁺ − s of the hardest negative (NaN: no row has one), [T, 3].
        leaked: hidden positives that would be mined as negatives, [T]; of `hidden` tried.
        hidden: H.
    """

    method: Method
    thresholds: Floats
    kept: Floats
    short: Floats
    margin: Floats
    leaked: Ints
    hidden: int


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
        seed: of the choice of hidden positives, where there are more than `MOST_HIDDEN` pairs.
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
    query, positive_score = candidates.judged.positives.owners, candidates.positive_scores
    pairs = _hidden_pairs(candidates, seed)
    return [
        _curve(method, thresholds, rising, stored, query, positive_score, pairs, num_negatives)
        for method, thresholds in (GRID if grid is None else grid).items()
    ]


def _curve(
    method: Method,
    thresholds: Sequence[float],
    rising_QK: Floats,
    stored_Q: Ints,
    query_R: Ints,
    positive_R: Floats,
    pairs: tuple[Ints, Ints],
    wanted: int,
) -> Curve:
    shown, hidden = pairs
    before_H = _count_at_least(rising_QK, query_R[hidden], positive_R[hidden])  # candidates that rank above
    kept, short, margin, leaked = [], [], [], []
    for threshold in thresholds:
        ceiling_R = ceilings(MiningSpec(method, threshold), positive_R)
        above_R = _count_at_least(rising_QK, query_R, ceiling_R)
        left_R = stored_Q[query_R] - above_R
        kept.append(left_R.sum() / max(1, stored_Q[query_R].sum()))
        short.append(float((left_R < wanted).mean()))
        some = np.flatnonzero(left_R > 0)
        hardest = -rising_QK[query_R[some], above_R[some]]
        margin.append(np.quantile(positive_R[some] - hardest, QUANTILES) if len(some) else [np.nan] * len(QUANTILES))
        mined_H = (positive_R[hidden] < ceiling_R[shown]) & (before_H - above_R[shown] < wanted)
        leaked.append(int(mined_H.sum()))
    return Curve(
        method,
        np.array(thresholds),
        np.array(kept),
        np.array(short),
        np.array(margin),
        np.array(leaked, dtype=np.int64),
        len(hidden),
    )


def _count_at_least(rising_QK: Floats, query: Ints, bound: Floats, rows_at_a_time: int = 16384) -> Ints:
    """How many stored candidates of each query score at least the bound."""
    counts = np.empty(len(query), np.int64)
    for start in range(0, len(query), rows_at_a_time):
        part = slice(start, start + rows_at_a_time)
        counts[part] = (rising_QK[query[part]] <= -bound[part, None]).sum(axis=1)
    return counts


def _hidden_pairs(candidates: Candidates, seed: int) -> tuple[Ints, Ints]:
    """Pairs of different positives of one query: the one that is shown, the one that is hidden; indices of rows."""
    offsets = candidates.judged.positives.offsets
    sizes = np.diff(offsets)
    total = int((sizes * (sizes - 1)).sum())
    ends = np.cumsum(sizes * (sizes - 1))
    chosen = np.arange(total)
    if total > MOST_HIDDEN:
        chosen = np.sort(np.random.default_rng(seed).choice(total, MOST_HIDDEN, replace=False))
    query = np.searchsorted(ends, chosen, side="right")
    within = chosen - (ends[query] - (sizes * (sizes - 1))[query])
    others = np.maximum(sizes[query] - 1, 1)
    shown, hidden = within // others, within % others
    hidden = hidden + (hidden >= shown)
    return offsets[query] + shown, offsets[query] + hidden


def suggest(found: Sequence[Curve], method: Method) -> Suggestion:
    """The hardest threshold of a method under which few hidden positives leak and few rows run short.

    Raises:
        NvrError: the method has no threshold.
    """
    if method not in DEFAULT_THRESHOLDS:
        raise NvrError(f"method {method} has no threshold to suggest: one of {', '.join(DEFAULT_THRESHOLDS)}")
    [curve] = [c for c in found if c.method == method]
    order = np.argsort(
        curve.thresholds if method == "margin_pos" else -curve.thresholds, kind="stable"
    )  # hardest first
    enough = curve.short <= LARGEST_SHORT
    default = DEFAULT_THRESHOLDS[method]
    if curve.hidden < FEWEST_HIDDEN:
        said = (
            f"only {curve.hidden} pairs of positives of one query: too few to count what leaks, so this is the paper's setting",
        )
        return _described(curve, int(np.argmin(np.abs(curve.thresholds - default))), said)
    upper = np.array([wilson(int(n), curve.hidden)[1] for n in curve.leaked])
    fit = [int(i) for i in order if enough[i] and upper[i] <= LARGEST_LEAK]
    if fit:
        said = (f"the hardest under which at most {LARGEST_LEAK:.0%} of hidden positives come back (upper bound)",)
        return _described(curve, fit[0], said)
    possible = np.flatnonzero(enough) if enough.any() else np.arange(len(upper))
    best = int(possible[np.argmin(upper[possible])])
    said = (f"no threshold keeps the leak below {LARGEST_LEAK:.0%}; this one leaks least: check the judgements",)
    return _described(curve, best, said)


def _described(curve: Curve, index: int, said: tuple[str, ...]) -> Suggestion:
    low, high = wilson(int(curve.leaked[index]), curve.hidden)
    facts = [
        f"keeps {curve.kept[index]:.1%} of the stored candidates",
        f"{curve.short[index]:.2%} of rows need more than what is stored",
        f"median margin s⁺ − s of the hardest negative {curve.margin[index, 1]:.4f}",
    ]
    if curve.hidden:
        facts.append(
            f"of {curve.hidden:,} hidden positives {curve.leaked[index] / curve.hidden:.2%} would be mined ({low:.2%} to {high:.2%})"
        )
    return Suggestion(curve.method, float(curve.thresholds[index]), (*said, *facts))


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
