"""What else is relevant to a query than what was judged: near-duplicates of its positives, positives of near-duplicate queries.

Shapes: Q queries, N corpus rows, D dimensions, M vectors compared with all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.arrays import Blocked, Ints, Ragged, Vectors
from nvr_tasks.mining.corpus import ArrayCorpus, Corpus, check_finite, take_finite
from nvr_tasks.mining.search import Request, Tiles, search

DEPTH = 32  # near-duplicates looked for at first
MOST_PAIRS = 1 << 25  # of near-duplicates: what mining keeps in memory, and more than any corpus has
ROUNDING = 2.0**-22  # by how much scaling to length 1 in float32 may miss a cosine


def near_duplicates(corpus: Corpus, positives: Ragged, similarity: float, tiles: Tiles) -> Ragged:
    """Per query the passages whose cosine with one of its positives is at least `similarity`, up to rounding, [Q] lists.

    Args:
        corpus: N vectors.
        positives: corpus rows per query.
        similarity: cosine, above 0 and at most 1.
        tiles: how to cut the search up.

    Raises:
        NotFiniteError: a positive's vector has NaN or infinity in it.
        NvrError: the similarity is out of range, or so low that it tells nothing.
    """
    check_similarity("duplicate_similarity", similarity)
    distinct, index = np.unique(positives.values, return_inverse=True)
    unit = _Unit(corpus)
    alike = _alike("duplicate_similarity", _scaled(take_finite(corpus, distinct)), unit, similarity, tiles)
    _refuse_too_many("duplicate_similarity", similarity, int(np.diff(alike.offsets)[index].sum()))
    return _union(positives.owners, index.astype(np.int64), alike, len(positives))


def positives_of_similar_queries(
    query_vectors: Vectors, other_vectors: Vectors, other_positives: Ragged, similarity: float, tiles: Tiles
) -> Ragged:
    """Per query the positives of all those other queries whose cosine with it is at least `similarity`, [Q] lists.

    Raises:
        NotFiniteError: a vector has NaN or infinity in it.
        NvrError: the similarity is out of range, or so low that it tells nothing.
    """
    check_similarity("query_similarity", similarity)
    check_finite(query_vectors, "query_vectors")
    check_finite(other_vectors, "other_vectors")
    others = _Unit(ArrayCorpus(other_vectors))
    alike = _alike("query_similarity", _scaled(query_vectors), others, similarity, tiles)
    _refuse_too_many("query_similarity", similarity, int(np.diff(other_positives.offsets)[alike.values].sum()))
    return _union(alike.owners, alike.values, other_positives, len(query_vectors))


def check_similarity(name: str, similarity: float) -> None:
    """Raise NvrError unless it can be a bound of cosines of near-duplicates."""
    if not 0 < similarity <= 1:
        raise NvrError(f"{name} {similarity} is out of range: give a cosine above 0 and at most 1, say 0.98")


def _alike(name: str, vectors: Vectors, corpus: Corpus, similarity: float, tiles: Tiles) -> Ragged:
    """Corpus rows with a score of at least `similarity` with each of M vectors, [M] lists.

    Raises:
        NvrError: there are so many that the bound, which setting `name` holds, tells no near-duplicates.
    """
    owners, values = [], []
    left, depth = np.arange(len(vectors), dtype=np.int64), min(DEPTH, corpus.rows)
    nothing = Ragged.of([()] * len(vectors), "nothing")
    blocked = Blocked.of(nothing, nothing, nothing, None)
    while len(left):
        more = []
        step = max(1, MOST_PAIRS // depth)
        for start in range(0, len(left), step):
            some = left[start : start + step]
            rows = np.arange(len(some), dtype=np.int64)
            floor = np.full(len(rows), similarity - ROUNDING)
            request = Request(rows, np.full(len(rows), np.inf), np.full(len(rows), depth), floor)
            found = search(vectors[some], corpus, request, blocked.take(some), None, replace(tiles, progress=None))
            there = found.ids >= 0
            full = there.all(axis=1) & (depth < corpus.rows)  # there may be more
            more.append(some[full])
            there[full] = False
            owners.append(np.repeat(some, there.sum(axis=1)))
            values.append(found.ids[there])
        left = np.concatenate(more)
        _refuse_too_many(name, similarity, sum(map(len, values)) + len(left) * depth)
        depth = min(depth * 8, corpus.rows)
    owner, value = np.concatenate([*owners, np.empty(0, np.int64)]), np.concatenate([*values, np.empty(0, np.int64)])
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=len(vectors)))
    return Ragged(value[order], np.concatenate([np.zeros(1, np.int64), ends]))


def _refuse_too_many(name: str, similarity: float, pairs: int) -> None:
    if pairs > MOST_PAIRS:
        raise NvrError(
            f"{name} {similarity:g} makes near-duplicates of at least {pairs:,} pairs: to this teacher most texts are that "
            "alike; raise the bound, or set it to null"
        )


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
    with np.errstate(invalid="ignore"):  # infinity over infinity: the search refuses it and names the row
        scaled: Vectors = (vectors / np.where(norms > 0, norms, 1.0)[:, None]).astype(np.float32)
    return scaled
