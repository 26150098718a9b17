"""Input that cannot be meant is refused with the fact, the value and the fix."""

from __future__ import annotations

import numpy as np
import pytest

from nvr_tasks.errors import NvrError
from nvr_tasks.mining import MiningSpec, mine, reselect, search_candidates

X, Y = np.eye(2, 3, dtype=np.float32), np.eye(4, 3, dtype=np.float32)


def spoiled(array: np.ndarray, row: int, value: float) -> np.ndarray:
    copy = array.copy()
    copy[row, 1] = value
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_vectors": X[0]}, "query_vectors has shape (3,)"),
        ({"query_vectors": X[:0]}, "query_vectors is empty"),
        ({"query_vectors": X.astype(int)}, "query_vectors has type int"),
        ({"query_vectors": spoiled(X, 1, np.nan)}, "query_vectors row 1 has NaN"),
        ({"corpus_vectors": Y[:, :2]}, "query_vectors have 3 dimensions, corpus_vectors 2"),
        ({"corpus_vectors": []}, "has no blocks"),
        ({"corpus_vectors": [Y, Y[:0]]}, "block 1 of corpus_vectors is empty"),
        ({"corpus_vectors": [Y, Y[:, :2]]}, "block 1 of corpus_vectors has 2 dimensions, block 0 has 3"),
        ({"corpus_vectors": iter([Y])}, "can be read only once"),
        ({"corpus_vectors": 7}, "corpus_vectors is int"),
        ({"corpus_vectors": spoiled(Y, 3, np.inf)}, "corpus_vectors row 3 has NaN or infinite"),
        ({"corpus_vectors": spoiled(Y, 0, np.nan)}, "corpus_vectors row 0 has NaN or infinite"),
        ({"corpus_vectors": [Y[:2], spoiled(Y[2:], 1, np.nan)]}, "corpus_vectors row 3 has NaN or infinite"),
        ({"corpus_vectors": Y * 1e30, "query_vectors": X * 1e30}, "overflow"),
        ({"positives": [[0]]}, "positives has 1 lists for 2 queries"),
        ({"positives": [[0], []]}, "query 1 has no positive"),
        ({"positives": [[0], [4]]}, "positives[1] names corpus row 4, but the corpus has rows 0 to 3"),
        ({"positives": [[0], [-1]]}, "positives[1] names corpus row -1"),
        ({"positives": [[0], [0.5]]}, "positives[1] is [0.5]"),
        ({"positives": [0, 1]}, "positives[0] is 0"),
        ({"exclude": [[9], []]}, "exclude[0] names corpus row 9"),
        ({"groups": [0, 1]}, "groups has shape (2,)"),
        ({"groups": [0.0, 1.0, 2.0, 3.0]}, "type float64"),
        ({"specs": []}, "specs is empty"),
        ({"specs": MiningSpec(num_negatives=5)}, "num_negatives 5 exceeds the corpus of 4 rows"),
        ({"seed": -1}, "seed -1"),
        ({"query_keys": np.zeros(3, np.uint64)}, "query_keys has shape (3,)"),
        ({"block_rows": 0}, "block_rows 0"),
    ],
)
def test_refused(changes: dict, message: str) -> None:
    arguments = {
        "query_vectors": X,
        "corpus_vectors": Y,
        "positives": [[0], [1]],
        "specs": MiningSpec("naive"),
        "device": "cpu",
    }
    with pytest.raises(NvrError) as error:
        mine(**(arguments | changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "topk"}, "method 'topk' is unknown: one of perc_pos"),
        ({"sampling": "all"}, "sampling 'all'"),
        ({"positive_policy": "mean"}, "positive_policy 'mean'"),
        ({"threshold": 0.0}, "out of range for perc_pos: 0 < threshold ≤ 1"),
        ({"threshold": 1.1}, "out of range for perc_pos"),
        ({"threshold": float("nan")}, "out of range"),
        ({"method": "margin_pos", "threshold": -0.1}, "out of range for margin_pos"),
        ({"method": "abs", "threshold": float("inf")}, "out of range for abs"),
        ({"method": "naive", "threshold": 0.5}, "no meaning for method naive"),
        ({"num_negatives": 0}, "num_negatives 0"),
        ({"num_negatives": True}, "num_negatives True"),
        ({"shift": -1}, "shift -1"),
        ({"sampling": "sampled", "sample_from": 2}, "sample_from 2 is less than num_negatives 4"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"min_score": float("nan")}, "min_score nan"),
        ({"method": "random", "min_score": 0.1}, "method random"),
    ],
)
def test_specs_refused(changes: dict, message: str) -> None:
    with pytest.raises(NvrError) as error:
        MiningSpec(**changes)
    assert message in str(error.value)


