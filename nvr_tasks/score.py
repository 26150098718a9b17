"""Score challenger, base and champion on the tasks of the mirrored benchmark, one artefact per model and task.

Reads   benchmark/<fp> · model/<fp> · registration/<fp> · screening/<fp>, if any · the champion's version in the MLflow registry
Writes  scores/<fp> per model and task: mteb's result JSON and per_query.parquet (task, query_id, metric, value)

Airflow runs it once per task of the benchmark. What was scored before, in whichever role and benchmark, is not scored
again, so a killed run goes on with the tasks that it has not finished. After a quick tier that stopped the challenger
only its tasks are scored; the others are left out, which is no failure and keeps nothing from following. `nvr evaluate`
puts the tasks together.

Example  nvr score --recipe beir-small --task SciFact
"""

from __future__ import annotations

import logging
from typing import Any

from nvr_tasks.artifacts import Artifact
from nvr_tasks.evaluation import scores
from nvr_tasks.evaluation.subjects import needs, nobody, subjects
from nvr_tasks.evaluation.tiers import narrowed
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one

__all__ = ["build", "figures", "needs", "plan"]

log = logging.getLogger(__name__)


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """One `scores` artefact per model and task; models with the same weights share theirs."""
    benchmark = ctx.store.open(one(inputs, "benchmark"))
    found = [
        scores.identity(ctx, subject, benchmark, task)
        for task in _tasks(ctx, inputs, benchmark)
        for subject in subjects(ctx, inputs)
    ]
    return {"scores": list({i.fingerprint: i for i in found}.values())}


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:  # noqa: ARG001
    """Score what is missing; every model is loaded once at most."""
    benchmark = ctx.store.open(one(inputs, "benchmark"))
    tasks = _tasks(ctx, inputs, benchmark)
    if not tasks:
        log.info("%s is left out by the quick tier", ctx.options.get("task", "everything"))
        return StageResult("score", {"scores": []}, {"scores": 0, "left_out_by": "the quick tier"})
    made: list[Artifact] = []
    for subject in subjects(ctx, inputs):
        with ctx.store.workdir("score") as scratch:
            scorer = scores.Scorer(ctx, subject, benchmark, scratch)
            made += [scorer.scores(task) for task in tasks]
    if not made:
        return StageResult("score", {}, {}, skipped=nobody(ctx))
    uris = list(dict.fromkeys(a.uri for a in made))
    return StageResult("score", {"scores": uris}, figures("scores", made))


def _tasks(ctx: Context, inputs: Inputs, benchmark: Artifact) -> list[str]:
    """The tasks asked for, without those that the quick tier leaves out."""
    in_force = narrowed(ctx, inputs, benchmark)
    return [task for task in scores.chosen_tasks(ctx, benchmark) if in_force is None or task in in_force]


def figures(role: str, artifacts: list[Artifact]) -> dict[str, Any]:
    """How many (model, task) pairs have scores."""
    del role
    return {"scores": len({a.uri for a in artifacts})}
