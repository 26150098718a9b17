"""From mined negatives to training batches in which no passage is a hidden positive.

In-batch negatives assume that a query's relevant passages are its own positive only. Where queries have many
positives (NFCorpus: 43 on average) or passages have near-duplicates, a random batch breaks that; here a row joins a
batch only if none of its passages is relevant to a query of the batch, and none of the batch's to its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

PATIENCE = 4  # batch sizes of rows that may wait for a batch they fit into
# A batch that is closed short has a multiple of so many rows, if it has as many: 2, 4 or 8 processes divide it evenly. A
# constant, since equal recipes train on equal batches, whatever the number of processes.
UNIT = 8


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


def derived(seed: int, *of: int) -> int:
    """A seed for a stage, a source, a purpose: sums would make one stage's order that of another seed's next stage."""
    return int(np.random.SeedSequence(seed, spawn_key=of).generate_state(1)[0])


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


def drawn(stream: Iterator[Row], count: int, seed: int) -> Iterator[Row]:
    """The same rows, each time with `count` others of their negatives, in the order in which they were mined."""
    random = np.random.default_rng(seed)
    for row in stream:
        chosen = np.sort(random.permutation(len(row.negatives))[:count])
        yield replace(row, negatives=tuple(row.negatives[i] for i in chosen))


def blend(streams: Mapping[str, Iterator[Row]], weights: Mapping[str, float], seed: int) -> Iterator[Row]:
    """An endless stream over several sources, each as often as its weight says."""
    for name in draws(weights, seed):
        yield next(streams[name])


def draws(weights: Mapping[str, float], seed: int) -> Iterator[str]:
    """An endless stream of names, each as often as its weight says."""
    names = sorted(weights)
    shares = np.array([weights[n] for n in names], dtype=np.float64)
    random = np.random.default_rng(seed)
    while True:
        for i in random.choice(len(names), size=1024, p=shares / shares.sum()):
            yield names[i]


@dataclass
class Composer:
    """Composes batches without hidden positives out of a stream of rows.

    Attributes:
        stream: rows in the wished order; a row that does not fit waits for the next batch.
        relevant: per query, the groups of every passage judged relevant to it, in any split; None where the passages
            of other queries are not used as negatives, so that they need not be kept apart.
        groups: per corpus row, its group of (near-)duplicates, shape [N].
        query_groups: per query, equal for equal texts, shape [Q]: one text is in a batch once.
        lost: rows that lost their turn. Of those that never fit (say, hundreds of queries with one and the same
            positive) only so many are kept waiting.
    """

    stream: Iterator[Row]
    relevant: Sequence[frozenset[int]] | None
    groups: npt.NDArray[np.int64]
    query_groups: npt.NDArray[np.int64]
    lost: int = 0
    _waiting: list[Row] = field(default_factory=list)

    def batch(self, size: int) -> list[Row]:
        """The next batch of `size` rows.

        When no fitting row comes up within 20 batch sizes, the batch is closed short, at a multiple of `UNIT` rows if it has
        as many; those over are the first of the next batch. Raises ValueError if it then has fewer than two rows.
        """
        batch: list[Row] = []
        seen_queries: set[int] = set()
        passages: set[int] = set()
        forbidden: set[int] = set()  # groups relevant to some query of the batch
        postponed: list[Row] = []
        tries = 0
        while len(batch) < size and tries < 20 * size:
            tries += 1
            row = self._waiting.pop(0) if self._waiting else next(self.stream)
            query = int(self.query_groups[row.query])
            own: set[int] = set()
            relevant: frozenset[int] = frozenset()
            if self.relevant is not None:
                own = {int(self.groups[i]) for i in (row.positive, *row.negatives)}
                relevant = self.relevant[row.query]
            if query in seen_queries or own & forbidden or relevant & passages:
                postponed.append(row)
                continue
            batch.append(row)
            seen_queries.add(query)
            passages |= own
            forbidden |= relevant
        if UNIT <= len(batch) < size:
            whole = len(batch) // UNIT * UNIT
            batch, postponed = batch[:whole], batch[whole:] + postponed
        self.lost += max(0, len(postponed) - PATIENCE * size)
        self._waiting = postponed[: PATIENCE * size] + self._waiting
        if len(batch) < 2:
            raise ValueError("fewer than two training rows fit into one batch")
        return batch


def fill_short(
    rows: Sequence[tuple[int, int, Sequence[int]]],
    relevant: Sequence[frozenset[int]],
    groups: npt.NDArray[np.int64],
    count: int,
    seed: int,
    *,
    keep_all: bool = False,
) -> tuple[list[Row], int]:
    """Rows with `count` negatives: the hardest mined ones, random passages where too few were mined.

    With `keep_all`, rows keep all that were mined, so that some can be drawn in every pass; at least `count` they have.

    A query is never dropped for being short: a random passage adds what one more in-batch negative would. Returns the
    rows and how many negatives were drawn at random.
    """
    random = np.random.default_rng(seed)
    result, drawn = [], 0
    for query, positive, negatives in rows:
        chosen = list(negatives if keep_all else negatives[:count])
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
