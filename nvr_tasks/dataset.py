"""The `dataset` and `benchmark` artefacts as tables: layout, reading, and the text a model sees.

dataset/<fp>/    corpus/part-*.parquet  doc_id · title · text · group     group: equal for (near-)duplicate passages
                 queries.parquet        query_id · text · split · source  split: train | dev (held out of training)
                 qrels.parquet          query_id · doc_id · relevance · split   every judgement read, any split
benchmark/<fp>/  tasks.json             per task: split, official, revision (content hash), counts
                 <task>/corpus.jsonl.gz · queries.jsonl.gz · qrels/<split>.tsv   BEIR layout
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from nvr_tasks.artifacts import reading

CORPUS_COLUMNS = ("doc_id", "title", "text", "group")
QUERY_COLUMNS = ("query_id", "text", "split", "source")
QRELS_COLUMNS = ("query_id", "doc_id", "relevance", "split")


@dataclass(frozen=True)
class RetrievalData:
    """A data set in memory.

    Attributes:
        corpus: one row per passage, columns `CORPUS_COLUMNS`; `doc_id` unique; sorted by it.
        queries: one row per query, columns `QUERY_COLUMNS`; `query_id` unique; sorted by it.
        qrels: one row per judgement, columns `QRELS_COLUMNS`; relevance ≥ 1 is relevant; ids resolve.
    """

    corpus: pd.DataFrame
    queries: pd.DataFrame
    qrels: pd.DataFrame

    def passages(self) -> list[str]:
        """What a model sees of each passage, in corpus order: title, a space, text (as MTEB does)."""
        return [
            passage_text(title, text) for title, text in zip(self.corpus["title"], self.corpus["text"], strict=True)
        ]


def passage_text(title: str, text: str) -> str:
    """Title and text as one string, the way MTEB joins them."""
    return f"{title} {text}".strip()


def read_dataset(folder: Path) -> RetrievalData:
    """Read a `dataset` artefact's folder."""
    return RetrievalData(
        corpus=_read(folder / "corpus", CORPUS_COLUMNS),
        queries=_read(folder / "queries.parquet", QUERY_COLUMNS),
        qrels=_read(folder / "qrels.parquet", QRELS_COLUMNS),
    )


def _read(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    with reading(path):
        return pd.read_parquet(path, columns=list(columns), page_checksum_verification=True)
