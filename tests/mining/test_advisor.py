"""The advisor against counting by hand, and its suggestions on candidates made to have an answer."""

from __future__ import annotations

import numpy as np
import pytest

from nvr_tasks.errors import NvrError
from nvr_tasks.mining import Candidates, MiningSpec, mine, reselect, search_candidates
from nvr_tasks.mining.advisor import Curve, curves, suggest


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
    for curve in curves(stored, MiningSpec(num_negatives=wanted, positive_policy="each")):
        for i in range(0, len(curve.thresholds), 5):
            spec = MiningSpec(curve.method, float(curve.thresholds[i]), num_negatives=wanted, positive_policy="each")
            kept = total = short = false = mined = rows = 0
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
                    if len(own) > 1 and (len(below) >= wanted or depth == 120):
                        hidden = [n for n in own if n != p and exact[q, n] < ceiling]
                        negatives = sorted([*below, *hidden], key=lambda n: -exact[q, n])[:wanted]
                        mined += len(negatives)
                        false += len(set(hidden) & set(negatives))
            assert curve.kept[i] == pytest.approx(kept / total)
            assert curve.short[i] == pytest.approx(short / rows)
            assert (curve.false[i], curve.mined[i]) == (false, mined)
            np.testing.assert_allclose(
                curve.margin[i], np.quantile(margins, [0.1, 0.5, 0.9]) if margins else [np.nan] * 3, atol=1e-9
            )
            if depth == 120:  # with everything stored, short rows are short rows of the selection itself
                assert short == len(reselect(stored, spec).result.short_rows)


def test_of_many_positives_a_few_take_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    from nvr_tasks.mining import advisor

    monkeypatch.setattr(advisor, "SHOWN_PER_QUERY", 1)
    _, _, positives, stored = problem(2)
    (curve, *_) = curves(stored, MiningSpec(num_negatives=3))
    several = sum(len(p) > 1 for p in positives)
    assert 0 < curve.mined.max() <= 3 * several


def made(false: list[int], short: list[float], mined: int = 1000) -> Curve:
    n, thresholds = len(false), np.array([0.8, 0.9, 0.95, 1.0])
    nothing = np.zeros((n, 3))
    return Curve("perc_pos", thresholds, np.full(n, 0.5), np.array(short), nothing, np.array(false), np.full(n, mined))


def test_the_hardest_threshold_with_few_false_negatives_is_suggested() -> None:
    assert suggest([made([1, 9, 60, 400], [0, 0, 0, 0])], "perc_pos").threshold == 0.9
    assert suggest([made([1, 9, 20, 400], [0, 0, 0, 0])], "perc_pos").threshold == 0.95
    found = suggest([made([30, 9, 20, 9], [0, 0, 0, 0.5])], "perc_pos")
    assert found.threshold == 0.95, "threshold 1 leaves rows short"
    assert any("2.00% of 1,000 negatives would be hidden positives" in reason for reason in found.reasons)
    assert suggest([made([1, 9, 60, 400], [0.5, 0.5, 0, 0])], "perc_pos").threshold == 0.9, "short rows weigh less"


def test_where_all_have_many_the_least_is_named_and_said_so() -> None:
    found = suggest([made([200, 150, 300, 400], [0, 0, 0, 0])], "perc_pos")
    assert found.threshold == 0.9
    assert "every threshold lets more than 5% hidden positives in" in found.reasons[0]


def test_without_pairs_it_is_the_paper_s_setting() -> None:
    found = suggest([made([0, 0, 0, 0], [0, 0, 0, 0], mined=7)], "perc_pos")
    assert found.threshold == 0.95
    assert "too few (under 400) to tell" in found.reasons[0]


def test_copies_count_once() -> None:
    """With groups, against hiding the positives for real and mining again."""
    rng = np.random.default_rng(4)
    texts = rng.standard_normal((60, 8))
    corpus = np.repeat(texts, 3, axis=0).astype(np.float32)  # each passage three times
    corpus /= np.linalg.norm(corpus, axis=1, keepdims=True)
    groups = np.repeat(np.arange(60), 3)
    positives = [[3 * a, 3 * b + 1, 3 * b] for a, b in (rng.choice(60, 2, replace=False) for _ in range(40))]
    queries = np.array([corpus[p].mean(axis=0) + 0.3 * rng.standard_normal(8) for p in positives], np.float32)
    stored = search_candidates(queries, corpus, positives, 180, groups=groups)
    spec = MiningSpec("perc_pos", 0.9, num_negatives=3, positive_policy="each")
    (curve,) = curves(stored, spec, grid={"perc_pos": (0.9,)})
    assert curve.short[0] == len(reselect(stored, spec).result.short_rows) / 120
    false = mined = 0
    for query, (a, b, _) in zip(queries, positives, strict=True):
        best_b = b if query @ corpus[b] >= query @ corpus[b - 1] else b - 1
        for shown, hidden in ((a, best_b), (best_b, a)):
            (result,) = mine(query[None], corpus, [[shown]], spec, groups=groups)
            ids = result.negative_ids[result.negative_ids >= 0]
            mined += len(ids)
            false += int((groups[ids] == groups[hidden]).sum())
    assert false > 0
    assert (curve.false[0], curve.mined[0]) == (false, mined)


@pytest.mark.parametrize("policy", ["min", "max", "each"])
def test_short_rows_are_those_of_the_spec(policy: str) -> None:
    _, _, _, stored = problem(5, depth=120)
    spec = MiningSpec("perc_pos", 0.5, sampling="sampled", sample_from=110, positive_policy=policy)
    (curve,) = curves(stored, spec, grid={"perc_pos": (0.5,)})
    everything = MiningSpec("perc_pos", 0.5, num_negatives=110, positive_policy=policy)
    result = reselect(stored, everything).result
    assert curve.short[0] == len(result.short_rows) / len(result.query_rows)
    assert 0 < curve.short[0] < 1


def test_candidates_that_are_too_few_leave_all_rows_short() -> None:
    _, _, _, stored = problem(3, depth=2)
    found = curves(stored, MiningSpec(num_negatives=5))
    assert (found[0].short == 1).all()
    assert suggest(found, "perc_pos").threshold == 0.95


def test_a_method_without_a_threshold_is_refused() -> None:
    with pytest.raises(NvrError, match="method naive has no threshold"):
        suggest([], "naive")
