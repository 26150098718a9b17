"""Near-duplicates of positives and positives of near-duplicate queries, against cosines computed one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mine_properties import scanning_with

from nvr_tasks.errors import NvrError
from nvr_tasks.mining import MiningSpec, guards, mine, reselect, search_candidates
from nvr_tasks.mining.corpus import NotFiniteError

SPEC = MiningSpec("naive", num_negatives=3)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


def clusters(seed: int, rows: int, dim: int = 24) -> np.ndarray:
    """Vectors of any length around few centres, so that many pairs are near-duplicates and many are not."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((5, dim))
    near = rng.uniform(0.01, 0.6, (rows, 1))
    made = centres[rng.integers(0, 5, rows)] + near * rng.standard_normal((rows, dim))
    return (made * rng.uniform(0.5, 2, (rows, 1))).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.7, 0.9, 0.97]),
    st.sampled_from(["cpu", "torch"]),
    st.sampled_from(["float32", "bfloat16", "int8"]),
)
def test_no_near_duplicate_of_a_positive_is_mined(seed: int, bound: float, scan: str, screen: str) -> None:
    corpus, queries = clusters(seed, 90), clusters(seed + 1, 7)
    rng = np.random.default_rng(seed)
    positives = [rng.choice(90, 2, replace=False).tolist() for _ in range(7)]
    exclude = [rng.choice(90, 1).tolist() for _ in range(7)]
    alike = cosines(corpus, corpus)
    with scanning_with(scan):
        (result,) = mine(
            queries, corpus, positives, SPEC, exclude=exclude, duplicate_similarity=bound, screen=screen, block_rows=40
        )
    scores = queries.astype(np.float64) @ corpus.astype(np.float64).T
    for q in range(7):
        near = {n for p in (*positives[q], *exclude[q]) for n in range(90) if alike[p, n] >= bound}
        if (np.abs(alike[[*positives[q], *exclude[q]]] - bound) < 1e-6).any():
            continue  # float32 lengths cannot tell
        barred = near | set(positives[q])
        expected = [n for n in np.argsort(-scores[q], kind="stable").tolist() if n not in barred][:3]
        assert [n for n in result.negative_ids[q].tolist() if n >= 0] == expected
        assert result.skipped_per_row["positive"][q] == len(positives[q])
        assert result.skipped_per_row["near_duplicate"][q] == len(near - set(positives[q]) - set(exclude[q]))


def test_more_near_duplicates_than_are_looked_for_at_first() -> None:
    rng = np.random.default_rng(0)
    same = np.ones((400, 8)) + 0.01 * rng.standard_normal((400, 8))
    corpus = np.concatenate([same, rng.standard_normal((50, 8)) - 3]).astype(np.float32)
    (result,) = mine(corpus[:1], corpus, [[0]], SPEC, duplicate_similarity=0.99)
    assert (result.negative_ids >= 400).all()
    assert result.skipped["near_duplicate"] == 399


@pytest.mark.parametrize("bound", [0.8, 0.95])
def test_positives_of_similar_queries_are_never_mined(bound: float) -> None:
    corpus, queries = clusters(3, 60), clusters(4, 30)
    ranked = np.argsort(-(queries @ corpus.T), axis=1)
    positives = [[int(ranked[q, n])] for q, n in enumerate(np.random.default_rng(5).integers(0, 3, 30))]
    (result,) = mine(queries, corpus, positives, SPEC, query_similarity=bound)
    alike = cosines(queries, queries) >= bound
    assert 30 < alike.sum() < 900, "some queries are alike and some are not"
    for q in range(30):
        barred = {positives[other][0] for other in np.flatnonzero(alike[q])}
        assert not barred & set(result.negative_ids[q].tolist())
        assert result.skipped_per_row["excluded"][q] == len(barred - set(positives[q]))
    (plain,) = mine(queries, corpus, positives, SPEC)
    assert (plain.negative_ids != result.negative_ids).any()


def test_stored_candidates_leave_them_out_as_well() -> None:
    corpus, queries = clusters(6, 80), clusters(7, 9)
    positives = [[int(n)] for n in np.random.default_rng(8).integers(0, 80, 9)]
    guards = {"duplicate_similarity": 0.9, "query_similarity": 0.9}
    stored = search_candidates(queries, corpus, positives, 10, **guards)
    for spec in (SPEC, MiningSpec("perc_pos", 0.6, num_negatives=5)):
        (fresh,) = mine(queries, corpus, positives, spec, **guards)
        again = reselect(stored, spec, lambda: (queries, corpus)).result
        np.testing.assert_array_equal(again.negative_ids, fresh.negative_ids)
        assert again.skipped == fresh.skipped


@pytest.mark.parametrize("bound", [0.0, -0.5, 1.5, float("nan")])
@pytest.mark.parametrize("name", ["duplicate_similarity", "query_similarity"])
def test_a_similarity_that_cannot_be_meant_is_refused(name: str, bound: float) -> None:
    corpus = clusters(1, 10)
    with pytest.raises(NvrError, match=f"{name} {bound} is out of range: give a cosine above 0"):
        mine(corpus[:2], corpus, [[0], [1]], SPEC, **{name: bound})


@pytest.mark.parametrize("argument", ["duplicate_similarity", "query_similarity"])
def test_a_bound_of_one_finds_identical_vectors(argument: str) -> None:
    rng = np.random.default_rng(7)
    corpus = rng.standard_normal((200, 48)).astype(np.float32)
    corpus = np.concatenate([corpus, corpus])  # row n and n + 200 are the same
    queries = corpus[:200] + 0.1 * rng.standard_normal((200, 48)).astype(np.float32)
    positives = [[n] for n in range(200)]
    if argument == "query_similarity":
        queries, positives = np.concatenate([queries, queries]), [[n] for n in range(400)]
    (result,) = mine(queries, corpus, positives, SPEC, **{argument: 1.0})
    twins = (np.arange(len(queries)) + 200) % 400
    assert not (result.negative_ids == twins[:, None]).any()


@pytest.mark.parametrize("screen", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_positive_that_is_not_finite_is_named(screen: str, value: float) -> None:
    corpus = np.random.default_rng(1).standard_normal((90, 8)).astype(np.float32)
    corpus[77, 3] = value
    with pytest.raises(NotFiniteError, match="corpus_vectors row 77 has NaN or infinite"):
        mine(corpus[:2], corpus, [[0], [77]], SPEC, duplicate_similarity=0.98, screen=screen, block_rows=16)


@pytest.mark.parametrize("argument", ["duplicate_similarity", "query_similarity"])
def test_a_bound_that_nearly_all_pairs_reach_is_refused(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "MOST_PAIRS", 20_000)
    vectors = (np.ones((300, 8)) + 0.001 * np.random.default_rng(2).standard_normal((300, 8))).astype(np.float32)
    with pytest.raises(
        NvrError, match=rf"{argument} 0.9 makes near-duplicates of at least [0-9,]+ pairs.*set it to null"
    ):
        mine(vectors, vectors, [[n] for n in range(300)], SPEC, **{argument: 0.9})
