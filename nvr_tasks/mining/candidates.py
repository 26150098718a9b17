"""Candidates that outlive a threshold: search once without a ceiling, select under any spec later.

The stored list of a query is a prefix of its ranking of all passages that may be mined at all, so a selection that
the prefix can fill is the one a new search would make; only rows it cannot fill are searched again.

Shapes: Q queries, N corpus rows, k stored depth, E positives of all queries, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch  # noqa: TID253 - this package owns the search; nothing light imports it

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.approximate import Approximate, Sampled, approximate_search
from nvr_tasks.mining.arrays import Floats, Ints, Vectors
from nvr_tasks.mining.ceilings import Rows, layout
from nvr_tasks.mining.corpus import Corpus
from nvr_tasks.mining.prepare import Judged, Lists, Problem, Similarity, check_seed, corpus_for, keys_for, query_matrix
from nvr_tasks.mining.random_rows import draw
from nvr_tasks.mining.result import MiningResult
from nvr_tasks.mining.scan_torch import one_per_group
from nvr_tasks.mining.screening import Screen
from nvr_tasks.mining.search import Found, Progress, Request, Tiles, search
from nvr_tasks.mining.selection import select
from nvr_tasks.mining.spec import MiningSpec

ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Candidates:
    """The best passages of every query, positives and other blocked ones left out, duplicates kept.

    Attributes:
        judged: positives, blocked pairs and groups.
        positive_scores: float64, in the order of `judged.positives.values`, [E].
        ids: corpus rows by falling score, ties by rising row; −1 behind the last, [Q, k].
        scores: float64; −inf behind the last, [Q, k].
        rescored: the scores are a reranker's, which has seen the listed passages only: a row that they cannot fill
            stays short.
        sampled: how many of the true best are there, for some queries; None: all of them, the search was exact.
    """

    judged: Judged
    positive_scores: Floats
    ids: Ints
    scores: Floats
    rescored: bool = False
    sampled: Sampled | None = None

    def guarded(self, judged: Judged) -> Candidates:
        """The candidates under further judgements of the same positives: what those block leaves the lists."""
        rows = judged.corpus_rows
        blocked = judged.blocked.query * rows + judged.blocked.row
        query = np.arange(len(self.ids), dtype=np.int64)[:, None]
        stays = (self.ids >= 0) & ~np.isin(query * rows + self.ids, blocked)
        order = np.argsort(~stays, axis=1, kind="stable")
        real = np.take_along_axis(stays, order, axis=1)
        ids = np.where(real, np.take_along_axis(self.ids, order, axis=1), -1)
        scores = np.where(real, np.take_along_axis(self.scores, order, axis=1), -np.inf)
        return replace(self, judged=judged, ids=ids, scores=scores)


def search_candidates(
    query_vectors: Any,
    corpus_vectors: Any,
    positives: Lists,
    depth: int,
    *,
    similarity: Similarity = "dot",
    groups: Any = None,
    exclude: Lists | None = None,
    duplicate_similarity: float | None = None,
    query_similarity: float | None = None,
    device: str = "auto",
    block_rows: int = 16384,
    block_queries: int = 1024,
    screen: Screen = "auto",
    progress: Progress | None = None,
    approximate: Approximate | None = None,
) -> Candidates:
    """The `depth` best passages of every query without a ceiling; arguments and errors as of `mine`.

    With `approximate`, about the best: those that a faiss index proposes. Selections from them are exact as far as the
    candidates reach, and rows that they cannot fill are searched again exactly.
    """
    if depth < 1:
        raise NvrError(f"depth {depth} is not allowed: give at least 1")
    tiles = Tiles(device, block_rows, block_queries, screen, progress)
    problem = Problem.of(
        query_vectors,
        corpus_vectors,
        positives,
        groups,
        exclude,
        duplicate_similarity,
        query_similarity,
        tiles,
        similarity,
    )
    rows = len(problem.queries)
    if approximate is not None:
        found, sampled = approximate_search(
            problem.queries, problem.corpus, min(depth, problem.corpus.rows), problem.judged.blocked, approximate, tiles
        )
        return Candidates(problem.judged, problem.positive_scores, found.ids, found.scores, sampled=sampled)
    depths = np.full(rows, min(depth, problem.corpus.rows))
    request = Request(np.arange(rows, dtype=np.int64), np.full(rows, np.inf), depths)
    # Without groups: a list with the duplicates in it says how many passages lie above any ceiling.
    found = search(problem.queries, problem.corpus, request, problem.judged.blocked, None, tiles)
    return Candidates(problem.judged, problem.positive_scores, found.ids, found.scores)


@dataclass(frozen=True)
class Reselection:
    """Result of a selection from stored candidates, and which of its rows had to be searched again, [S]."""

    result: MiningResult
    searched_again: Ints


def reselect(
    candidates: Candidates,
    spec: MiningSpec,
    vectors: Callable[[], tuple[Any, Any]] | None = None,
    *,
    seed: int = 0,
    query_keys: Any = None,
    device: str = "auto",
    block_rows: int = 16384,
    block_queries: int = 1024,
    screen: Screen = "auto",
    progress: Progress | None = None,
) -> Reselection:
    """What `mine` would give for a spec, from stored candidates wherever their depth suffices.

    Args:
        candidates: made by `search_candidates`.
        spec: any; `random` takes from what is stored only what may not be mined.
        vectors: gives (query_vectors, corpus_vectors); called only if some row cannot be filled from what is stored, and
            for method random. Never called for rescored candidates.
        seed, query_keys, device, block_rows, block_queries, screen, progress: as of `mine`.

    Raises:
        NvrError: vectors are needed and none were given, or `random` is to be scored by a reranker.
    """
    check_seed(seed)
    judged = candidates.judged
    if spec.num_negatives > judged.corpus_rows:
        raise NvrError(
            f"num_negatives {spec.num_negatives} exceeds the corpus of {judged.corpus_rows} rows: ask for fewer"
        )
    rows = layout(spec, judged.positives, candidates.positive_scores)
    keys = keys_for(query_keys, len(judged.positives))
    if spec.method == "random":
        if vectors is None or candidates.rescored:
            raise NvrError("method random draws from the whole corpus, whose scores are not stored: give vectors")
        queries, corpus = _given(vectors(), judged)
        return Reselection(draw(spec, rows, queries, corpus, judged, keys, seed), np.empty(0, np.int64))
    found, short = _from_stored(candidates, rows, min(spec.depth, judged.corpus_rows))
    unseen = None
    if candidates.rescored:
        seen = (candidates.ids >= 0).sum(axis=1)
        unseen = (judged.corpus_rows - judged.blocked.counts.sum(axis=1) - seen)[rows.query]
        short = short[:0]
    if len(short):
        if vectors is None:
            raise NvrError(
                f"{len(short):,} of {len(rows):,} rows need more than the {candidates.ids.shape[1]} stored candidates: give vectors"
            )
        tiles = Tiles(device, block_rows, block_queries, screen, progress)
        again = _search_rows(rows.take(short), min(spec.depth, judged.corpus_rows), judged, vectors(), tiles)
        found.ids[short], found.scores[short], found.above[short] = again.ids, again.scores, again.above
    return Reselection(select(spec, rows, found, judged.blocked, judged.corpus_rows, keys, seed, unseen), short)


def _from_stored(candidates: Candidates, rows: Rows, depth: int) -> tuple[Found, Ints]:
    """What the stored lists give, and the rows that they do not settle."""
    judged = candidates.judged
    groups = None if judged.groups is None else torch.from_numpy(judged.groups)
    ids = np.full((len(rows), depth), -1, dtype=np.int64)
    scores = np.full((len(rows), depth), -np.inf)
    above = np.zeros(len(rows), dtype=np.int64)
    settled = np.zeros(len(rows), dtype=bool)
    eligible = judged.corpus_rows - judged.blocked.counts.sum(axis=1)
    stored = (candidates.ids >= 0).sum(axis=1)
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        query = rows.query[part]
        ids_RW, scores_RW = candidates.ids[query], candidates.scores[query]
        over = scores_RW >= rows.ceiling[part, None]
        above[part] = over.sum(axis=1)
        order = np.argsort(over | (ids_RW < 0), axis=1, kind="stable")
        ids_RW = np.take_along_axis(np.where(over, -1, ids_RW), order, axis=1)
        scores_RW = np.take_along_axis(np.where(over, -np.inf, scores_RW), order, axis=1)
        if groups is not None:
            one, best = one_per_group(torch.from_numpy(ids_RW), torch.from_numpy(scores_RW), groups)
            ids_RW, scores_RW = one.numpy(), best.numpy()
        width = min(depth, ids_RW.shape[1])
        ids[part, :width], scores[part, :width] = ids_RW[:, :width], scores_RW[:, :width]
        settled[part] = (ids[part, -1] >= 0) | (stored[query] == eligible[query])
    return Found(ids, scores, above), np.flatnonzero(~settled)


def best_of_groups(ids_RK: Ints, scores_RK: Floats, groups: Ints) -> tuple[Ints, Floats]:
    """Lists with the best passage of each group only, in their order; −1 and −inf behind the last, [R, k]."""
    parts = [
        one_per_group(
            torch.from_numpy(ids_RK[i : i + ROWS_AT_A_TIME]),
            torch.from_numpy(scores_RK[i : i + ROWS_AT_A_TIME]),
            torch.from_numpy(groups),
        )
        for i in range(0, len(ids_RK), ROWS_AT_A_TIME)
    ]
    return np.concatenate([p[0].numpy() for p in parts]), np.concatenate([p[1].numpy() for p in parts])


def _search_rows(rows: Rows, depth: int, judged: Judged, vectors: tuple[Any, Any], tiles: Tiles) -> Found:
    """A ceiling-constrained search for some rows only."""
    all_queries, corpus = _given(vectors, judged)
    used, query = np.unique(rows.query, return_inverse=True)
    request = Request(query.astype(np.int64), rows.ceiling, np.full(len(rows), depth))
    return search(all_queries[used], corpus, request, judged.blocked.take(used), judged.groups, tiles)


def _given(vectors: tuple[Any, Any], judged: Judged) -> tuple[Vectors, Corpus]:
    """Queries and corpus, checked. Raises NvrError unless they are as many as were searched."""
    queries = query_matrix(vectors[0])
    corpus = corpus_for(vectors[1], queries)
    if (len(queries), corpus.rows) != (len(judged.positives), judged.corpus_rows):
        raise NvrError(
            f"vectors of {len(queries)} queries and {corpus.rows} passages, but the candidates are of "
            f"{len(judged.positives)} and {judged.corpus_rows}: give the vectors that were searched"
        )
    return queries, corpus
