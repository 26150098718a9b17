"""Paired comparison of two systems over the queries of several tasks. numpy only.

The quantity is the macro mean, MTEB's: the mean over tasks of the mean over a task's queries. Queries are the units,
tasks the strata: resampling never moves a query from one task to another, and a small task weighs as much as a large
one (`weights` are for tasks that are parts of one, such as CQADupstack's forums; they add up to 1). Tests are by random
sign flips (Smucker, Allan and Carterette, CIKM 2007), intervals by the stratified bootstrap, several tasks at once by
Holm's step-down (1979).

Shapes: `strata` is one array per task, [n_t] differences per query (challenger − champion) or [n_t, S] for S
comparisons at once, all judged with the same resamples; results are [] or [S].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Strata = Sequence[Floats]
Weights = Sequence[float] | None  # of the tasks in the mean; None: equal

CHUNK = 1 << 22  # resampled values held at a time
ALLOWANCE, SMALL_TASK_ALLOWANCE = 1.04, 2.5  # see detectable_difference
TIE = 1e-12  # resampled means nearer than this to the observed one count as equal: sums of the same numbers in another order


def macro_mean(strata: Strata, weights: Weights = None) -> Floats:
    """Mean over tasks of the mean over queries."""
    return np.asarray(sum(w * d.mean(axis=0) for w, d in zip(_weights(strata, weights), strata, strict=True)))


def standard_error(strata: Strata, weights: Weights = None) -> Floats:
    """Standard error of the macro mean of differences, tasks being independent.

    One query says nothing of its task's spread: then it is taken for 1, the largest that differences of scores can have.
    """
    variances = [
        w * w * (d.var(axis=0, ddof=1) / len(d) if len(d) > 1 else np.ones(d.shape[1:]))
        for w, d in zip(_weights(strata, weights), strata, strict=True)
    ]
    return np.asarray(np.sqrt(np.sum(variances, axis=0)))


def superiority_p(strata: Strata, margin: float, draws: int, seed: int, weights: Weights = None) -> Floats:
    """One-sided p-value of "the macro mean of the differences is at most `margin`", by random sign flips.

    Under the hypothesis' edge each query's difference beyond the margin is as likely as its negative. A negative
    margin makes it a test of non-inferiority. The observed assignment counts as one of the draws, so p is never 0 and
    the level holds for any number of draws (Phipson and Smyth 2010).
    """
    weighted = np.concatenate(
        [(d - margin) * (w / len(d)) for w, d in zip(_weights(strata, weights), strata, strict=True)]
    )
    observed = weighted.sum(axis=0)
    limit = observed - TIE
    reached = np.zeros(observed.shape)
    for signs in _signs(len(weighted), draws, seed):
        reached += (signs @ weighted >= limit).sum(axis=0)
    return np.asarray((reached + 1) / (draws + 1))


def difference_p(differences: Floats, draws: int, seed: int) -> float:
    """Two-sided p-value of "no difference on this task", by random sign flips."""
    observed = abs(differences.sum()) - TIE * len(differences)
    reached = sum(
        int((np.abs(signs @ differences) >= observed).sum()) for signs in _signs(len(differences), draws, seed)
    )
    return (reached + 1) / (draws + 1)


def bootstrap_interval(
    strata: Strata, level: float, draws: int, seed: int, weights: Weights = None
) -> tuple[Floats, Floats]:
    """Two-sided percentile interval of the macro mean; queries are drawn with replacement within their task."""
    means = np.zeros((draws, *strata[0].shape[1:]))
    for number, (weight, values) in enumerate(zip(_weights(strata, weights), strata, strict=True)):
        start = 0
        for counts in query_counts(len(values), draws, (seed, number)):
            means[start : start + len(counts)] += counts @ values * (weight / len(values))
            start += len(counts)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return np.asarray(low), np.asarray(high)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: below α exactly where the step-down rejects at family level α."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = running
    return [float(x) for x in adjusted]


def detectable_difference(strata: Strata, alpha: float, power: float, weights: Weights = None) -> Floats:
    """Least true difference beyond the margin that a one-sided test at `alpha` finds with probability `power`.

    Normal approximation with the measured spread of the differences. That test and interval must agree, heavy tails and
    small tasks take some power away, so it is widened by allowances that simulations ask for
    (tests/evaluation/test_statistics.py).
    """
    quantile = NormalDist().inv_cdf
    freedom = max(1, min(len(d) for d in strata) - 1)
    return np.asarray(
        (quantile(1 - alpha) + quantile(power))
        * standard_error(strata, weights)
        * (ALLOWANCE + SMALL_TASK_ALLOWANCE / freedom)
    )


def _weights(strata: Strata, weights: Weights) -> Sequence[float]:
    return [1 / len(strata)] * len(strata) if weights is None else weights


def _signs(n: int, draws: int, seed: Any) -> Iterator[Floats]:
    """±1 with equal chance, [chunk, n] at a time, `draws` rows in all."""
    random = np.random.default_rng(seed)
    rows = max(1, CHUNK // max(1, n))
    for start in range(0, draws, rows):
        count = min(rows, draws - start)
        bits = np.unpackbits(np.frombuffer(random.bytes(count * ((n + 7) // 8)), np.uint8).reshape(count, -1), axis=1)
        yield np.asarray(bits[:, :n] * 2.0 - 1.0, np.float64)


def query_counts(n: int, draws: int, seed: Any) -> Iterator[Floats]:
    """How often each of n queries is drawn in a resample of n, [chunk, n] at a time."""
    random = np.random.default_rng(seed)
    rows = max(1, CHUNK // n)
    for start in range(0, draws, rows):
        count = min(rows, draws - start)
        drawn = random.integers(n, size=(count, n)) + np.arange(count)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n).astype(np.float64)
