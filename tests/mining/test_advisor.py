"""The advisor against counting by hand, and its suggestions on candidates made to have an answer."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from nvr_tasks.errors import NvrError
from nvr_tasks.mining import Candidates, MiningSpec, reselect, search_candidates
from nvr_tasks.mining.advisor import Curve, curves, suggest, wilson


def problem(seed: int, depth: int = 60) -> tuple[np.ndarray, np.ndarray, list[list[int]], Candidates]:
    rng = np.random.default_rng(seed)
    corpus = rng.standard_normal((120, 8)).astype(np.float32)
    corpus /= np.linalg.norm(corpus, axis=1, keepdims=True)
    positives = [rng.choice(120, rng.integers(1, 4), replace=False).tolist() for _ in range(30)]
    queries = np.array([corpus[p].mean(axis=0) + 0.2 * rng.standard_normal(8) for p in positives], np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    return queries, corpus, positives, search_candidates(queries, corpus, positives, depth)


@pytest.mark.parametrize("depth", [20, 120])
def test_curves_are_what_counting_gives(depth: int) -> None:
    queries, corpus, positives, stored = problem(1, depth)
    wanted = 3
    exact = queries.astype(np.float64) @ corpus.astype(np.float64).T
    for curve in curves(stored, wanted):
        for i in range(0, len(curve.thresholds), 5):
            spec = MiningSpec(curve.method, float(curve.thresholds[i]), num_negatives=wanted, positive_policy="each")
            kept = total = short = leaked = hidden = rows = 0
            margins = []
            for q, own in enumerate(positives):
                ids = [n for n in stored.ids[q].tolist() if n >= 0]
                for p in own:
                    s, t = exact[q, p], curve.thresholds[i]
                    ceiling = {"perc_pos": s - abs(s) * (1 - t), "margin_pos": s - t, "abs": t}[curve.method]
                    below = [n for n in ids if exact[q, n] < ceiling]
                    rows, total, kept, short = (
                        rows + 1,
                        total + len(ids),
                        kept + len(below),
                        short + (len(below) < wanted),
                    )
                    margins += [s - exact[q, below[0]]] if below else []
                    for other in own:
                        if other != p:
                            hidden += 1
                            better = [n for n in below if exact[q, n] >= exact[q, other]]
                            leaked += exact[q, other] < ceiling and len(better) < wanted
            assert curve.kept[i] == pytest.approx(kept / total)
            assert curve.short[i] == pytest.approx(short / rows)
            assert (curve.leaked[i], curve.hidden) == (leaked, hidden)
            np.testing.assert_allclose(
                curve.margin[i], np.quantile(margins, [0.1, 0.5, 0.9]) if margins else [np.nan] * 3, atol=1e-9
            )
            if depth == 120:  # with everything stored, short rows are short rows of the selection itself
                assert short == len(reselect(stored, spec).result.short_rows)


def test_many_pairs_are_sampled_without_a_pair_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvr_tasks.mining.advisor.MOST_HIDDEN", 25)
    _, _, _, stored = problem(2)
    (curve, *_) = curves(stored, 3)
    assert curve.hidden == 25
    from nvr_tasks.mining.advisor import _hidden_pairs

    shown, hidden = _hidden_pairs(stored, 0)
    owners = stored.judged.positives.owners
    assert (shown != hidden).all()
    assert (owners[shown] == owners[hidden]).all()


def made(leaked: list[int], short: list[float], hidden: int = 1000) -> Curve:
    n = len(leaked)
    thresholds = np.array([0.8, 0.9, 0.95, 1.0])
    return Curve("perc_pos", thresholds, np.full(n, 0.5), np.array(short), np.zeros((n, 3)), np.array(leaked), hidden)


def test_the_hardest_threshold_that_leaks_little_is_suggested() -> None:
    assert suggest([made([1, 9, 60, 400], [0, 0, 0, 0])], "perc_pos").threshold == 0.9
    assert suggest([made([1, 9, 20, 400], [0, 0, 0, 0])], "perc_pos").threshold == 0.95
    few = suggest([made([30, 9, 20, 9], [0, 0, 0, 0.5])], "perc_pos")
    assert few.threshold == 0.95, "threshold 1 leaves rows short"
    assert any("2.00% would be mined" in reason for reason in few.reasons)


def test_where_all_leak_the_least_is_named_and_said_so() -> None:
    found = suggest([made([200, 150, 300, 400], [0, 0, 0, 0])], "perc_pos")
    assert found.threshold == 0.9
    assert "no threshold keeps the leak below 5%" in found.reasons[0]


def test_without_pairs_it_is_the_paper_s_setting() -> None:
    found = suggest([made([0, 0, 0, 0], [0, 0, 0, 0], hidden=7)], "perc_pos")
    assert found.threshold == 0.95
    assert "too few" in found.reasons[0]


def test_what_cannot_be_advised_is_refused() -> None:
    _, _, _, stored = problem(3, depth=2)
    with pytest.raises(NvrError, match="2 deep, less than num_negatives 5"):
        curves(stored, 5)
    with pytest.raises(NvrError, match="method naive has no threshold"):
        suggest([], "naive")


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (17, 1000), (999, 1000)])
def test_wilson_interval_is_scipy_s(successes: int, trials: int) -> None:
    reference = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson(successes, trials) == pytest.approx((reference.low, reference.high), abs=2e-5)
