"""Score one model on one mirrored task with the official mteb library."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mteb  # noqa: TID253 - only evaluation.scores imports this module, when there is something to score
import pandas as pd
import torch  # noqa: TID253
from mteb.cache import ResultCache  # noqa: TID253
from mteb.models import MultiVectorWrapper, SentenceTransformerEncoderWrapper  # noqa: TID253
from mteb.models.model_meta import ModelMeta  # noqa: TID253
from mteb.results import TaskResult  # noqa: TID253
from sentence_transformers import SentenceTransformer  # noqa: TID253

from nvr_tasks.errors import NvrError
from nvr_tasks.evaluation.exact import SIMILARITIES, ExactSearch
from nvr_tasks.evaluation.tasks import mirrored_task
from nvr_tasks.fast_model import FastModel, can_be_fast
from nvr_tasks.media import more_than_text
from nvr_tasks.mining.search import Tiles
from nvr_tasks.settings import Dtype, Prompts

log = logging.getLogger(__name__)

METRICS = ("ndcg_at_10", "recall_at_100")


def score_task(
    model: SentenceTransformer,
    name: str,
    revision: str,
    task_name: str,
    facts: Mapping[str, Any],
    data: Path,
    folder: Path,
    *,
    dtype: Dtype,
    prompts: Prompts | None = None,
    batch_size: int = 64,
    block_rows: int = 16384,
    block_queries: int = 2048,
) -> dict[str, float]:
    """Run a task and write mteb's own result JSON and the per-query scores.

    Args:
        model: SentenceTransformer, or MultiVectorEncoder (searched by mteb, with MaxSim).
        name: owner/name under which mteb records the model.
        revision: identity of its weights. mteb gives local models neither, and would mix up their results.
        facts: the task's entry in tasks.json; `official_revision` if the data are the hub's at that commit.
        data: local BEIR folder of the task.
        folder: gets results/<owner__name>/<revision>/<task>.json and per_query.parquet (task, query_id, metric, value).
        prompts: used instead of the model's own.
        block_rows: passages that are embedded and searched at a time; no score depends on it.

    Returns:
        {"main_score", "ndcg_at_10", "recall_at_100", "queries"}; scores from 0 to 1.
    """
    logging.getLogger("mteb").setLevel(logging.WARNING)
    clock = time.perf_counter()
    split = facts["split"]
    task = mirrored_task(
        task_name,
        data,
        split,
        facts.get("official_revision") or facts["revision"],
        official=facts["official"],
        subset=facts.get("subset"),
    )
    kind: Any = SentenceTransformerEncoderWrapper if isinstance(model, SentenceTransformer) else MultiVectorWrapper
    wrapper = kind(model, revision=revision)
    # By task, which mteb takes first; it leaves out those of tasks that it does not know.
    names = {"query": f"{task_name}-query", "passage": f"{task_name}-document"}
    own = {name: model.prompts[name] for name in names.values() if name in model.prompts}
    if prompts is not None:
        own = {name: getattr(prompts, kind) for kind, name in names.items()}
    wrapper.model_prompts = {**(wrapper.model_prompts or {}), **own}
    type_ = getattr(torch, dtype)
    similarity = str(model.similarity_fn_name or "cosine")
    if can_be_fast(model, similarity):
        wrapper.model = FastModel(model, type_, batch_size)
    elif more_than_text(model):
        raise NvrError(
            f"{name} reads more than text and cannot be scored: given to it as mteb does, a text that names an image would be "
            "fetched; use a model with one cosine vector per text"
        )
    meta = wrapper.mteb_model_meta.model_copy(update={"name": name, "revision": revision})
    wrapper.mteb_model_meta = meta
    with torch.autocast(model.device.type, type_, enabled=type_ != torch.float32):
        result = mteb.evaluate(
            _searcher(wrapper, similarity, Tiles(model.device.type, block_rows, block_queries)),
            task,
            cache=None,
            encode_kwargs={"batch_size": batch_size},
            show_progress_bar=False,
        )
    [task_result] = result.task_results
    _save(task_result, meta, folder)
    [values] = task_result.scores[split]
    rows = [
        (task_name, query, metric, float(v[_pytrec(metric)]))
        for query, v in sorted(task.per_query.items())
        for metric in METRICS
    ]
    table = pd.DataFrame(rows, columns=["task", "query_id", "metric", "value"])
    table.to_parquet(folder / "per_query.parquet", index=False)
    log.info(
        "%s: nDCG@10 %.4f over %d queries in %.1f s",
        task_name,
        values["ndcg_at_10"],
        len(task.per_query),
        time.perf_counter() - clock,
    )
    scores = {metric: float(values[metric]) for metric in ("main_score", *METRICS)}
    return {**scores, "queries": len(task.per_query)}


def _searcher(wrapper: Any, similarity: str, tiles: Tiles) -> Any:
    """Our exact search; for a model with another similarity mteb's own."""
    return ExactSearch(wrapper, similarity, tiles) if similarity in SIMILARITIES else wrapper


def _save(result: TaskResult, meta: ModelMeta, folder: Path) -> None:
    """<folder>/results/<owner__name>/<revision>/: <task>.json and model_meta.json, written by mteb itself."""
    ResultCache(cache_path=folder).save_to_cache(result, meta)


def write_aggregates(results: Path, parts: Mapping[str, Sequence[str]]) -> None:
    """Beside the results of an aggregate's parts, mteb's result of the aggregate (CQADupstackRetrieval).

    Args:
        results: folder with the results of one model, as mteb lays them out.
        parts: aggregate → its parts; one that is not complete has no result.
    """
    for name, tasks in parts.items():
        aggregate: Any = mteb.get_task(name)
        if set(tasks) != {t.metadata.name for t in aggregate.metadata.tasks}:
            continue
        files = [next(results.glob(f"*/*/{task}.json")) for task in tasks]
        combined = aggregate.combine_task_results([TaskResult.from_disk(file) for file in files])
        combined.to_disk(files[0].with_name(f"{name}.json"))


def _pytrec(metric: str) -> str:
    """mteb says ndcg_at_10 where trec_eval says ndcg_cut_10, and recall_at_100 where it says recall_100."""
    return metric.replace("ndcg_at_", "ndcg_cut_").replace("recall_at_", "recall_")
