"""Small array types of mining: ragged lists, and what may never be a negative of which query."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from nvr_tasks.errors import NvrError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32]

# Why a passage is blocked; the lower number wins.
POSITIVE, DUPLICATE_OF_POSITIVE, EXCLUDED, NEAR_DUPLICATE = 0, 1, 2, 3
BLOCKED_REASONS = ("positive", "duplicate_of_positive", "excluded", "near_duplicate")


@dataclass(frozen=True)
class Ragged:
    """Q lists of whole numbers, end to end: list q is `values[offsets[q] : offsets[q + 1]]`."""

    values: Ints  # [E]
    offsets: Ints  # [Q + 1]

    @cached_property
    def owners(self) -> Ints:
        """Which list each value belongs to, [E]."""
        return np.repeat(np.arange(len(self.offsets) - 1, dtype=np.int64), np.diff(self.offsets))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Ints:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @staticmethod
    def of(lists: Sequence[Sequence[int] | Ints] | Ragged, name: str) -> Ragged:
        """Make one from Q sequences of corpus rows; a number given twice counts once, the first place stays.

        Raises:
            NvrError: something is not a whole number; `name` says what the lists are.
        """
        if isinstance(lists, Ragged):
            return lists
        unique = []
        for q, numbers in enumerate(lists):
            array = np.asarray(numbers)
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                raise NvrError(f"{name}[{q}] is {numbers!r}: give a sequence of corpus rows (whole numbers) per query")
            unique.append(np.array(list(dict.fromkeys(array.tolist())), dtype=np.int64))
        sizes = np.array([len(u) for u in unique], dtype=np.int64)
        values = np.concatenate(unique) if unique else np.empty(0, dtype=np.int64)
        return Ragged(values, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)]))

    def part(self, start: int, stop: int) -> Ragged:
        """Lists `start` up to `stop`."""
        offsets = self.offsets[start : stop + 1]
        return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    @staticmethod
    def joined(first: Ragged, second: Ragged) -> Ragged:
        """List by list what is in either, each number once."""
        return Ragged.of([np.concatenate(both) for both in zip(first, second, strict=True)], "lists")

    def __iter__(self) -> Iterator[Ints]:
        return (self[q] for q in range(len(self)))

    def check_range(self, name: str, size: int) -> None:
        """Raise NvrError unless all values are rows of a corpus of `size` passages."""
        wrong = np.flatnonzero((self.values < 0) | (self.values >= size))
        if len(wrong):
            q, value = int(self.owners[wrong[0]]), int(self.values[wrong[0]])
            raise NvrError(
                f"{name}[{q}] names corpus row {value}, but the corpus has rows 0 to {size - 1}: fix the rows"
            )


@dataclass(frozen=True)
class Blocked:
    """(query, passage) pairs that are never mined, each once.

    Attributes:
        query: [B]; row: corpus row, [B]; reason: one of those above, [B].
        Sorted by (row, query), so that the pairs of a corpus block are one slice.
        counts: pairs by (query, reason), [Q, 4].
    """

    query: Ints
    row: Ints
    reason: Ints
    counts: Ints

    @cached_property
    def by_query(self) -> Ragged:
        """Sorted blocked corpus rows per query."""
        order = np.lexsort((self.row, self.query))
        totals = self.counts.sum(axis=1)
        return Ragged(self.row[order], np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(totals)]))

    def barred(self, reason: int) -> Ragged:
        """Sorted corpus rows per query that are blocked for a reason."""
        mine = np.flatnonzero(self.reason == reason)
        order = mine[np.lexsort((self.row[mine], self.query[mine]))]
        ends = np.cumsum(self.counts[:, reason])
        return Ragged(self.row[order], np.concatenate([np.zeros(1, dtype=np.int64), ends]))

    def take(self, queries: Ints) -> Blocked:
        """The pairs of some queries (sorted, each once), which are numbered anew."""
        at = np.searchsorted(queries, self.query)
        mine = np.flatnonzero(queries[np.minimum(at, len(queries) - 1)] == self.query)
        return Blocked(at[mine], self.row[mine], self.reason[mine], self.counts[queries])

    @staticmethod
    def of(positives: Ragged, near: Ragged, exclude: Ragged, groups: Ints | None) -> Blocked:
        """Positives, their near-duplicates, other passages to leave out, and every member of the groups of all."""
        members = _GroupMembers(groups)
        parts = []  # (query, row, reason)
        for lists, own, duplicate in (
            (positives, POSITIVE, DUPLICATE_OF_POSITIVE),
            (exclude, EXCLUDED, EXCLUDED),
            (near, NEAR_DUPLICATE, NEAR_DUPLICATE),
        ):
            parts.append((lists.owners, lists.values, np.full(len(lists.values), own, dtype=np.int64)))
            index, row = members.expand(lists.values)
            parts.append((lists.owners[index], row, np.full(len(row), duplicate, dtype=np.int64)))
        query, row, reason = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((reason, query, row))
        query, row, reason = query[order], row[order], reason[order]
        first = np.ones(len(row), dtype=bool)
        first[1:] = (row[1:] != row[:-1]) | (query[1:] != query[:-1])
        query, row, reason = query[first], row[first], reason[first]
        counts = np.bincount(query * 4 + reason, minlength=4 * len(positives)).reshape(-1, 4)
        return Blocked(query, row, reason, counts.astype(np.int64))


class _GroupMembers:
    """Corpus rows of each group."""

    def __init__(self, groups: Ints | None) -> None:
        self.label = None
        if groups is not None:
            _, label = np.unique(groups, return_inverse=True)
            self.label = label.astype(np.int64)
            self.order = np.argsort(self.label, kind="stable")
            self.start = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.bincount(self.label))])

    def expand(self, rows: Ints) -> tuple[Ints, Ints]:
        """All members of the groups of `rows`: index into `rows`, and corpus row."""
        if self.label is None:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        label = self.label[rows]
        size = self.start[label + 1] - self.start[label]
        index = np.repeat(np.arange(len(rows), dtype=np.int64), size)
        within = np.arange(len(index), dtype=np.int64) - np.repeat(np.cumsum(size) - size, size)
        return index, self.order[self.start[label[index]] + within]


def check_groups(groups: npt.NDArray[np.integer] | Sequence[int] | None, corpus_rows: int) -> Ints | None:
    """Groups as int64 [N]; None also where no two passages share one. Raises NvrError on another shape or type."""
    if groups is None:
        return None
    array = np.asarray(groups)
    if array.shape != (corpus_rows,) or array.dtype.kind not in "iu":
        raise NvrError(
            f"groups has shape {array.shape} and type {array.dtype}; expected one whole number per corpus row, ({corpus_rows},)"
        )
    array = array.astype(np.int64)
    return None if len(np.unique(array)) == corpus_rows else array
