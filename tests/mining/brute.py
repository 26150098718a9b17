"""The rules of mining, one pair at a time in plain Python and float64: slow, and easy to check by eye."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nvr_tasks.mining import MiningSpec


@dataclass
class Row:
    """What one row must come to; `pool` is what a draw may choose from."""

    query: int
    positive: int
    positive_score: float
    ceiling: float
    pool: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)


def scores_of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """All scores, each the correctly rounded sum of exact products, [Q, N]."""
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    return np.array([[math.fsum(a * b) for b in y64] for a in x64]).reshape(len(x), len(y))


def brute_force(
    x: np.ndarray,
    y: np.ndarray,
    positives: Sequence[Sequence[int]],
    spec: MiningSpec,
    groups: Sequence[int] | None = None,
    exclude: Sequence[Sequence[int]] | None = None,
) -> list[Row]:
    """The rows of a spec; `ids` are final for sampling `top`."""
    scores = scores_of(x, y)
    labels = list(range(len(y))) if groups is None else list(groups)
    out = []
    for q in range(len(x)):
        chosen = sorted(positives[q], key=lambda p: (scores[q, p], p))
        if spec.positive_policy == "each":
            setters = list(dict.fromkeys(positives[q]))
        elif spec.positive_policy == "min":
            setters = chosen[:1]
        else:
            best = scores[q, chosen[-1]]
            setters = [min(p for p in chosen if scores[q, p] == best)]
        for p in setters:
            out.append(_row(q, p, scores[q], positives[q], [] if exclude is None else exclude[q], labels, spec))
    return out


def _row(
    q: int,
    p: int,
    scores: np.ndarray,
    positives: Sequence[int],
    exclude: Sequence[int],
    labels: list[int],
    spec: MiningSpec,
) -> Row:
    s = float(scores[p])
    t = spec.resolved_threshold
    ceiling = {"perc_pos": s - abs(s) * (1 - t), "margin_pos": s - t, "abs": t}.get(spec.method, math.inf)
    row = Row(q, p, s, ceiling)
    count = dict.fromkeys(
        (
            "positive",
            "duplicate_of_positive",
            "near_duplicate",
            "excluded",
            "at_or_above_ceiling",
            "shifted",
            "below_min_score",
            "not_selected",
        ),
        0,
    )
    positive_labels, excluded_labels = {labels[i] for i in positives}, {labels[i] for i in exclude}
    listed: list[int] = []
    for n in sorted(range(len(scores)), key=lambda n: (-scores[n], n)):
        if n in positives:
            count["positive"] += 1
        elif labels[n] in positive_labels:
            count["duplicate_of_positive"] += 1
        elif labels[n] in excluded_labels:
            count["excluded"] += 1
        elif not scores[n] < ceiling:
            count["at_or_above_ceiling"] += 1
        elif labels[n] in {labels[i] for i in listed} or len(listed) >= spec.dropped_ranks + spec.pool:
            count["not_selected"] += 1
        else:
            listed.append(n)
    count["shifted"] = len(listed[: spec.dropped_ranks])
    pool = listed[spec.dropped_ranks :]
    row.pool = [n for n in pool if spec.min_score is None or scores[n] >= spec.min_score]
    count["below_min_score"] = len(pool) - len(row.pool)
    row.ids = row.pool[: spec.num_negatives]
    count["not_selected"] += len(row.pool) - len(row.ids)
    row.skipped = count
    return row
