"""faiss indexes over unit vectors, and how many of the true neighbours they find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nvr_tasks.mining.arrays import Blocked, Vectors
from nvr_tasks.mining.corpus import ArrayCorpus
from nvr_tasks.mining.search import Request, Tiles, search

BLOCK = 65536  # vectors added at a time


def build(vectors: Vectors, kind: str, links: int, ef_construction: int, ef_search: int) -> Any:
    """A faiss index by inner product over vectors [n, D]: flat (exact) or hnsw."""
    import faiss

    dim = int(vectors.shape[1])
    index: Any = faiss.IndexFlatIP(dim)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = ef_construction, ef_search
    for start in range(0, len(vectors), BLOCK):
        index.add(np.ascontiguousarray(vectors[start : start + BLOCK]))
    return index


def exact(vectors: Vectors, queries: Vectors, k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The k nearest rows of each query, by the exact search of mining: ids and scores, [Q, k]."""
    count, none = len(queries), np.empty(0, dtype=np.int64)
    request = Request(np.arange(count, dtype=np.int64), np.full(count, np.inf), np.full(count, k, dtype=np.int64))
    blocked = Blocked(none, none, none, np.zeros((count, 4), dtype=np.int64))
    found = search(queries, ArrayCorpus(vectors), request, blocked, None, Tiles())
    return found.ids, found.scores


def recall(index: Any, vectors: Vectors, queries: Vectors, k: int) -> float:
    """Mean share of the true k nearest rows that the index finds; a row that ties with the k-th counts as one of them."""
    _, scores = exact(vectors, queries, k)
    _, ids = index.search(np.ascontiguousarray(queries), k)
    found = 0
    for query, row, threshold in zip(queries, ids, scores[:, -1], strict=True):
        got = vectors[row[row >= 0]].astype(np.float64) @ query.astype(np.float64)
        found += int((got >= threshold - 1e-9).sum())
    return found / (len(queries) * k)


def write(index: Any, path: Path) -> None:
    """Write an index file."""
    import faiss

    faiss.write_index(index, str(path))
