"""Score one model on a mirrored benchmark with the official mteb library."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import mteb  # noqa: TID253 - only evaluate.build imports this module
import pandas as pd
import torch  # noqa: TID253
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper  # noqa: TID253
from sentence_transformers import SentenceTransformer  # noqa: TID253

from nvr_tasks.artifacts import reading
from nvr_tasks.config import Dtype
from nvr_tasks.evaluation.tasks import mirrored_task

log = logging.getLogger(__name__)

METRICS = ("ndcg_at_10", "recall_at_100")


def score(
    model: SentenceTransformer,
    name: str,
    revision: str,
    benchmark: Path,
    folder: Path,
    *,
    dtype: Dtype,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Run every task of a benchmark and write mteb's own result JSON and the per-query scores.

    Args:
        name: name under which mteb records the model.
        revision: identity of its weights. mteb gives local models neither, and would mix up their results.
        benchmark: local folder of the `benchmark` artefact.
        folder: gets <task>.json and per_query.parquet (task, query_id, metric, value).

    Returns:
        {task: {"main_score", "ndcg_at_10", "recall_at_100", "queries"}}; scores from 0 to 1.
    """
    logging.getLogger("mteb").setLevel(logging.WARNING)
    with reading(benchmark / "tasks.json"):
        tasks = json.loads((benchmark / "tasks.json").read_text(encoding="utf-8"))
    wrapper = SentenceTransformerEncoderWrapper(model, revision=revision)
    meta = wrapper.mteb_model_meta.model_copy(update={"name": f"nvr/{name}", "revision": revision})
    wrapper.mteb_model_meta = meta
    type_ = getattr(torch, dtype)
    scores: dict[str, dict[str, float]] = {}
    rows: list[tuple[str, str, str, float]] = []
    for task_name, facts in tasks.items():
        clock = time.perf_counter()
        task = mirrored_task(
            task_name, benchmark / task_name, facts["split"], facts["revision"], official=facts["official"]
        )
        with torch.autocast(model.device.type, type_, enabled=type_ != torch.float32):
            result = mteb.evaluate(
                wrapper, task, cache=None, encode_kwargs={"batch_size": batch_size}, show_progress_bar=False
            )
        [task_result] = result.task_results
        task_result.to_disk(folder / f"{task_name}.json")
        [values] = task_result.scores[facts["split"]]
        scores[task_name] = {
            "main_score": float(values["main_score"]),
            **{metric: float(values[metric]) for metric in METRICS},
            "queries": len(task.per_query),
        }
        rows += [
            (task_name, query, metric, float(v[_pytrec(metric)]))
            for query, v in sorted(task.per_query.items())
            for metric in METRICS
        ]
        log.info(
            "%s: nDCG@10 %.4f over %d queries in %.1f s",
            task_name,
            values["ndcg_at_10"],
            len(task.per_query),
            time.perf_counter() - clock,
        )
    table = pd.DataFrame(rows, columns=["task", "query_id", "metric", "value"])
    table.to_parquet(folder / "per_query.parquet", index=False)
    return scores


def _pytrec(metric: str) -> str:
    """mteb says ndcg_at_10 where trec_eval says ndcg_cut_10, and recall_at_100 where it says recall_100."""
    return metric.replace("ndcg_at_", "ndcg_cut_").replace("recall_at_", "recall_")
