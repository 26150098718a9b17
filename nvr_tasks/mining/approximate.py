"""Candidates from an inverted-file index of faiss, for corpora too large to scan for every query.

The index only proposes: blocked passages are taken out, every proposal is scored in float64 like any other and sorted with
ties by id, so nothing that is mined differs from exact mining but by what the index did not propose. How much that is, is
measured on a sample of the queries against the exact search, and too little is an error.

faiss comes as `faiss-cpu` or `faiss-gpu`, which share one folder: install one of them. It must not be used in a process
that was forked after faiss or OpenMP had threads; every `nvr` command is a process of its own.

Shapes: Q queries, N corpus rows, k depth.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.arrays import Blocked, Ints, Vectors
from nvr_tasks.mining.corpus import Corpus, check_finite, take_finite
from nvr_tasks.mining.intervals import Share, clustered
from nvr_tasks.mining.prepare import scores_with
from nvr_tasks.mining.search import Found, Request, Tiles, search

POINTS_PER_LIST = 64  # that its centroid is found from
FEWEST_POINTS_PER_LIST = 39  # below it, faiss warns that lists say little
MOST_ON_GPU = 2048  # neighbours that faiss finds on a GPU
QUERIES_AT_A_TIME = 4096

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Approximate:
    """An IVF index.

    Attributes:
        lists: cells that the corpus is divided into; None: 4·√N, as far as the corpus has passages enough.
        probes: cells that are looked into for a query.
        min_recall: share of the true best passages that must be found, measured; less is an error.
        recall_queries: queries that it is measured on, evenly spaced.
    """

    lists: int | None = None
    probes: int = 32
    min_recall: float = 0.95
    recall_queries: int = 200

    def __post_init__(self) -> None:
        """Raises NvrError on what cannot be meant."""
        if (self.lists is not None and self.lists < 1) or self.probes < 1 or self.recall_queries < 1:
            raise NvrError(f"{self}: lists, probes and recall_queries must be at least 1")
        if not 0 <= self.min_recall <= 1:
            raise NvrError(f"min_recall {self.min_recall} is out of range: 0 to 1")


@dataclass(frozen=True)
class Sampled:
    """Of each query that was also searched exactly: passages found, and passages there were; 0 and 0 of the others, [Q]."""

    hits: Ints
    trials: Ints

    @property
    def recall(self) -> Share:
        """Of all of them together."""
        return clustered(self.hits, self.trials)


def approximate_search(
    query_vectors: Vectors, corpus: Corpus, depth: int, blocked: Blocked, how: Approximate, tiles: Tiles
) -> tuple[Found, Sampled]:
    """About the `depth` best passages of every query that are not blocked, and the recall that was measured.

    `Found.above` is 0: there is no ceiling. Duplicates stay, as in `search` without groups.

    Raises:
        NvrError: faiss is missing, vectors are not finite, or the recall is below `how.min_recall`.
    """
    faiss = _faiss()
    index = _build(faiss, corpus, how, tiles)
    counts = blocked.counts.sum(axis=1)
    ids = np.full((len(query_vectors), depth), -1, np.int64)
    scores = np.full(ids.shape, -np.inf)
    # Queries with many blocked passages need more proposals; sorted, they do not make the others ask for as many.
    order = np.argsort(counts, kind="stable")
    for start in range(0, len(order), QUERIES_AT_A_TIME):
        rows = np.sort(order[start : start + QUERIES_AT_A_TIME])
        wanted = min(corpus.rows, depth + int(counts[rows].max()))
        if _on_gpu(faiss, tiles):
            wanted = min(wanted, MOST_ON_GPU)
        _, proposed = index.search(query_vectors[rows], wanted)
        ids[rows], scores[rows] = _ranked(query_vectors, corpus, rows, proposed.astype(np.int64), depth, blocked)
    sampled = _recall(query_vectors, corpus, depth, blocked, ids, how, tiles)
    recall = sampled.recall
    log.info("recall of the index at %d: %s", depth, recall)
    if recall.value < how.min_recall:
        raise NvrError(
            f"the index finds {recall} of the {depth} best passages, and min_recall is {how.min_recall:g}: raise probes "
            f"(now {how.probes} of {index.nlist} lists), lower min_recall, or search exactly"
        )
    return Found(ids, scores, np.zeros(len(ids), np.int64)), sampled


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError:
        raise NvrError(
            "an approximate search needs faiss: pip install 'nvr-tasks[faiss-cpu]' (or [faiss-gpu]), or search exactly"
        ) from None
    module: ModuleType = faiss
    return module


def _on_gpu(faiss: ModuleType, tiles: Tiles) -> bool:
    return tiles.pick_device().type == "cuda" and hasattr(faiss, "index_cpu_to_all_gpus")


def _build(faiss: ModuleType, corpus: Corpus, how: Approximate, tiles: Tiles) -> Any:
    """An index of the whole corpus, vectors in half precision: they only propose."""
    lists = min(how.lists or int(4 * math.sqrt(corpus.rows)), max(1, corpus.rows // FEWEST_POINTS_PER_LIST))
    quantizer = faiss.IndexFlatIP(corpus.dim)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, corpus.dim, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    index.cp.seed, index.cp.spherical = 1234, True
    index.cp.min_points_per_centroid = 1
    step = max(1, corpus.rows // (POINTS_PER_LIST * lists))
    index.train(take_finite(corpus, np.arange(0, corpus.rows, step, dtype=np.int64)))
    for start, block in corpus.blocks(tiles.block_rows):
        check_finite(block, "corpus_vectors", start)
        index.add(block)
    index.nprobe = min(how.probes, lists)
    log.info("index of %s passages in %s lists, %s probed", f"{corpus.rows:,}", f"{lists:,}", f"{index.nprobe:,}")
    return faiss.index_cpu_to_all_gpus(index) if _on_gpu(faiss, tiles) else index


def _ranked(
    query_vectors: Vectors, corpus: Corpus, rows: Ints, proposed: Ints, depth: int, blocked: Blocked
) -> tuple[Ints, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """The best proposals of some queries that are not blocked, by float64 score, ties by id, [len(rows), depth]."""
    own = blocked.take(rows)
    there = proposed >= 0
    barred = np.isin(np.arange(len(rows))[:, None] * corpus.rows + proposed, own.query * corpus.rows + own.row)
    proposed = np.where(there & ~barred, proposed, -1)
    real = proposed >= 0
    scores = np.full(proposed.shape, -np.inf)
    query = np.repeat(rows, real.sum(axis=1))
    scores[real] = scores_with(query_vectors, corpus, query, proposed[real])
    order = np.lexsort((np.where(real, proposed, np.iinfo(np.int64).max), -scores), axis=1)[:, :depth]
    ids, best = np.full((len(rows), depth), -1, np.int64), np.full((len(rows), depth), -np.inf)
    ids[:, : order.shape[1]] = np.take_along_axis(proposed, order, axis=1)
    best[:, : order.shape[1]] = np.take_along_axis(scores, order, axis=1)
    return ids, best


def _recall(
    query_vectors: Vectors, corpus: Corpus, depth: int, blocked: Blocked, ids: Ints, how: Approximate, tiles: Tiles
) -> Sampled:
    """How much of the exact result was found, for a sample of the queries."""
    sample = np.unique(
        np.linspace(0, len(query_vectors) - 1, min(how.recall_queries, len(query_vectors))).astype(np.int64)
    )
    count = len(sample)
    request = Request(np.arange(count, dtype=np.int64), np.full(count, np.inf), np.full(count, depth))
    exact = search(query_vectors[sample], corpus, request, blocked.take(sample), None, tiles).ids
    base = corpus.rows
    truth, row = exact >= 0, np.arange(count)[:, None] * base
    got = (row + ids[sample])[ids[sample] >= 0]
    hits = (truth & np.isin(row + exact, got)).sum(axis=1)
    sampled = Sampled(np.zeros(len(query_vectors), np.int64), np.zeros(len(query_vectors), np.int64))
    sampled.hits[sample], sampled.trials[sample] = hits, truth.sum(axis=1)
    return sampled
