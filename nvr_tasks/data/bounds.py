"""How much of a source is kept: so many queries, their passages, and so many others. The same ones from a larger source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nvr_tasks.data_settings import TrainingSource, WithOrigin

Ids = tuple[str, str, str]  # split, query id, document id


def place(seed: int, name: str) -> str:
    """A random-looking place in an order that depends on nothing but seed and name."""
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Kept:
    """Which queries and documents of a source are read: those whose place is not beyond a last one."""

    source: str
    last_query: int
    last_document: int

    def query(self, query_id: str) -> bool:
        """Whether a query is kept."""
        return _place(self.source, query_id) <= self.last_query

    def document(self, doc_id: str) -> bool:
        """Whether a document is kept that no kept query is judged with."""
        return _place(self.source, doc_id) <= self.last_document


@dataclass(frozen=True)
class Bound:
    """The bounds of a source, for readers that would otherwise hold all of it in memory."""

    source: str
    split: str
    max_queries: int | None
    max_passages: int

    @classmethod
    def of(cls, entry: WithOrigin) -> Bound | None:
        """None if the source keeps all of its passages."""
        if not isinstance(entry, TrainingSource) or entry.max_passages is None:
            return None
        return cls(entry.name, entry.split, entry.max_queries, entry.max_passages)

    def kept(self, rows: Iterable[Ids], documents: Iterable[str] = ()) -> Kept:
        """What to keep: at least what `assemble` will, which has the last word.

        Args:
            rows: every judgement. Ids are not held, only their places.
            documents: the corpus, if there are documents without any.
        """
        kind = [("query", np.uint64), ("document", np.uint64), ("asked", bool)]
        places = ((_place(self.source, q), _place(self.source, d), split == self.split) for split, q, d in rows)
        table = np.fromiter(places, dtype=kind)
        last_query = _last(np.unique(table["query"][table["asked"]]), self.max_queries)
        own = np.unique(table["document"][table["query"] <= max(last_query, 0)])
        others = np.fromiter((_place(self.source, d) for d in documents), dtype=np.uint64)
        every = np.unique(np.concatenate([table["document"], others]))
        return Kept(self.source, last_query, _last(every, self.max_passages + len(own)))


def _place(source: str, name: str) -> int:
    return int(place(0, f"{source}/{name}")[:16], 16)


def _last(places: np.ndarray, count: int | None) -> int:
    """The place of the last of so many; of all, if there are not more; −1 of none."""
    last = len(places) - 1 if count is None else min(count, len(places)) - 1
    return int(places[last]) if last >= 0 else -1
