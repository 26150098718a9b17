"""What else is relevant to a query than what was judged: near-duplicates of its positives, positives of near-duplicate queries.

Shapes: Q queries, N corpus rows, D dimensions, M vectors compared with all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.arrays import Blocked, Ints, Ragged, Vectors
from nvr_tasks.mining.corpus import ArrayCorpus, Corpus, check_finite
from nvr_tasks.mining.search import Request, Tiles, search

DEPTH = 32  # near-duplicates looked for at first


def near_duplicates(corpus: Corpus, positives: Ragged, similarity: float, tiles: Tiles) -> Ragged:
    """Per query the passages whose cosine with one of its positives is at least `similarity`, [Q] lists.

    Args:
        corpus: N vectors.
        positives: corpus rows per query.
        similarity: cosine, above 0 and at most 1.
        tiles: how to cut the search up.

    Raises:
        NvrError: the similarity is out of range.
    """
    check_similarity("duplicate_similarity", similarity)
    distinct, index = np.unique(positives.values, return_inverse=True)
    unit = _Unit(corpus)
    alike = _alike(unit.take(distinct), unit, similarity, tiles)
    return _union(positives.owners, index.astype(np.int64), alike, len(positives))


def positives_of_similar_queries(
    query_vectors: Vectors, other_vectors: Vectors, other_positives: Ragged, similarity: float, tiles: Tiles
) -> Ragged:
    """Per query the positives of all those other queries whose cosine with it is at least `similarity`, [Q] lists.

    Raises:
        NotFiniteError: a vector has NaN or infinity in it.
        NvrError: the similarity is out of range.
    """
    check_similarity("query_similarity", similarity)
    check_finite(query_vectors, "query_vectors")
    check_finite(other_vectors, "other_vectors")
    alike = _alike(_scaled(query_vectors), _Unit(ArrayCorpus(other_vectors)), similarity, tiles)
    return _union(alike.owners, alike.values, other_positives, len(query_vectors))


def check_similarity(name: str, similarity: float) -> None:
    """Raise NvrError unless it can be a bound of cosines of near-duplicates."""
    if not 0 < similarity <= 1:
        raise NvrError(f"{name} {similarity} is out of range: give a cosine above 0 and at most 1, say 0.98")


def _alike(vectors: Vectors, corpus: Corpus, similarity: float, tiles: Tiles) -> Ragged:
    """Corpus rows with a score of at least `similarity` with each of M vectors, [M] lists."""
    lists: list[Ints] = [np.empty(0, np.int64)] * len(vectors)
    left, depth = np.arange(len(vectors), dtype=np.int64), min(DEPTH, corpus.rows)
    nothing = Ragged.of([()] * len(vectors), "nothing")
    blocked = Blocked.of(nothing, nothing, nothing, None)
    while len(left):
        rows = np.arange(len(left), dtype=np.int64)
        request = Request(rows, np.full(len(rows), np.inf), np.full(len(rows), depth), np.full(len(rows), similarity))
        found = search(vectors[left], corpus, request, blocked.take(left), None, replace(tiles, progress=None))
        there = found.ids >= 0
        for row, query in enumerate(left.tolist()):
            lists[query] = found.ids[row][there[row]]
        left = left[there.all(axis=1)] if depth < corpus.rows else left[:0]  # there may be more
        depth = min(depth * 8, corpus.rows)
    return Ragged.of(lists, "near-duplicates")


def _union(owners: Ints, index: Ints, lists: Ragged, count: int) -> Ragged:
    """For each owner the values of the lists that it points to, each once, sorted; `count` lists."""
    sizes = np.diff(lists.offsets)[index]
    starts = np.repeat(lists.offsets[:-1][index], sizes)
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    pairs = np.unique(np.stack([np.repeat(owners, sizes), lists.values[starts + within]], axis=1), axis=0)
    ends = np.searchsorted(pairs[:, 0], np.arange(count + 1))
    return Ragged(pairs[:, 1].copy(), ends.astype(np.int64))


class _Unit:
    """A corpus with its vectors scaled to length 1 (those of length 0 stay)."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.rows, self.dim = corpus, corpus.rows, corpus.dim

    def blocks(self, block_rows: int) -> Iterator[tuple[int, Vectors]]:
        for start, block in self.corpus.blocks(block_rows):
            yield start, _scaled(block)

    def take(self, rows: Ints) -> Vectors:
        return _scaled(self.corpus.take(rows))


def _scaled(vectors: Vectors) -> Vectors:
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    scaled: Vectors = (vectors / np.where(norms > 0, norms, 1.0)[:, None]).astype(np.float32)
    return scaled
