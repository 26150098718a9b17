"""Data sets of mteb's Retrieval tasks, read by mteb's own loaders at the commits that mteb pins. No remote code."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from nvr_tasks.data.hub import explained
from nvr_tasks.data.raw import RawData
from nvr_tasks.data_settings import MtebSource
from nvr_tasks.errors import NvrError
from nvr_tasks.official import official_task, subset_of


def probe(source: MtebSource) -> dict[str, Any]:
    """What the data are pinned by: mteb's revision, and the version of the loader."""
    return {"data": _pinned(official_task(source.task)), "mteb": version("mteb")}


def _pinned(task: Any) -> dict[str, Any]:
    data: dict[str, Any] = dict(task.metadata.dataset)
    if data.get("trust_remote_code"):
        raise NvrError(
            f"mteb reads task {task.metadata.name} by running code of {data['path']}, which is never done: "
            "mirror it as a BEIR folder and give that as its origin"
        )
    return data


def read_mteb(source: MtebSource) -> RawData:
    """Corpus, queries and judgements of every split that mteb scores."""
    task = official_task(source.task)
    pinned = _pinned(task)
    subset = subset_of(task, source.subset)
    task.hf_subsets = [subset]
    with explained(str(pinned["path"]), str(pinned["revision"])):
        task.load_data()
        task.convert_v1_dataset_format_to_v2(num_proc=None)
    data = RawData(f"{pinned['path']}@{str(pinned['revision'])[:7]}")
    for split, tables in task.dataset[subset].items():
        where = f"{source.task}/{subset}/{split}"
        for row in tables["corpus"]:
            data.add_document(str(row["id"]), row.get("title") or "", row["text"], where)
        for row in tables["queries"]:
            data.add_query(str(row["id"]), row["text"], where)
        for query, judged in tables["relevant_docs"].items():
            for doc, relevance in judged.items():
                data.add_judgement(split, str(query), str(doc), int(relevance), where)
    return data.checked()
