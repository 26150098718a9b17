"""Intervals against scipy's, and against what clustered draws do when they are repeated."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from nvr_tasks.mining.intervals import Share, clustered, wilson


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (17, 1000), (999, 1000)])
def test_wilson_interval_is_scipy_s(successes: int, trials: int) -> None:
    reference = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson(successes, trials) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_nothing_tried_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    nothing = clustered(np.zeros(3, np.int64), np.zeros(3, np.int64))
    assert (nothing.hits, nothing.trials, nothing.low, nothing.high) == (0, 0, 0.0, 1.0)
    assert str(nothing) == "–"
    assert str(Share(1, 4, 0.05, 0.7)) == "25.00% (5.00% to 70.00%)"


def test_clusters_of_one_are_plain_trials() -> None:
    hits = np.array([1] * 17 + [0] * 183)
    found = clustered(hits, np.ones(200, np.int64))
    assert (found.hits, found.trials) == (17, 200)
    assert (found.low, found.high) == pytest.approx(wilson(17, 200), abs=1e-3)


def test_clusters_that_agree_count_once_each() -> None:
    """Ten trials of a cluster that are all alike are one trial."""
    hits = np.array([10] * 30 + [0] * 70)
    found = clustered(hits, np.full(100, 10))
    assert (found.low, found.high) == pytest.approx(wilson(30, 100), abs=2e-3)
    assert clustered(np.zeros(100, np.int64), np.full(100, 10)).high == pytest.approx(wilson(0, 100)[1])
    assert clustered(np.array([3]), np.array([10])).high == pytest.approx(wilson(0.3, 1)[1])


@pytest.mark.parametrize("share", [0.02, 0.2])
def test_the_interval_holds_the_truth_as_often_as_it_says(share: float) -> None:
    """Clusters of 1 to 8 trials, whose own shares vary about the true one; plain Wilson misses it far too often."""
    rng = np.random.default_rng(5)
    runs, clusters, held, plain = 600, 300, 0, 0
    for _ in range(runs):
        trials = rng.integers(1, 9, clusters)
        hits = rng.binomial(trials, rng.beta(share, 1 - share, clusters))  # trials of a cluster correlate by 0.5
        found = clustered(hits, trials)
        held += found.low <= share <= found.high
        low, high = wilson(int(hits.sum()), int(trials.sum()))
        plain += low <= share <= high
    assert 0.92 <= held / runs <= 0.975
    assert plain / runs < 0.85
