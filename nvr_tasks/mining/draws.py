"""Random choices that depend on the seed and the row alone: not on blocks, threads, workers or the order of rows.

A counter-based generator (Philox) is keyed by (seed, key of the query) and starts at a counter of (purpose, positive).
Raw 64-bit output is used, which numpy promises to keep, unlike its distributions.

Shapes: R rows, P candidates in the pool, K negatives.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from nvr_tasks.mining.arrays import Floats, Ints

Keys = npt.NDArray[np.uint64]
SAMPLE, RANDOM, PERMUTE, TEACHER = 1, 2, 3, 4  # purposes: one stream each
WHOLE_PERMUTATION = 4096  # corpora up to this size are shuffled; larger ones are drawn from


def stream(seed: int, query_key: int, positive: int, purpose: int, count: int) -> Keys:
    """`count` random 64-bit numbers of one row; `positive` is −1 where a query is one row."""
    counter = np.array([0, 0, purpose, positive + 1], dtype=np.uint64)
    key = np.array([seed, query_key], dtype=np.uint64)
    return np.random.Philox(counter=counter, key=key).random_raw(count)


def sample(
    scores_RP: Floats, streams: Callable[[int], Keys], count: int, temperature: float, keep_best: bool
) -> npt.NDArray[np.bool_]:
    """Which candidates are drawn: `count` per row without replacement, by softmax(score / temperature), bool [R, P].

    Gumbel top-k: adding independent Gumbel noise to the logits and taking the largest draws without replacement
    (Kool et al., arXiv:1903.06059).

    Args:
        scores_RP: float64, −inf where a row has no candidate; those are never drawn.
        streams: the P random numbers of a row.
        count: K.
        temperature: of the softmax.
        keep_best: take the first candidate for certain and draw K − 1 of the others.
    """
    taken = np.zeros(scores_RP.shape, dtype=bool)
    for row, scores in enumerate(scores_RP):
        uniform = ((streams(row) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        noisy = scores / temperature - np.log(-np.log(uniform))
        if keep_best:
            noisy[0] = np.inf
        taken[row, np.argsort(-noisy, kind="stable")[:count]] = True
    return taken & ~np.isneginf(scores_RP)


def uniform_rows(
    seed: int, query_key: int, positive: int, corpus_rows: int, accept: Callable[[int], bool], count: int
) -> Ints:
    """`count` different corpus rows drawn uniformly of those that `accept` takes, in the order drawn; fewer if there are fewer."""
    chosen: list[int] = []
    seen: set[int] = set()
    if corpus_rows > WHOLE_PERMUTATION:
        for draw in (stream(seed, query_key, positive, RANDOM, 64 * count) % np.uint64(corpus_rows)).tolist():
            if draw not in seen and accept(draw):
                chosen.append(draw)
            seen.add(draw)
            if len(chosen) == count:
                return np.array(chosen, dtype=np.int64)
    for draw in np.argsort(stream(seed, query_key, positive, PERMUTE, corpus_rows), kind="stable").tolist():
        if len(chosen) == count:
            break
        if draw not in seen and accept(draw):
            chosen.append(draw)
    return np.array(chosen, dtype=np.int64)
