"""faiss indexes against a brute force."""

import numpy as np
import pytest

from nvr_tasks.serving import ann


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    made = np.random.default_rng(3).standard_normal((500, 24)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def test_a_flat_index_finds_all(vectors: np.ndarray) -> None:
    index = ann.build(vectors, "flat", 8, 16, 16)
    assert ann.recall(index, vectors, vectors[:40], 10) == 1.0


def test_recall_is_that_of_a_brute_force(vectors: np.ndarray) -> None:
    index = ann.build(vectors, "hnsw", 4, 8, 8)
    queries = -vectors[:50]
    true = np.argsort(-(queries.astype(np.float64) @ vectors.T.astype(np.float64)), axis=1)[:, :10]
    found = index.search(queries, 10)[1]
    expected = np.mean([len(set(t) & set(f)) / 10 for t, f in zip(true, found, strict=True)])
    assert expected < 1, "too easy to tell anything"
    assert ann.recall(index, vectors, queries, 10) == pytest.approx(expected)


def test_equal_passages_stand_for_each_other(vectors: np.ndarray) -> None:
    """Which of several copies is found says nothing about the index."""
    copies = np.repeat(vectors[:30], 4, axis=0)
    index = ann.build(copies, "flat", 8, 16, 16)
    assert ann.recall(index, copies, vectors[:30], 2) == 1.0
