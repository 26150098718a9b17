"""The official mteb task classes, reading a mirrored BEIR folder instead of the hub.

Name, prompt, metric and scoring stay mteb's; only `load_data` is ours, and the per-query scores that mteb computes on
its way to the mean are kept.
"""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

from datasets import Dataset  # noqa: TID253 - this module is the bridge to mteb; only evaluation imports it
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: TID253
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: TID253

from nvr_tasks.artifacts import reading
from nvr_tasks.official import official_task, subset_of


def mirrored_task(
    name: str, folder: Path, split: str, revision: str, *, official: bool, subset: str | None = None
) -> Any:
    """An mteb retrieval task over the BEIR folder of a `benchmark` artefact.

    Args:
        name: name of the mteb task, or of a task of our own.
        folder: corpus.jsonl.gz, queries.jsonl.gz, qrels/<split>.tsv.
        split: the split that is scored.
        revision: content hash of the mirrored task; mteb reports it as the data set revision.
        subset: subset (language) that the data are of; needed where mteb's task has several.
        official: take class and metadata from mteb; else a plain retrieval task with nDCG@10.

    Returns:
        An mteb task with an extra attribute `per_query`: after evaluation, {query id: {metric: value}}.

    Raises:
        NvrError: mteb has no task of that name, or it has several subsets and none was named.
    """
    task = official_task(name) if official else None
    base: type[Any] = AbsTaskRetrieval if task is None else type(task)
    metadata = _own_metadata(name) if task is None else base.metadata
    part = "default" if task is None else subset_of(task, subset)
    dataset = {**metadata.dataset, "revision": revision}
    new_metadata = metadata.model_copy(update={"eval_splits": [split], "dataset": dataset})

    class Mirrored(base):  # type: ignore[misc]
        metadata = new_metadata
        per_query: dict[str, dict[str, float]]
        data_loaded: bool

        def load_data(self, *_: Any, **__: Any) -> None:
            if not self.data_loaded:
                with reading(folder):
                    self.dataset = {part: {split: _read_beir(folder, split)}}
                self.data_loaded = True

        def task_specific_scores(
            self, scores: dict[str, dict[str, float]], *args: Any, **kwargs: Any
        ) -> dict[str, float]:
            self.per_query = scores
            result: dict[str, float] = super().task_specific_scores(scores, *args, **kwargs)
            return result

    Mirrored.__name__ = base.__name__
    mirrored = Mirrored()
    mirrored.hf_subsets = [part]
    return mirrored


def _own_metadata(name: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        dataset={"path": f"nvr/{name}", "revision": "mirrored"},
        description=f"{name}: a retrieval benchmark of this recipe, scored like an MTEB Retrieval task.",
        reference=None,
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
    )


def _read_beir(folder: Path, split: str) -> dict[str, Any]:
    corpus = [
        {"id": r["_id"], "title": r.get("title") or "", "text": r["text"]} for r in _jsonl(folder / "corpus.jsonl.gz")
    ]
    qrels: dict[str, dict[str, int]] = {}
    with (folder / "qrels" / f"{split}.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    queries = [{"id": r["_id"], "text": r["text"]} for r in _jsonl(folder / "queries.jsonl.gz") if r["_id"] in qrels]
    return {
        "corpus": Dataset.from_list(corpus),
        "queries": Dataset.from_list(queries),
        "relevant_docs": qrels,
        "top_ranked": None,
    }


def _jsonl(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
