"""Comparison of variants that were trained with several seeds and scored on the same queries. numpy only.

Every variant has a score per seed and query, so both are resampled: queries with replacement within their task, seeds
with replacement once for all tasks, since a model trained with a seed is the same on each (the crossed bootstrap of
Owen, Annals of Applied Statistics 2007). Of S seeds S − 1 are drawn, which makes the variance of the seeds' mean come
out unbiased where S is small (Rao and Wu, JASA 1988); one seed alone says nothing of its spread, and the interval is
then over queries only. All variants are judged by the same resamples, so differences are paired by query and by seed.

Shapes: `strata` is one array per task, [S, n_t, V]: S seeds, n_t queries, V variants (or differences of variants).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nvr_tasks.evaluation.statistics import query_counts

Floats = npt.NDArray[np.float64]


def macro_mean(strata: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """Mean over tasks (by weight) of the mean over seeds and queries, [V]."""
    return np.asarray(sum(w * d.mean(axis=(0, 1)) for w, d in zip(weights, strata, strict=True)))


def resampled(strata: Sequence[Floats], weights: Sequence[float], draws: int, seed: int) -> Floats:
    """The macro mean in each resample, [draws, V]."""
    seeds = len(strata[0])
    shares = _seed_shares(seeds, draws, seed)
    means = np.zeros((draws, strata[0].shape[2]))
    for number, (weight, values) in enumerate(zip(weights, strata, strict=True)):
        count = values.shape[1]
        flat = values.transpose(1, 0, 2).reshape(count, -1)  # [n, S·V]
        start = 0
        for counts in query_counts(count, draws, (seed, 1 + number)):
            stop = start + len(counts)
            by_seed = (counts @ flat).reshape(len(counts), seeds, -1) / count
            means[start:stop] += weight * np.einsum("bs,bsv->bv", shares[start:stop], by_seed)
            start = stop
    return means


def interval(means: Floats, alpha: float) -> tuple[Floats, Floats]:
    """Two-sided percentile interval of each column, [V] and [V]."""
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2], axis=0)
    return np.asarray(low), np.asarray(high)


def two_sided_p(means: Floats) -> Floats:
    """How much of the resamples of a difference lies on the other side of 0, doubled, [V]; never 0.

    Below α exactly where the two-sided percentile interval excludes 0, but for the draws' own grain.
    """
    below, above = (means <= 0).sum(axis=0), (means >= 0).sum(axis=0)
    return np.asarray(np.minimum(1.0, 2 * (np.minimum(below, above) + 1) / (len(means) + 1)))


def seeds_to_queries(strata: Sequence[Floats], weights: Sequence[float]) -> float | None:
    """Spread of the seeds' macro means (standard deviation) over the standard error that queries give it.

    Far above 1, the seeds decide, and an interval from a few of them is too narrow: it knows their spread only roughly.
    None with one seed, or if queries do not differ.

    Args:
        strata: one array per task, [S, n_t].
        weights: of the tasks.
    """
    if len(strata[0]) < 2:
        return None
    by_seed = sum(w * d.mean(axis=1) for w, d in zip(weights, strata, strict=True))
    variance = sum(w**2 * d.mean(axis=0).var() / max(1, d.shape[1] - 1) for w, d in zip(weights, strata, strict=True))
    return float(np.std(by_seed, ddof=1) / np.sqrt(variance)) if variance else None


def _seed_shares(seeds: int, draws: int, seed: int) -> Floats:
    """Weight of each seed in each resample, [draws, S]; rows add up to 1."""
    drawn = max(1, seeds - 1)
    if seeds == 1:
        return np.ones((draws, 1))
    random = np.random.default_rng((seed, 0))
    chosen = random.integers(seeds, size=(draws, drawn)) + np.arange(draws)[:, None] * seeds
    return np.bincount(chosen.ravel(), minlength=draws * seeds).reshape(draws, seeds) / drawn
