"""What every way of mining needs first: checked inputs, blocked pairs, scores of the positives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch  # noqa: TID253 - this package owns the search; nothing light imports it

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.arrays import (
    EXCLUDED,
    NEAR_DUPLICATE,
    Blocked,
    Floats,
    Ints,
    Ragged,
    Vectors,
    check_groups,
)
from nvr_tasks.mining.corpus import Corpus, UnitCorpus, as_matrix, check_finite, check_unit, open_corpus, take_finite
from nvr_tasks.mining.draws import Keys
from nvr_tasks.mining.exact import pair_scores
from nvr_tasks.mining.guards import near_duplicates, positives_of_similar_queries
from nvr_tasks.mining.search import Tiles

Lists = Sequence[Sequence[int] | Ints] | Ragged
Similarity = Literal["dot", "cosine"]


@dataclass(frozen=True)
class Judged:
    """The judgements of Q queries over N passages, checked.

    Attributes:
        positives: corpus rows per query, at least one each.
        blocked: pairs that are never mined.
        groups: int64 [N], or None where all passages differ.
        corpus_rows: N.
    """

    positives: Ragged
    blocked: Blocked
    groups: Ints | None
    corpus_rows: int

    @property
    def barred(self) -> Ragged:
        """What is never mined beside the positives and their duplicates, per query."""
        return Ragged.joined(self.blocked.barred(NEAR_DUPLICATE), self.blocked.barred(EXCLUDED))

    @staticmethod
    def of(
        queries: int,
        corpus_rows: int,
        positives: Lists,
        groups: Any,
        exclude: Lists | None,
        near: Lists | None = None,
    ) -> Judged:
        """Check and combine; `near`: near-duplicates of the positives.

        Raises:
            NvrError: wrong lengths, rows out of range, queries without a positive.
        """
        lists = Ragged.of(positives, "positives")
        out = Ragged.of([()] * queries if exclude is None else exclude, "exclude")
        alike = Ragged.of([()] * queries if near is None else near, "near")
        for name, given in (("positives", lists), ("exclude", out), ("near", alike)):
            if len(given) != queries:
                raise NvrError(
                    f"{name} has {len(given)} lists for {queries} queries: give one list of corpus rows per query"
                )
            given.check_range(name, corpus_rows)
        empty = np.flatnonzero(np.diff(lists.offsets) == 0)
        if len(empty):
            raise NvrError(
                f"query {empty[0]} has no positive ({len(empty)} of {queries} queries): leave such queries out"
            )
        checked = check_groups(groups, corpus_rows)
        return Judged(lists, Blocked.of(lists, alike, out, checked), checked, corpus_rows)


@dataclass(frozen=True)
class Problem:
    """Checked inputs of a search.

    Attributes:
        queries: float32 [Q, D].
        corpus: N vectors of D numbers.
        judged: what may not be mined.
        positive_scores: float64, in the order of `judged.positives.values`, [E].
    """

    queries: Vectors
    corpus: Corpus
    judged: Judged
    positive_scores: Floats

    @staticmethod
    def of(
        query_vectors: Any,
        corpus_vectors: Any,
        positives: Lists,
        groups: Any,
        exclude: Lists | None,
        duplicate_similarity: float | None,
        query_similarity: float | None,
        tiles: Tiles,
        similarity: Similarity = "dot",
    ) -> Problem:
        """Check what the caller gave and find what else is relevant. Raises NvrError as of `mine`."""
        if similarity not in get_args(Similarity):
            raise NvrError(f"similarity {similarity!r} is unknown: one of {', '.join(get_args(Similarity))}")
        queries = query_matrix(query_vectors)
        corpus = corpus_for(corpus_vectors, queries)
        if similarity == "cosine":
            check_unit(queries, "query_vectors")
            corpus = UnitCorpus(corpus)
        judged = Judged.of(len(queries), corpus.rows, positives, groups, exclude)
        if duplicate_similarity is not None or query_similarity is not None:
            out, near = Ragged.of([()] * len(queries) if exclude is None else exclude, "exclude"), None
            if query_similarity is not None:
                others = positives_of_similar_queries(queries, queries, judged.positives, query_similarity, tiles)
                out = Ragged.joined(out, others)
            if duplicate_similarity is not None:
                near = near_duplicates(corpus, Ragged.joined(judged.positives, out), duplicate_similarity, tiles)
            judged = Judged.of(len(queries), corpus.rows, judged.positives, groups, out, near)
        scores = scores_with(queries, corpus, judged.positives.owners, judged.positives.values)
        return Problem(queries, corpus, judged, scores)


def query_matrix(vectors: Any) -> Vectors:
    """Queries as float32 [Q, D], finite."""
    matrix = np.ascontiguousarray(as_matrix(vectors, "query_vectors"), dtype=np.float32)
    check_finite(matrix, "query_vectors")
    return matrix if matrix.flags.writeable else matrix.copy()  # torch wants memory it could write to


def corpus_for(vectors: Any, queries: Vectors) -> Corpus:
    """The corpus, of the queries' dimension."""
    corpus = open_corpus(vectors)
    if corpus.dim != queries.shape[1]:
        raise NvrError(
            f"query_vectors have {queries.shape[1]} dimensions, corpus_vectors {corpus.dim}: embed both with one teacher"
        )
    return corpus


def scores_with(queries: Vectors, corpus: Corpus, query: Ints, row: Ints) -> Floats:
    """float64 scores of (query, corpus row) pairs, [E]."""
    distinct, index = np.unique(row, return_inverse=True)
    vectors = take_finite(corpus, distinct)
    scores = pair_scores(
        torch.from_numpy(queries),
        torch.from_numpy(vectors),
        torch.from_numpy(query),
        torch.from_numpy(index.astype(np.int64)),
    )
    return scores.numpy()


def keys_for(query_keys: Any, queries: int) -> Keys:
    """Identity of each query for random draws, uint64 [Q]: what the caller gave, or its row."""
    if query_keys is None:
        return np.arange(queries, dtype=np.uint64)
    keys = np.asarray(query_keys)
    if keys.shape != (queries,) or keys.dtype != np.uint64:
        raise NvrError(f"query_keys has shape {keys.shape} and type {keys.dtype}; expected uint64 ({queries},)")
    return keys


def check_seed(seed: int) -> None:
    """Raise NvrError unless the seed is one a generator takes."""
    if not 0 <= seed < 2**63:
        raise NvrError(f"seed {seed} is not allowed: give a whole number from 0 to 2⁶³ − 1")
