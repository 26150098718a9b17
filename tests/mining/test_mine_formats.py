"""Negatives as training sets."""

from __future__ import annotations

import numpy as np
import pytest

from nvr_tasks.errors import NvrError
from nvr_tasks.mining import MiningResult, MiningSpec, mine

QUERIES, CORPUS = ["q0", "q1"], ["p0", "p1", "p2", "p3"]


@pytest.fixture(scope="module")
def result() -> MiningResult:
    """q0: p1, p2 below p0; q1: only p0 below p3."""
    scores = np.array([[0.9, 0.5, 0.25, 0.95], [0.125, 0.5, 0.75, 0.5]], dtype=np.float32)
    # With unit vectors as queries, column n of the scores is passage n.
    return mine(np.eye(2, dtype=np.float32), scores.T.copy(), [[0], [3]], MiningSpec("perc_pos", num_negatives=2))[0]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (
            "triplet",
            {"anchor": ["q0", "q0", "q1"], "positive": ["p0", "p0", "p3"], "negative": ["p1", "p2", "p0"]},
        ),
        ("n-tuple", {"anchor": ["q0"], "positive": ["p0"], "negative_1": ["p1"], "negative_2": ["p2"]}),
        (
            "labeled-pair",
            {"anchor": ["q0"] * 3 + ["q1"] * 2, "passage": ["p0", "p1", "p2", "p3", "p0"], "label": [1, 0, 0, 1, 0]},
        ),
        (
            "labeled-list",
            {"anchor": ["q0", "q1"], "passages": [["p0", "p1", "p2"], ["p3", "p0"]], "labels": [[1, 0, 0], [1, 0]]},
        ),
    ],
)
def test_formats(result: MiningResult, shape: str, expected: dict) -> None:
    assert result.to_dataset(QUERIES, CORPUS, shape, drop_short=True).to_dict() == expected


def test_nothing_is_dropped_in_silence(result: MiningResult) -> None:
    with pytest.raises(NvrError, match="1 of 2 rows have fewer than 2 negatives"):
        result.to_dataset(QUERIES, CORPUS, "n-tuple")
    with pytest.raises(NvrError, match="not the ones mined"):
        result.to_dataset(QUERIES, CORPUS[:3])
    with pytest.raises(NvrError, match="format 'pairs' is unknown"):
        result.to_dataset(QUERIES, CORPUS, "pairs")
