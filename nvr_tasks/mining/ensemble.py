"""Negatives from several teachers (arXiv:2407.15831 §3.2): one teacher per example, or the best of each.

Every teacher has its own candidates, positive scores and ceilings; no score of one is ever compared with one of
another. What may not be mined in the eyes of one teacher (near-duplicates of a positive, …) no teacher gives.

Shapes: T teachers, Q queries, R rows, K negatives, N corpus rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.arrays import EXCLUDED, NEAR_DUPLICATE, Floats, Ints, Ragged
from nvr_tasks.mining.candidates import Candidates, reselect
from nvr_tasks.mining.draws import TEACHER, stream
from nvr_tasks.mining.prepare import Judged, check_seed, keys_for
from nvr_tasks.mining.result import MiningResult
from nvr_tasks.mining.spec import MiningSpec

Ensemble = Literal["cross_sample", "intra_sample", "intra_sample_dedup"]


@dataclass(frozen=True)
class EnsembleResult:
    """Negatives of several teachers.

    Attributes:
        how: cross_sample, intra_sample or intra_sample_dedup.
        parts: what each teacher gave, with its own positive scores and ceilings: under cross_sample the rows that fell to
            it, else all rows, each with the negatives that were taken from it; every part balances by itself, [T].
        query_rows: row of the query, sorted, [R].
        drawn: cross_sample: the teacher that each row fell to, [R]; else −1.
        teachers: which teacher gave a negative, in the order of `parts`; −1 where there is none, [R, K].
        negative_ids: corpus rows, −1 where there is none, [R, K]. cross_sample: by falling score. Otherwise in the order
            in which the teachers took their turns, so that the first ones are from different teachers; under
            intra_sample a passage may be there once per teacher.
        negative_scores, ceilings, positive_scores: of the negative's own teacher; NaN where there is none, [R, K].
        searched_again: rows that the stored candidates could not fill, over all teachers.
    """

    how: Ensemble
    parts: tuple[MiningResult, ...]
    query_rows: Ints
    drawn: Ints
    teachers: Ints
    negative_ids: Ints
    negative_scores: Floats
    ceilings: Floats
    positive_scores: Floats
    searched_again: int = 0

    @property
    def kept_per_row(self) -> Ints:
        """Negatives per row, a passage that is there twice counted twice, [R]."""
        kept: Ints = np.count_nonzero(self.negative_ids >= 0, axis=1)
        return kept


def select_together(
    candidates: Sequence[Candidates],
    specs: Sequence[MiningSpec],
    how: Ensemble,
    vectors: Sequence[Callable[[], tuple[Any, Any]] | None],
    *,
    seed: int = 0,
    query_keys: Any = None,
    **tiles: Any,
) -> EnsembleResult:
    """Select from the stored candidates of several teachers, one entry per teacher in every sequence.

    Args:
        candidates: of the same queries, positives and passages, by each teacher.
        specs: what each teacher mines; they differ in thresholds only.
        how: see `combine`.
        vectors: as of `reselect`; None where a teacher has none (a reranker).
        seed, query_keys, tiles: as of `reselect`.

    Raises:
        NvrError: fewer than two teachers, candidates of different tasks, or as of `reselect`.
    """
    judged = shared_guards(candidates)
    results, again = [], 0
    for stored, spec, source in zip(candidates, specs, vectors, strict=True):
        found = reselect(stored.guarded(judged), spec, source, seed=seed, query_keys=query_keys, **tiles)
        results.append(found.result)
        again += len(found.searched_again)
    keys = keys_for(query_keys, len(judged.positives))
    return combine(results, how, judged.groups, seed=seed, query_keys=keys, searched_again=again)


def shared_guards(candidates: Sequence[Candidates]) -> Judged:
    """What no teacher may give: all that is blocked in the eyes of any."""
    if len(candidates) < 2:
        raise NvrError(f"an ensemble of {len(candidates)} teachers: give at least two")
    first = candidates[0].judged
    near, excluded = first.blocked.barred(NEAR_DUPLICATE), first.blocked.barred(EXCLUDED)
    for other in (c.judged for c in candidates[1:]):
        same = len(other.positives) == len(first.positives) and other.corpus_rows == first.corpus_rows
        if not same or not np.array_equal(other.positives.values, first.positives.values):
            raise NvrError("the teachers' candidates are of different queries, positives or corpora: mine one data set")
        near = Ragged.joined(near, other.blocked.barred(NEAR_DUPLICATE))
        excluded = Ragged.joined(excluded, other.blocked.barred(EXCLUDED))
    return Judged.of(len(first.positives), first.corpus_rows, first.positives, first.groups, excluded, near)


def combine(
    results: Sequence[MiningResult],
    how: Ensemble,
    groups: Ints | None = None,
    *,
    seed: int = 0,
    query_keys: npt.NDArray[np.uint64] | None = None,
    searched_again: int = 0,
) -> EnsembleResult:
    """One result of several teachers', each of which has K negatives per row where it can.

    cross_sample: one teacher, drawn per (seed, query, positive), gives all negatives of a row.
    intra_sample: the teachers take turns, each giving its best that it has not given yet; with K = T that is the top-1 of
    each. What two teachers choose is there twice.
    intra_sample_dedup: the same, but a passage (or one of its group) that is there already is passed over for the next
    best. A teacher that has none left gives its turn to the next, so a row is short only if nobody has more.

    Args:
        results: of the same queries and policy, sampling `top` unless cross_sample, [T].
        how: one of the above.
        groups: int64 per corpus row; passages of one group are the same, [N].
        seed, query_keys: of the draw; as of `mine`.
        searched_again: passed on.

    Raises:
        NvrError: the results do not belong together.
    """
    check_seed(seed)
    if how not in get_args(Ensemble):
        raise NvrError(f"ensemble {how!r} is unknown: one of {', '.join(get_args(Ensemble))}")
    _check_alike(results, how)
    first = results[0]
    shape = (len(first.query_rows), first.spec.num_negatives)
    if how == "cross_sample":
        keys = keys_for(query_keys, int(first.query_rows.max(initial=-1)) + 1) if query_keys is None else query_keys
        giver = np.repeat(drawn_teachers(first, len(results), seed, keys)[:, None], shape[1], axis=1)
        place = np.repeat(np.arange(shape[1])[None, :], shape[0], axis=0)
    else:
        giver, place = _turns(results, groups if how == "intra_sample_dedup" else None, how)
    return _assemble(results, how, giver, place, searched_again)


def drawn_teachers(result: MiningResult, teachers: int, seed: int, query_keys: npt.NDArray[np.uint64]) -> Ints:
    """Which teacher each row falls to: 0 … T − 1, uniform, a function of seed, query key and positive alone, [R]."""
    each = result.spec.positive_policy == "each"
    positives = result.positive_ids if each else np.full(len(result.query_rows), -1)
    rows = zip(result.query_rows.tolist(), positives.tolist(), strict=True)
    bits = [stream(seed, int(query_keys[q]), p, TEACHER, 1)[0] for q, p in rows]
    return (np.array(bits, dtype=np.uint64) % np.uint64(teachers)).astype(np.int64)


def _check_alike(results: Sequence[MiningResult], how: Ensemble) -> None:
    if len(results) < 2:
        raise NvrError(f"an ensemble of {len(results)} teachers: give at least two")
    first = results[0]
    for other in results:
        spec = other.spec
        if (spec.num_negatives, spec.positive_policy) != (first.spec.num_negatives, first.spec.positive_policy):
            raise NvrError("the teachers' specs differ in num_negatives or positive_policy: only thresholds may differ")
        if other.candidates != first.candidates or not np.array_equal(other.query_rows, first.query_rows):
            raise NvrError("the teachers' results are of different queries or corpora: mine one data set")
        if spec.method == "random":
            raise NvrError("method random looks at no teacher's scores: mine it without an ensemble")
        if how != "cross_sample" and spec.sampling != "top":
            raise NvrError(
                f"{how} takes the best of each teacher: sampling {spec.sampling!r} has no meaning, use 'top'"
            )
    if how != "cross_sample" and first.spec.num_negatives < len(results):
        raise NvrError(
            f"{how} takes one negative from each of {len(results)} teachers: num_negatives {first.spec.num_negatives} is too "
            "few, ask for at least as many, or use cross_sample"
        )


def _turns(results: Sequence[MiningResult], groups: Ints | None, how: Ensemble) -> tuple[Ints, Ints]:
    """Who gives each negative, and which of its own it is: (teacher, place in its list), −1 where nobody has more, [R, K]."""
    lists = [r.negative_ids for r in results]
    labels = lists if groups is None else [np.where(ids >= 0, groups[np.maximum(ids, 0)], -1) for ids in lists]
    count, teachers = results[0].spec.num_negatives, len(results)
    giver, place = np.full((len(lists[0]), count), -1, np.int64), np.full((len(lists[0]), count), -1, np.int64)
    distinct = how == "intra_sample_dedup"
    per_row = zip(*(r.kept_per_row.tolist() for r in results), strict=True)
    for row, left in enumerate(per_row):
        names = [label[row].tolist() for label in labels]
        upcoming, taken, turn, given = [0] * teachers, set[int](), 0, 0
        idle = 0  # teachers in a row that had nothing to give
        while given < count and idle < teachers:
            t, turn = turn, (turn + 1) % teachers
            while distinct and upcoming[t] < left[t] and names[t][upcoming[t]] in taken:
                upcoming[t] += 1
            if upcoming[t] >= left[t]:
                idle += 1
                continue
            giver[row, given], place[row, given] = t, upcoming[t]
            taken.add(names[t][upcoming[t]])
            upcoming[t] += 1
            given, idle = given + 1, 0
    return giver, place


def _assemble(
    results: Sequence[MiningResult], how: Ensemble, giver_RK: Ints, place_RK: Ints, searched_again: int
) -> EnsembleResult:
    """The result, given who gives what."""
    shape = giver_RK.shape
    ids, teacher = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
    scores, ceilings, positives = (np.full(shape, np.nan) for _ in range(3))
    drawn = giver_RK[:, 0].copy() if how == "cross_sample" else np.full(shape[0], -1, np.int64)
    parts = []
    for t, result in enumerate(results):
        rows, slots = np.nonzero(giver_RK == t)
        places = place_RK[rows, slots]
        there = result.negative_ids[rows, places] >= 0
        rows, slots, places = rows[there], slots[there], places[there]
        ids[rows, slots], scores[rows, slots] = result.negative_ids[rows, places], result.negative_scores[rows, places]
        teacher[rows, slots] = t
        ceilings[rows, slots], positives[rows, slots] = result.ceilings[rows], result.positive_scores[rows]
        if how == "cross_sample":
            parts.append(result.take(np.flatnonzero(drawn == t)))
        else:
            taken = np.zeros(result.negative_ids.shape, dtype=bool)
            taken[rows, places] = True
            parts.append(result.keep(taken))
        parts[-1].check_balance()
    return EnsembleResult(
        how, tuple(parts), results[0].query_rows, drawn, teacher, ids, scores, ceilings, positives, searched_again
    )
