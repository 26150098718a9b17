"""The `benchmark` artefact: MTEB tasks as BEIR folders, text untouched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvr_tasks.data.beir import digest_rows, read_beir, write_beir
from nvr_tasks.data.raw import RawData
from nvr_tasks.errors import NvrError


@dataclass(frozen=True)
class Task:
    """One benchmark task: a whole corpus, and the queries that its split judges (as MTEB selects them)."""

    name: str
    split: str
    official: bool
    data: RawData
    part_of: str | None = None  # the aggregate of mteb that it is averaged into
    subset: str | None = None  # of a task that has several

    @property
    def revision(self) -> str:
        """Content hash: what MTEB sees as the data set's revision."""
        return digest_rows(self.data, self.split)

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each kind."""
        return {
            "documents": len(self.data.documents),
            "queries": len(self.data.queries),
            "judgements": len(self.data.qrels[self.split]),
        }

    def entry(self) -> dict[str, Any]:
        """The task's line in tasks.json."""
        more = {"part_of": self.part_of, "subset": self.subset}
        return {
            "split": self.split,
            "official": self.official,
            "revision": self.revision,
            "counts": self.counts,
            **{name: value for name, value in more.items() if value is not None},
        }


def select(
    name: str, split: str, official: bool, raw: RawData, *, part_of: str | None = None, subset: str | None = None
) -> Task:
    """A source's corpus with the queries and judgements of one split."""
    qrels = raw.split(split)
    if not any(score >= 1 for score in qrels.values()):
        raise NvrError(
            f"{raw.where}: no judgement in split {split!r} has a score of 1 or more, so task {name} cannot be scored"
        )
    if raw.media or raw.query_media:
        raise NvrError(
            f"{raw.where}: {len(raw.media) + len(raw.query_media):,} documents and queries of task {name} have images or sounds, and "
            "a benchmark is scored on text alone: use one of texts"
        )
    judged = {query_id for query_id, _ in qrels}
    queries = {i: text for i, text in raw.queries.items() if i in judged}
    return Task(name, split, official, RawData(raw.where, raw.documents, queries, {split: qrels}), part_of, subset)


def write(tasks: list[Task], folder: Path, revisions: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Write tasks.json and a folder per task; read each back and compare. Returns the manifest's stats.

    Args:
        revisions: task → commit of the hub that its data were read from, where they were.
    """
    entries = {}
    for task in tasks:
        target, data = folder / task.name, task.data
        write_beir(
            target,
            ((i, title, text) for i, (title, text) in data.documents.items()),
            data.queries.items(),
            task.split,
            data.qrels[task.split],
        )
        entries[task.name] = task.entry()
        again = replace(task, data=read_beir(target, task.name))
        if again.entry() != entries[task.name]:
            raise NvrError(
                f"the mirror of {task.name} differs from its source {data.where}: {again.entry()} instead of {entries[task.name]}"
            )
    (folder / "tasks.json").write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {
        "figures": {
            "benchmark_queries": sum(t.counts["queries"] for t in tasks),
            "benchmark_passages": sum(t.counts["documents"] for t in tasks),
        },
        "tasks": entries,
        "sources": {t.name: t.data.where for t in tasks},
        "revisions": dict(revisions or {}),
    }
