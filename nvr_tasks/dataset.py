"""The `dataset` and `benchmark` artefacts as tables: layout, reading, and the text a model sees.

dataset/<fp>/    corpus/part-*.parquet  doc_id · title · text · group     group: equal for (near-)duplicate passages
                 queries.parquet        query_id · text · split · source  split: train | dev (held out of training)
                 qrels.parquet          query_id · doc_id · relevance · split   every judgement read, any split
                 media/<kind>/<sha256>.<ending>    images and sounds, if there are any; then corpus or queries have a column
                                        `media` that names them (<kind>/<sha256>.<ending>)
benchmark/<fp>/  tasks.json             per task: split, official, revision (content hash), counts
                 <task>/corpus.jsonl.gz · queries.jsonl.gz · qrels/<split>.tsv   BEIR layout
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from nvr_tasks.artifacts import reading
from nvr_tasks.errors import NvrError
from nvr_tasks.media import FOLDER, START, refer

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
        files: folder of the images and sounds that texts refer to (`nvr_tasks.media`); None if no text does.
    """

    corpus: pd.DataFrame
    queries: pd.DataFrame
    qrels: pd.DataFrame
    files: Path | None = None

    def passages(self) -> list[str]:
        """What a model sees of each passage, in corpus order: its file, if any, title, a space, text (as MTEB does)."""
        texts = [
            passage_text(title, text) for title, text in zip(self.corpus["title"], self.corpus["text"], strict=True)
        ]
        return _with_media(self.corpus, texts)

    def seen(self) -> Iterator[tuple[str, str]]:
        """(source, what a model sees) of every query and passage."""
        yield from zip(self.queries["source"], self.queries["text"], strict=True)
        for doc_id, text in zip(self.corpus["doc_id"], self.passages(), strict=True):
            yield doc_id.partition("/")[0], text

    def refuse_media(self, who: str) -> None:
        """Raise NvrError if there are images or sounds: `who` reads texts alone."""
        if self.files is not None:
            number = sum(text.startswith(START) for _, text in self.seen())
            raise NvrError(
                f"{who} reads text only, but {number:,} texts of the data set have images or sounds: leave that out, or those sources"
            )


def passage_text(title: str, text: str) -> str:
    """Title and text as one string, the way MTEB joins them."""
    return f"{title} {text}".strip()


def read_dataset(folder: Path) -> RetrievalData:
    """Read a `dataset` artefact's folder."""
    files = folder / FOLDER
    queries = _read(folder / "queries.parquet", QUERY_COLUMNS)
    if "media" in queries:
        queries["text"] = _with_media(queries, queries["text"])
    return RetrievalData(
        corpus=_read(folder / "corpus", CORPUS_COLUMNS),
        queries=queries,
        qrels=_read(folder / "qrels.parquet", QRELS_COLUMNS),
        files=files if files.is_dir() else None,
    )


def _with_media(table: pd.DataFrame, texts: Iterable[str]) -> list[str]:
    return [refer(m, t) for m, t in zip(table["media"], texts, strict=True)] if "media" in table else list(texts)


def _read(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """The columns, and `media` if it is there."""
    with reading(path):
        first = min(path.glob("*.parquet")) if path.is_dir() else path
        more = [name for name in ("media",) if name in pq.read_schema(first).names]
        return pd.read_parquet(path, columns=[*columns, *more], page_checksum_verification=True)
