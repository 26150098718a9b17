"""From what a search found to negatives: drop ranks, cut the pool, draw, account.

Shapes: R rows, W passages found per row, P pool, K negatives, N corpus rows.
"""

from __future__ import annotations

import numpy as np

from nvr_tasks.mining.arrays import BLOCKED_REASONS, Blocked, Floats, Ints
from nvr_tasks.mining.ceilings import Rows
from nvr_tasks.mining.draws import SAMPLE, Keys, sample, stream
from nvr_tasks.mining.result import MiningResult
from nvr_tasks.mining.search import Found
from nvr_tasks.mining.spec import MiningSpec


def select(
    spec: MiningSpec,
    rows: Rows,
    found: Found,
    blocked: Blocked,
    corpus_rows: int,
    query_keys: Keys,
    seed: int,
    unseen: Ints | None = None,
) -> MiningResult:
    """Negatives of one spec from the best `spec.depth` (or all) passages below each row's ceiling.

    `unseen`: passages per row that were never scored, [R]; None: all were.
    """
    ids_RP = found.ids[:, spec.dropped_ranks : spec.depth]
    scores_RP = found.scores[:, spec.dropped_ranks : spec.depth]
    there = ids_RP >= 0
    enough = there if spec.min_score is None else there & (scores_RP >= spec.min_score)
    taken = enough
    if spec.sampling != "top" and ids_RP.shape[1]:
        # P numbers per row whatever the row has, so that a candidate's draw hangs on its rank alone.
        positive = rows.positive if spec.positive_policy == "each" else np.full(len(rows), -1)
        taken = sample(
            np.where(enough, scores_RP, -np.inf),
            lambda row: stream(seed, int(query_keys[rows.query[row]]), int(positive[row]), SAMPLE, ids_RP.shape[1]),
            spec.num_negatives,
            spec.temperature,
            keep_best=spec.sampling == "top1_sampled",
        )
    ids, scores = compact(ids_RP, scores_RP, taken, spec.num_negatives)
    shifted = (found.ids[:, : spec.dropped_ranks] >= 0).sum(axis=1)
    return account(
        spec,
        rows,
        ids,
        scores,
        blocked,
        corpus_rows,
        above=found.above,
        shifted=shifted,
        below=(there & ~enough).sum(axis=1),
        unseen=unseen,
    )


def compact(
    ids_RP: Ints, scores_RP: Floats, taken_RP: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], count: int
) -> tuple[Ints, Floats]:
    """The taken entries at the left, in order; −1 and NaN behind them; [R, K]."""
    order = np.argsort(~taken_RP, axis=1, kind="stable")[:, :count]
    real = np.take_along_axis(taken_RP, order, axis=1)
    ids = np.full((len(ids_RP), count), -1, dtype=np.int64)
    scores = np.full((len(ids_RP), count), np.nan)
    ids[:, : order.shape[1]] = np.where(real, np.take_along_axis(ids_RP, order, axis=1), -1)
    scores[:, : order.shape[1]] = np.where(real, np.take_along_axis(scores_RP, order, axis=1), np.nan)
    return ids, scores


def account(
    spec: MiningSpec,
    rows: Rows,
    ids: Ints,
    scores: Floats,
    blocked: Blocked,
    corpus_rows: int,
    *,
    above: Ints,
    shifted: Ints,
    below: Ints,
    unseen: Ints | None = None,
) -> MiningResult:
    """The result, with every one of the N passages of each row under one heading."""
    skipped = {
        **{name: blocked.counts[rows.query, reason] for reason, name in enumerate(BLOCKED_REASONS)},
        "at_or_above_ceiling": above.astype(np.int64),
        "shifted": shifted.astype(np.int64),
        "below_min_score": below.astype(np.int64),
    }
    if unseen is not None:
        skipped["not_rescored"] = unseen.astype(np.int64)
    kept = (ids >= 0).sum(axis=1)
    skipped["not_selected"] = corpus_rows - kept - np.sum(list(skipped.values()), axis=0)
    result = MiningResult(
        spec=spec,
        query_rows=rows.query,
        positive_ids=rows.positive,
        positive_scores=rows.positive_score,
        ceilings=rows.ceiling,
        negative_ids=ids,
        negative_scores=scores,
        candidates=len(rows) * corpus_rows,
        skipped_per_row=skipped,
    )
    result.check_balance()
    return result
