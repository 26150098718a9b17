"""The `scores` artefact: one model on one benchmark task.

scores/<fp>/  results/<owner__name>/<revision>/<task>.json   mteb's own result, in the layout that its leaderboard takes
              per_query.parquet                           task, query_id, metric, value

It is named by the model's weights, prompts and dtype, the version of mteb and the content of the task, and by nothing
else: the same model on the same task is scored once, whatever its role and whichever other tasks the benchmark has.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvr_tasks.artifacts import Artifact, Identity
from nvr_tasks.errors import NvrError, RecipeError
from nvr_tasks.evaluation.subjects import Subject
from nvr_tasks.pipeline import Context

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

VERSION = 1
KIND = "scores"

log = logging.getLogger(__name__)


def tasks_of(benchmark: Artifact) -> dict[str, dict[str, Any]]:
    """Name → split, content revision and counts of each task of a benchmark."""
    found: dict[str, dict[str, Any]] = benchmark.manifest.stats["tasks"]
    return found


def chosen_tasks(ctx: Context, benchmark: Artifact) -> list[str]:
    """The tasks to score: all of the benchmark, or the one of `--task`. Raises RecipeError if there is none such."""
    tasks = list(tasks_of(benchmark))
    task = ctx.options.get("task")
    if task is None:
        return tasks
    if task not in tasks:
        raise RecipeError(f"--task {task!r} is not in the benchmark; its tasks: {', '.join(tasks)}")
    return [task]


def identity(ctx: Context, subject: Subject, benchmark: Artifact, task: str) -> Identity:
    """What the scores of a model on a task are named by."""
    settings = ctx.recipe.evaluate
    prompts = settings.prompts.get(task)
    config = {
        "model": subject.identity,
        "dtype": settings.dtype,
        "prompts": None if prompts is None else prompts.model_dump(),
        "mteb": version("mteb"),
        "task": {"name": task, **tasks_of(benchmark)[task]},
    }
    return Identity(KIND, VERSION, config)


class Scorer:
    """Scores one model on tasks; it is loaded at the first task that was not scored before."""

    def __init__(self, ctx: Context, subject: Subject, benchmark: Artifact, scratch: Path) -> None:
        self.ctx, self.subject, self.benchmark, self.scratch = ctx, subject, benchmark, scratch
        self.model: SentenceTransformer | None = None

    def scores(self, task: str) -> Artifact:
        """The artefact of a task, found or made. Raises NvrError if the model's vectors are broken."""
        wanted = identity(self.ctx, self.subject, self.benchmark, task)
        found = self.ctx.store.find(wanted)
        if found is not None:
            log.info("%s on %s: scored before, reused", self.subject.role, task)
            return found
        return self.ctx.store.publish(wanted, lambda folder: self._write(task, folder))

    def _write(self, task: str, folder: Path) -> dict[str, Any]:
        from nvr_tasks.evaluation.run import score_task

        store, recipe = self.ctx.store, self.ctx.recipe
        files = [e.path for e in self.benchmark.manifest.files if e.path.startswith(f"{task}/")]
        data = store.fetch(self.benchmark, only=files) / task
        if self.model is None:
            log.info("scoring %s", self.subject.role)
            self.model = self.subject.load(self.scratch)
        values = score_task(
            self.model,
            self.subject.name,
            self.subject.revision,
            task,
            {**tasks_of(self.benchmark)[task], "official_revision": official_revision(self.benchmark, task)},
            data,
            folder,
            dtype=recipe.evaluate.dtype,
            prompts=recipe.evaluate.prompts.get(task),
            batch_size=recipe.runtime.eval_batch_size,
            block_rows=recipe.runtime.search_block_rows,
            block_queries=recipe.runtime.search_block_queries,
        )
        broken = [metric for metric, value in values.items() if not math.isfinite(value)]
        if broken:
            raise NvrError(f"{self.subject.role} has no finite {', '.join(broken)} on {task}: its vectors are broken")
        return {"scores": values}


def official_revision(benchmark: Artifact, task: str) -> str | None:
    """The hub's commit that a task's data were read from, if they were; a mirror's content vouches for itself only."""
    known = benchmark.manifest.stats.get("revisions", {}).get(task)
    return None if known is None else str(known)


def aggregates(benchmark: Artifact, among: Collection[str] | None = None) -> dict[str, list[str]]:
    """mteb's aggregates among the tasks (all, or those named): name → its parts."""
    found: dict[str, list[str]] = {}
    for task, facts in tasks_of(benchmark).items():
        if facts.get("part_of") and (among is None or task in among):
            found.setdefault(facts["part_of"], []).append(task)
    return found


def mean(scores: dict[str, dict[str, float]], parts: dict[str, list[str]], metric: str = "ndcg_at_10") -> float:
    """Mean over tasks, in which the parts of an aggregate count as one, as on the leaderboard (CQADupStack in BEIR).

    Args:
        scores: task → metric → value.
        parts: aggregate → its parts, as of `aggregates`.
    """
    inside = {task for tasks in parts.values() for task in tasks}
    values = [v[metric] for task, v in scores.items() if task not in inside]
    values += [sum(scores[task][metric] for task in tasks) / len(tasks) for tasks in parts.values()]
    return sum(values) / len(values)
