"""From mined negatives to training batches in which no passage is a hidden positive.

In-batch negatives assume that a query's relevant passages are its own positive only. Where queries have many
positives (NFCorpus: 43 on average) or passages have near-duplicates, a random batch breaks that; here a row joins a
batch only if none of its passages is relevant to a query of the batch, and none of the batch's to its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PATIENCE = 4  # batch sizes of rows that may wait for a batch they fit into


@dataclass(frozen=True)
class Row:
    """One training example, as indices.

    Attributes:
        query: index of the query.
        positive: corpus row of its positive.
        negatives: corpus rows of its hard negatives.
    """

    query: int
    positive: int
    negatives: tuple[int, ...]


def passes(rows: Sequence[Row], seed: int) -> Iterator[Row]:
    """An endless stream in which every query comes once per pass, each time with the next of its positives.

    Without this, a query with 40 judged passages would weigh 40 times as much as one with a single passage.
    """
    by_query: dict[int, list[Row]] = {}
    for row in rows:
        by_query.setdefault(row.query, []).append(row)
    random = np.random.default_rng(seed)
    for own in by_query.values():
        own[:] = [own[i] for i in random.permutation(len(own))]
    queries = sorted(by_query)
    number = 0
    while True:
        for i in random.permutation(len(queries)):
            own = by_query[queries[i]]
            yield own[number % len(own)]
        number += 1


def compose(
    stream: Iterator[Row],
    relevant: Sequence[frozenset[int]],
    groups: npt.NDArray[np.int64],
    query_groups: npt.NDArray[np.int64],
    batch_size: int,
    batches: int,
) -> tuple[list[list[Row]], int]:
    """Batches without hidden positives, in training order.

    Args:
        stream: rows in the wished order; a row that does not fit waits for the next batch.
        relevant: per query, the groups of every passage judged relevant to it, in any split.
        groups: per corpus row, its group of (near-)duplicates, shape [N].
        query_groups: per query, equal for equal texts, shape [Q]: one text is in a batch once.
        batch_size: rows per batch.
        batches: number of batches.

    Returns:
        `batches` lists of `batch_size` rows, and how many rows lost their turn: of those that never fit (say, hundreds
        of queries with one and the same positive) only so many are kept waiting. When no fitting row comes up within
        20 batch sizes, the batch is closed short, but never with fewer than two rows.
    """
    waiting: list[Row] = []
    lost = 0
    result: list[list[Row]] = []
    for _ in range(batches):
        batch: list[Row] = []
        seen_queries: set[int] = set()
        passages: set[int] = set()
        forbidden: set[int] = set()  # groups relevant to some query of the batch
        postponed: list[Row] = []
        tries = 0
        while len(batch) < batch_size and tries < 20 * batch_size:
            tries += 1
            row = waiting.pop(0) if waiting else next(stream)
            own = {int(groups[i]) for i in (row.positive, *row.negatives)}
            query = int(query_groups[row.query])
            if query in seen_queries or own & forbidden or relevant[row.query] & passages:
                postponed.append(row)
                continue
            batch.append(row)
            seen_queries.add(query)
            passages |= own
            forbidden |= relevant[row.query]
        lost += max(0, len(postponed) - PATIENCE * batch_size)
        waiting = postponed[: PATIENCE * batch_size] + waiting
        if len(batch) < 2:
            raise ValueError("fewer than two training rows fit into one batch")
        result.append(batch)
    return result, lost


def fill_short(
    rows: Sequence[tuple[int, int, Sequence[int]]],
    relevant: Sequence[frozenset[int]],
    groups: npt.NDArray[np.int64],
    count: int,
    seed: int,
) -> tuple[list[Row], int]:
    """Rows with exactly `count` negatives: the hardest mined ones, random passages where too few were mined.

    A query is never dropped for being short: a random passage adds what one more in-batch negative would. Returns the
    rows and how many negatives were drawn at random.
    """
    random = np.random.default_rng(seed)
    result, drawn = [], 0
    for query, positive, negatives in rows:
        chosen = list(negatives[:count])
        taken = {int(groups[i]) for i in chosen} | {int(groups[positive])} | set(relevant[query])
        tries = 0
        while len(chosen) < count:
            candidate = int(random.integers(len(groups)))
            tries += 1
            if int(groups[candidate]) not in taken:
                chosen.append(candidate)
                taken.add(int(groups[candidate]))
                drawn += 1
            elif tries > 1000:
                raise ValueError(f"the corpus has no {count} passages that are not relevant to query {query}")
        result.append(Row(query, positive, tuple(chosen)))
    return result, drawn