def test_a_stored_ranking_says_what_it_cannot_do() -> None:
    stored = search_candidates(X, Y, [[0], [1]], 1)
    with pytest.raises(NvrError, match="whose scores are not stored: give vectors"):
        reselect(stored, MiningSpec("random"))
    with pytest.raises(NvrError, match="2 of 2 rows need more than the 1 stored candidates"):
        reselect(stored, MiningSpec("naive", num_negatives=2))
    with pytest.raises(NvrError, match="give the vectors that were searched"):
        reselect(stored, MiningSpec("naive", num_negatives=2), lambda: (X, Y[:3]))
    with pytest.raises(NvrError, match="depth 0"):
        search_candidates(X, Y, [[0], [1]], 0)


def test_degenerate_but_meant() -> None:
    """All passages blocked, equal vectors everywhere, one dimension, zero vectors."""
    (none,) = mine(X, Y[:1], [[0], [0]], MiningSpec(num_negatives=1))
    assert none.negative_ids.tolist() == [[-1], [-1]]
    assert np.isnan(none.negative_scores).all()
    same = np.ones((300, 1), np.float32)
    (equal,) = mine(same[:3], same, [[0], [1], [2]], MiningSpec("perc_pos", 1.0), block_rows=100)
    assert equal.kept == 0
    assert equal.skipped["at_or_above_ceiling"] == 3 * 299
    zero = np.zeros((5, 2), np.float32)
    (zeros,) = mine(zero[:1], zero, [[2]], MiningSpec("naive"))
    assert zeros.negative_ids.tolist() == [[0, 1, 3, 4]]


def test_half_precision_memory_maps_and_tensors_are_read_as_they_are(tmp_path) -> None:
    import torch

    rng = np.random.default_rng(0)
    y = rng.standard_normal((50, 8)).astype(np.float16)
    x = rng.standard_normal((6, 8)).astype(np.float16)
    np.save(tmp_path / "y.npy", y)
    positives = [[i] for i in range(6)]
    expected = mine(x.astype(np.float32), y.astype(np.float32), positives, MiningSpec())[0].negative_ids
    for corpus in (y, np.load(tmp_path / "y.npy", mmap_mode="r"), torch.from_numpy(y), [y[:20], y[20:]]):
        assert np.array_equal(mine(x, corpus, positives, MiningSpec())[0].negative_ids, expected)


def test_cosine_wants_vectors_of_length_one() -> None:
    x, y = X, np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0]], np.float32)
    (meant,) = mine(x, y, [[0], [1]], MiningSpec("naive"), similarity="cosine")
    (same,) = mine(x, y, [[0], [1]], MiningSpec("naive"))
    assert np.array_equal(meant.negative_ids, same.negative_ids)
    half = mine(x.astype(np.float16), y.astype(np.float16), [[0], [1]], MiningSpec("naive"), similarity="cosine")
    assert half[0].kept == meant.kept
    long = y.copy()
    long[3] *= 2
    for vectors in ((x, long), (x, [long[:2], long[2:]])):
        with pytest.raises(NvrError, match=r"corpus_vectors row 3 has length 2: divide every vector by its length"):
            mine(*vectors, [[0], [1]], MiningSpec("naive"), similarity="cosine")
    with pytest.raises(NvrError, match="query_vectors row 0 has length 3"):
        search_candidates(x * 3, y, [[0], [1]], 2, similarity="cosine")
    with pytest.raises(NvrError, match="similarity 'euclid' is unknown: one of dot, cosine"):
        mine(x, y, [[0], [1]], MiningSpec("naive"), similarity="euclid")  # type: ignore[arg-type]
