"""Which type of number the first pass multiplies: the fastest that is fine enough for these vectors and ceilings."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from nvr_tasks.mining import MiningSpec, mine, search
from nvr_tasks.mining.screening import BFLOAT16, FLOAT32


def unit(rows: np.ndarray) -> np.ndarray:
    found: np.ndarray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return found


@pytest.mark.parametrize(("likeness", "taken"), [(0.9, "bfloat16"), (0.0, "float32")])
def test_ceilings_amid_all_scores_ask_for_finer_numbers(
    likeness: float, taken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A positive that is found no better than chance has a ceiling that most passages come near to."""
    monkeypatch.setattr(search, "preferred", lambda *_: {BFLOAT16: 3.0, FLOAT32: 1.0})
    rng = np.random.default_rng(5)
    corpus = unit(rng.standard_normal((3000, 384)))
    noise = unit(rng.standard_normal((200, 384)))
    queries = unit(likeness * corpus[:200] + np.sqrt(1 - likeness**2) * noise)
    spec = MiningSpec(method="perc_pos", threshold=0.95)
    with caplog.at_level(logging.INFO, "nvr_tasks"):
        found = mine(queries, corpus, [[i] for i in range(200)], [spec], device="cpu")[0]
    assert f"screening in {taken}" in caplog.text
    again = mine(queries, corpus, [[i] for i in range(200)], [spec], device="cpu", screen="bfloat16")[0]
    np.testing.assert_array_equal(found.negative_ids, again.negative_ids)
    np.testing.assert_array_equal(found.negative_scores, again.negative_scores)
