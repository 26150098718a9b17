"""Candidates from a faiss index: what is there is exact, what is missing is measured."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest

from nvr_tasks.errors import NvrError
from nvr_tasks.mining import Approximate, Candidates, MiningSpec, reselect, search_candidates

N, Q, D = 3000, 60, 24


def problem() -> dict[str, Any]:
    rng = np.random.default_rng(2)
    centres = rng.standard_normal((30, D))
    corpus = (centres[rng.integers(0, 30, N)] + 0.6 * rng.standard_normal((N, D))).astype(np.float32)
    corpus[100:110] = corpus[0]  # equal vectors: ties
    queries = (centres[rng.integers(0, 30, Q)] + 0.6 * rng.standard_normal((Q, D))).astype(np.float32)
    near = np.argsort(-(queries @ corpus.T), axis=1)
    return {
        "query_vectors": queries,
        "corpus_vectors": corpus,
        "positives": [near[q, : 1 + q % 40].tolist() for q in range(Q)],
        "exclude": [near[q, 41:43].tolist() for q in range(Q)],
        "device": "cpu",
    }


def find(depth: int = 20, **how: Any) -> Candidates:
    return search_candidates(**problem(), depth=depth, approximate=Approximate(**how))


def test_with_every_list_probed_it_is_the_exact_search() -> None:
    exact = search_candidates(**problem(), depth=20)
    found = find(lists=16, probes=16)
    np.testing.assert_array_equal(found.ids, exact.ids)
    np.testing.assert_array_equal(found.scores, exact.scores)
    assert found.sampled is not None
    assert found.sampled.recall.value == 1.0
    assert exact.sampled is None


def test_what_it_finds_is_scored_exactly_and_never_blocked() -> None:
    p = problem()
    exact = search_candidates(**p, depth=N)
    found = find(lists=30, probes=2, min_recall=0.2)
    share = hits = 0
    for q in range(Q):
        ids = [n for n in found.ids[q].tolist() if n >= 0]
        assert not set(ids) & {*p["positives"][q], *p["exclude"][q]}
        place = {n: i for i, n in enumerate(exact.ids[q].tolist())}
        assert [place[n] for n in ids] == sorted(place[n] for n in ids), "sorted by score, ties by id"
        assert found.scores[q, : len(ids)].tolist() == [exact.scores[q, place[n]] for n in ids]
        hits, share = hits + sum(place[n] < 20 for n in ids), share + 20
    assert found.sampled is not None
    assert (found.sampled.recall.hits, found.sampled.recall.trials) == (hits, share), "all queries are in the sample"
    assert 0.2 < found.sampled.recall.value < 1


def test_rows_that_it_cannot_fill_are_searched_again_exactly() -> None:
    p = problem()
    found = find(lists=30, probes=1, min_recall=0.0, depth=100)
    assert (found.ids[:, -1] < 0).any(), "a cell has fewer passages than that"
    spec = MiningSpec("naive", num_negatives=100, positive_policy="min")
    result = reselect(found, spec, lambda: (p["query_vectors"], p["corpus_vectors"]), device="cpu")
    assert len(result.searched_again)
    assert not len(result.result.short_rows)
    # A ceiling holds whatever the index proposed.
    below = reselect(
        found, MiningSpec("perc_pos", 0.9), lambda: (p["query_vectors"], p["corpus_vectors"]), device="cpu"
    ).result
    assert (below.negative_scores < below.ceilings[:, None]).all()


def test_too_little_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(NvrError, match=r"the index finds .* min_recall is 0\.99: raise probes \(now 1 of 30 lists\)"):
        find(lists=30, probes=1, min_recall=0.99)


def test_the_same_again() -> None:
    a, b = find(lists=30, probes=4, min_recall=0), find(lists=30, probes=4, min_recall=0)
    np.testing.assert_array_equal(a.ids, b.ids)


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NvrError, match="at least 1"):
        Approximate(probes=0)
    with pytest.raises(NvrError, match=r"min_recall 1\.5"):
        Approximate(min_recall=1.5)
    bad = problem()
    bad["corpus_vectors"][7, 3] = np.inf
    with pytest.raises(NvrError, match="row 7 has NaN or infinite"):
        search_candidates(**bad, depth=5, approximate=Approximate())
    importing = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return importing(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(NvrError, match=r"needs faiss: pip install 'nvr-tasks\[faiss-cpu\]'"):
        find()
