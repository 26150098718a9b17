"""A retrieval data set as its source has it: texts untouched, ids checked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from nvr_tasks.errors import NvrError

Qrels = dict[tuple[str, str], int]  # (query id, document id) → relevance, in source order


@dataclass
class RawData:
    """Documents, queries and judgements of one source.

    Attributes:
        where: the source, as people name it (in messages).
        documents: document id → (title, text), in source order.
        queries: query id → text, in source order.
        qrels: split → judgements.
        merged: how many identical repetitions each kind of row had.
        media, query_media: document id, query id → the image or sound beside its text, as `MediaFiles` keeps it.
        unread_queries, unread_documents: how many were left in the source, beyond the bounds of who asked.
    """

    where: str
    documents: dict[str, tuple[str, str]] = field(default_factory=dict)
    queries: dict[str, str] = field(default_factory=dict)
    qrels: dict[str, Qrels] = field(default_factory=dict)
    merged: Counter[str] = field(default_factory=Counter)
    media: dict[str, str] = field(default_factory=dict)
    query_media: dict[str, str] = field(default_factory=dict)
    unread_queries: int = 0
    unread_documents: int = 0

    def add_document(self, doc_id: str, title: str, text: str, where: str, media: str = "") -> None:
        """Add a document. Raises NvrError when the id is taken by another text, image or sound."""
        known = self.documents.get(doc_id)
        if known is None:
            self.documents[doc_id] = (title, text)
            if media:
                self.media[doc_id] = media
        elif known == (title, text) and self.media.get(doc_id, "") == media:
            self.merged["document_repeated"] += 1
        else:
            raise NvrError(
                f"{where}: document id {doc_id!r} was used before with a different text: ids must be unique; correct the source"
            )

    def add_query(self, query_id: str, text: str, where: str, media: str = "") -> None:
        """Add a query. Raises NvrError when the id is taken by another text, image or sound."""
        known = self.queries.get(query_id)
        if known is None:
            self.queries[query_id] = text
            if media:
                self.query_media[query_id] = media
        elif known == text and self.query_media.get(query_id, "") == media:
            self.merged["query_repeated"] += 1
        else:
            raise NvrError(
                f"{where}: query id {query_id!r} was used before with a different text: ids must be unique; correct the source"
            )

    def add_judgement(self, split: str, query_id: str, doc_id: str, relevance: int, where: str) -> None:
        """Add a judgement of a query and a document that have been added. Of repetitions the last counts, as in MTEB."""
        if query_id not in self.queries:
            raise NvrError(
                f"{where}: query {query_id!r} (judged with document {doc_id!r}) is not among "
                f"the {len(self.queries):,} queries of {self.where}"
            )
        if doc_id not in self.documents:
            raise NvrError(
                f"{where}: document {doc_id!r} (judged for query {query_id!r}) is not among "
                f"the {len(self.documents):,} documents of {self.where}"
            )
        qrels = self.qrels.setdefault(split, {})
        if (query_id, doc_id) in qrels:
            self.merged["judgement_repeated"] += 1
        qrels[query_id, doc_id] = relevance

    def split(self, name: str) -> Qrels:
        """Judgements of a split. Raises NvrError, naming the splits there are."""
        if not self.qrels.get(name):
            there = ", ".join(sorted(s for s, rows in self.qrels.items() if rows)) or "none"
            raise NvrError(f"{self.where} has no judgements in split {name!r}; splits there: {there}")
        return self.qrels[name]

    def check_documents(self) -> None:
        """Raises NvrError when there are none: said before every judgement would be of a missing document."""
        if not self.documents:
            raise NvrError(f"the corpus of {self.where} is empty: check the source")

    def checked(self) -> RawData:
        """Itself, when there is something in it. Raises NvrError on an empty corpus, no query or no judgement."""
        self.check_documents()
        if not self.queries:
            raise NvrError(f"{self.where} has no queries: check the source")
        if not any(self.qrels.values()):
            raise NvrError(f"{self.where} has no judgements (qrels): check the source")
        return self
