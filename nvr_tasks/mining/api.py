"""`mine`: hard negatives for every query, exactly, in one pass over the corpus.

Shapes: Q queries, N corpus rows, D dimensions, R rows (Q, or all (query, positive) pairs under policy `each`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.arrays import Ints
from nvr_tasks.mining.ceilings import Rows, layout
from nvr_tasks.mining.prepare import Lists, Problem, Similarity, check_seed, keys_for
from nvr_tasks.mining.random_rows import draw
from nvr_tasks.mining.result import MiningResult
from nvr_tasks.mining.screening import Screen
from nvr_tasks.mining.search import Progress, Request, Tiles, search
from nvr_tasks.mining.selection import select
from nvr_tasks.mining.spec import MiningSpec


def mine(
    query_vectors: Any,
    corpus_vectors: Any,
    positives: Lists,
    specs: MiningSpec | Sequence[MiningSpec],
    *,
    similarity: Similarity = "dot",
    groups: Any = None,
    exclude: Lists | None = None,
    duplicate_similarity: float | None = None,
    query_similarity: float | None = None,
    seed: int = 0,
    query_keys: Any = None,
    device: str = "auto",
    block_rows: int = 16384,
    block_queries: int = 1024,
    screen: Screen = "auto",
    progress: Progress | None = None,
) -> list[MiningResult]:
    """Mine hard negatives: the best passages whose score lies strictly below a ceiling that the positive sets.

    Scores are dot products, which are cosines if the vectors have length 1. The result is that of a float64 brute force over
    the float32 vectors: by falling score, ties by the lowest corpus row. A row has fewer than K negatives only if the
    corpus has no further passage that is eligible.

    Args:
        query_vectors: [Q, D], float32 or float16 (float64 is rounded to float32).
        corpus_vectors: [N, D] array, memory map, or re-iterable of [b, D] blocks (read three times, five with
            `duplicate_similarity`).
        positives: per query the corpus rows of its positives, at least one.
        specs: one spec or several; all are served by one search.
        similarity: dot, or cosine: vectors that are not of length 1 are refused.
        groups: whole number per corpus row, [N]; rows of one group are the same text. The members of a positive's group
            are never mined, and a row gets at most one passage of a group: of those below its ceiling the one with the
            best score, ties by the lowest row.
        exclude: per query further corpus rows that are never mined, nor the members of their groups.
        duplicate_similarity: passages whose cosine with a positive (or an excluded passage) of the query is at least
            this are treated like it; None: only groups tell duplicates. Costs a search for every positive.
        query_similarity: positives of queries whose cosine with the query is at least this are excluded, too.
        seed: of the draws.
        query_keys: uint64 [Q], what names a query in the draws; its row by default.
        device: auto, cpu or a CUDA device of torch.
        block_rows, block_queries: size of a tile of scores; memory, never the result.
        screen: type of the products that are looked at first, float32, bfloat16 or int8; auto: what the device is fastest
            at and the vectors allow. Speed, never the result.
        progress: called with (scores done, scores in all) after every tile.

    Returns:
        One result per spec, in their order.

    Raises:
        NvrError: shapes, types or numbers are wrong; the message has the fact, the value and the fix.
    """
    wanted = [specs] if isinstance(specs, MiningSpec) else list(specs)
    if not wanted:
        raise NvrError("specs is empty: give at least one MiningSpec")
    tiles = Tiles(device, block_rows, block_queries, screen, progress)
    check_seed(seed)
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
    queries, corpus, judged = problem.queries, problem.corpus, problem.judged
    for spec in wanted:
        if spec.num_negatives > corpus.rows:
            raise NvrError(
                f"num_negatives {spec.num_negatives} exceeds the corpus of {corpus.rows} rows: ask for fewer"
            )
    keys = keys_for(query_keys, len(queries))
    rows = [layout(spec, judged.positives, problem.positive_scores) for spec in wanted]

    ranked = [i for i, spec in enumerate(wanted) if spec.method != "random"]
    request, shares = _request([(rows[i], min(wanted[i].depth, corpus.rows)) for i in ranked])
    found = search(queries, corpus, request, judged.blocked, judged.groups, tiles)
    share_of = dict(zip(ranked, shares, strict=True))
    results = []
    for i, spec in enumerate(wanted):
        if spec.method == "random":
            results.append(draw(spec, rows[i], queries, corpus, judged, keys, seed))
        else:
            mined = found.take(share_of[i], spec.depth)
            results.append(select(spec, rows[i], mined, judged.blocked, corpus.rows, keys, seed))
    return results


def _request(asked: Sequence[tuple[Rows, int]]) -> tuple[Request, list[Ints]]:
    """One request for the rows of all askers, those of equal query and ceiling as one; and which rows are whose."""
    query = np.concatenate([np.empty(0, np.int64), *(rows.query for rows, _ in asked)])
    ceiling = np.concatenate([np.empty(0), *(rows.ceiling for rows, _ in asked)])
    depth = np.repeat([d for _, d in asked], [len(rows) for rows, _ in asked]).astype(np.int64)
    order = np.lexsort((ceiling, query))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (query[order][1:] != query[order][:-1]) | (ceiling[order][1:] != ceiling[order][:-1])
    index = np.empty(len(order), dtype=np.int64)
    index[order] = np.cumsum(new) - 1
    deepest = np.zeros(int(new.sum()), dtype=np.int64)
    np.maximum.at(deepest, index, depth)
    ends = np.cumsum([len(rows) for rows, _ in asked])[:-1]
    return Request(query[order][new], ceiling[order][new], deepest), np.split(index, ends) if asked else []
