"""Which texts are (nearly) the same: MinHash-LSH proposes pairs, exact Jaccard decides.

No pair reported is a false positive; a pair at the threshold is missed with probability ≤ 0.1 % (`_bands`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from nvr_tasks.data.text import blocks, char_shingles, jaccard, word_shingles

PERMUTATIONS = 128
RECALL = 0.999
SEED = 42
BLOCK = 8192


def similar_pairs(keys: Sequence[str], threshold: float) -> list[tuple[int, int]]:
    """Pairs i < j of distinct comparison keys whose 5-word shingles have Jaccard ≥ threshold, sorted."""
    import rensa

    bands = _bands(threshold)
    index = rensa.RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=bands)

    @lru_cache(maxsize=100_000)  # shingles of a big corpus do not fit in memory; those of neighbours in time do
    def shingles(i: int) -> set[str]:
        return word_shingles(keys[i])

    signatures = []
    for i in range(len(keys)):
        signature = rensa.RMinHash(num_perm=PERMUTATIONS, seed=SEED)
        signature.update(list(shingles(i)))
        signatures.append(signature)
    found = []
    for j, signature in enumerate(signatures):
        for i in index.query(signature):
            small, large = sorted((len(shingles(i)), len(shingles(j))))
            # |a ∩ b| ≤ the smaller set, so sets of too different size need no comparison.
            if small >= threshold * large and jaccard(shingles(i), shingles(j)) >= threshold:
                found.append((i, j))
        index.insert(j, signature)
    return sorted(found)


def _bands(threshold: float) -> int:
    """Fewest bands (longest rows, fewest candidates) that find a pair at the threshold with probability ≥ RECALL."""
    bands = 1
    while bands < PERMUTATIONS and 1 - (1 - threshold ** (PERMUTATIONS / bands)) ** bands < RECALL:
        bands *= 2
    return bands


def groups(keys: Sequence[str], pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """Group of every row: the smallest row index among those with equal keys or linked by pairs of keys."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    links = [(row, first[key]) for row, key in enumerate(keys)]
    links += [(first[a], first[b]) for a, b in pairs if a in first and b in first]
    rows, cols = np.array(links, dtype=np.int64).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(rows), dtype=np.int8), (rows, cols)), shape=(len(keys), len(keys)))
    _, labels = connected_components(graph, directed=False)
    smallest = np.full(len(keys), len(keys), dtype=np.int64)
    np.minimum.at(smallest, labels, np.arange(len(keys)))
    group: np.ndarray = smallest[labels]
    return group


def matches(queries: Sequence[str], others: Sequence[str], threshold: float) -> list[tuple[int, int, float]]:
    """Every (query, other, similarity) with Jaccard of 5-character shingles ≥ threshold; exact, in bounded memory.

    Args:
        queries: comparison keys, many.
        others: comparison keys, few: their shingles are the vocabulary.
    """
    vocabulary: dict[str, int] = {}
    right = _incidence(others, vocabulary, grow=True)
    right_sizes = np.array([len(char_shingles(o)) for o in others])
    found = []
    for block in blocks(len(queries), BLOCK):
        texts = [queries[i] for i in block]
        left_sizes = np.array([len(char_shingles(q)) for q in texts])
        both = (_incidence(texts, vocabulary, grow=False) @ right.T).tocoo()
        similarity = both.data / (left_sizes[both.row] + right_sizes[both.col] - both.data)
        for hit in np.flatnonzero(similarity >= threshold):
            found.append((block[int(both.row[hit])], int(both.col[hit]), float(similarity[hit])))
    return sorted(found)


def _incidence(texts: Sequence[str], vocabulary: dict[str, int], *, grow: bool):  # type: ignore[no-untyped-def]
    """Sparse 0/1 matrix texts × shingles of the vocabulary."""
    from scipy.sparse import csr_matrix

    columns: list[int] = []
    starts = [0]
    for text in texts:
        for shingle in char_shingles(text):
            column = vocabulary.setdefault(shingle, len(vocabulary)) if grow else vocabulary.get(shingle, -1)
            if column >= 0:
                columns.append(column)
        starts.append(len(columns))
    return csr_matrix(
        (np.ones(len(columns), dtype=np.int32), columns, starts), shape=(len(texts), max(1, len(vocabulary)))
    )
