"""How much of a source is kept: so many queries, their passages, and so many others. The same ones from a larger source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nvr_tasks.data.raw import RawData
from nvr_tasks.data_settings import TrainingSource, WithOrigin
from nvr_tasks.errors import NvrError

Places = npt.NDArray[np.uint64]


def place(seed: int, name: str) -> str:
    """A random-looking place in an order that depends on nothing but seed and name."""
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Wanted:
    """Which documents of a source are read, and with them their judgements.

    Attributes:
        own: places of documents that a kept query is judged with.
        last: place of the last one that is kept beside them.
        queries, documents: how many the whole source has, of the queries those that can be trained on.
    """

    source: str
    split: str
    own: frozenset[int]
    last: int
    queries: int
    documents: int

    def document(self, doc_id: str) -> bool:
        """Whether a document is wanted."""
        found = _place(self.source, doc_id)
        return found <= self.last or found in self.own

    def count(self, data: RawData) -> None:
        """Note in what was read how much was not."""
        asked = {q for (q, _), relevance in data.qrels.get(self.split, {}).items() if relevance >= 1}
        data.unread_queries = self.queries - len(asked)
        data.unread_documents = self.documents - len(data.documents)


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

    def wanted(self, rows: Iterable[tuple[str, str, str, int]], documents: Iterable[str] = ()) -> Wanted:
        """What to read: at least what `assemble` will keep, which has the last word.

        Args:
            rows: split, query, document and relevance of every judgement of texts that are not empty. Ids are not held, their
                places are.
            documents: the corpus, if there are documents without any judgement.

        Raises:
            NvrError: the split that is trained on has no judgement.
        """
        splits = set()

        def placed() -> Iterable[tuple[int, int, bool, bool]]:
            for split, query, document, relevance in rows:
                splits.add(split)
                asked = split == self.split
                yield _place(self.source, query), _place(self.source, document), asked, asked and relevance >= 1

        kind = [("query", np.uint64), ("document", np.uint64), ("judged", bool), ("asked", bool)]
        table = np.fromiter(placed(), dtype=kind)
        if not table["judged"].any():
            there = ", ".join(sorted(splits)) or "none"
            raise NvrError(f"source {self.source} has no judgements in split {self.split!r}; splits there: {there}")
        queries = np.unique(table["query"][table["asked"]])
        own: Places = np.unique(table["document"][np.isin(table["query"], queries[: self.max_queries])])
        others = np.fromiter((_place(self.source, d) for d in documents), dtype=np.uint64)
        every = np.unique(np.concatenate([table["document"], others]))
        beside = np.setdiff1d(every, own, assume_unique=True)[: self.max_passages]
        last = int(beside[-1]) if len(beside) else -1
        return Wanted(self.source, self.split, frozenset(own.tolist()), last, len(queries), len(every))


def _place(source: str, name: str) -> int:
    return int(place(0, f"{source}/{name}")[:16], 16)
