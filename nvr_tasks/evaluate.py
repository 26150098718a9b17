"""Put the scores of challenger, untrained base and current champion on the mirrored benchmark together.

Reads   benchmark/<fp> · model/<fp> · registration/<fp> · screening/<fp>, if any · scores/<fp> · the champion's version in
        the MLflow registry
Writes  evaluation/<fp> per model: results/<owner__name>/<revision>/<task>.json (mteb's results, as its leaderboard takes
        them), per_query.parquet (task, query_id, metric, value)

Tasks that `nvr score` has not scored yet are scored here. A model that was scored on this very benchmark before is not
scored again, whichever role it had. After a quick tier that stopped the challenger, an evaluation holds its tasks alone.
With --model, one model only: `--model teacher` checks the benchmark itself against published scores, `--model
models:/NAME@ALIAS` and `--model OWNER/NAME@COMMIT` take any registered or hub model.

Example  nvr evaluate --recipe beir-small --model teacher
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nvr_tasks.artifacts import Artifact, Identity
from nvr_tasks.evaluation import scores
from nvr_tasks.evaluation.subjects import Subject, needs, nobody, subjects
from nvr_tasks.evaluation.tiers import narrowed
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one
from nvr_tasks.tracking import Tracking

VERSION = 2
__all__ = ["build", "figures", "needs", "plan", "tell"]


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """One `evaluation` artefact per model."""
    return {subject.role: [_identity(ctx, inputs, subject)] for subject in subjects(ctx, inputs)}


def _identity(ctx: Context, inputs: Inputs, subject: Subject) -> Identity:
    config = {"model": subject.identity, **ctx.recipe.evaluate.model_dump(mode="json"), "mteb": version("mteb")}
    tasks = narrowed(ctx, inputs, ctx.store.open(one(inputs, "benchmark")))
    if tasks is not None:
        config["tasks"] = tasks
    return Identity("evaluation", VERSION, config, {"benchmark": one(inputs, "benchmark")})


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
    """Gather the tasks of every model that has no evaluation on this benchmark yet."""
    benchmark = ctx.store.open(one(inputs, "benchmark"))
    outputs: dict[str, list[str]] = {}
    told: dict[str, Any] = {}
    for subject in subjects(ctx, inputs):
        identity = plan[subject.role][0] if subject.role in plan else _identity(ctx, inputs, subject)
        artifact = ctx.store.find(identity) or _gather(ctx, subject, identity, benchmark)
        outputs[subject.role] = [artifact.uri]
        told.update(figures(subject.role, [artifact]))
    if not outputs:
        return StageResult("evaluate", {}, {}, skipped=nobody(ctx))
    return StageResult("evaluate", outputs, told)


def tell(ctx: Context, pipeline_run: str, outputs: dict[str, list[str]]) -> dict[str, str]:
    """Scores and result files of a single model into MLflow; those that are compared, `nvr gate` logs."""
    if not ctx.options.get("model"):
        return {}
    tracking = Tracking(ctx.recipe.register_.experiment)
    run = tracking.run(pipeline_run)
    for role, uris in outputs.items():
        for artifact in (ctx.store.open(uri) for uri in uris):
            stats = artifact.manifest.stats
            metrics = {f"{metric}/{task}": v[metric] for task, v in stats["scores"].items() for metric in stats["mean"]}
            tracking.log(run, metrics=metrics | {f"{metric}/mean": value for metric, value in stats["mean"].items()})
            with tracking.explained():
                tracking.client.set_tag(run.info.run_id, "nvr.evaluated", ctx.options["model"])
                tracking.client.log_artifacts(run.info.run_id, str(ctx.store.fetch(artifact)), role)
    return {}


def figures(role: str, artifacts: list[Artifact]) -> dict[str, Any]:
    """Mean nDCG@10 (and each task's, for the model in question) under names that tell the roles apart."""
    [artifact] = artifacts
    stats = artifact.manifest.stats
    mean = round(stats["mean"]["ndcg_at_10"], 4)
    if role in ("evaluation", "evaluation_teacher", "evaluation_model"):
        return {**{task: round(v["ndcg_at_10"], 4) for task, v in stats["scores"].items()}, "mean": mean}
    return {f"{role.removeprefix('evaluation_')}_mean": mean}


def _gather(ctx: Context, subject: Subject, identity: Identity, benchmark: Artifact) -> Artifact:
    with ctx.store.workdir("score") as scratch:
        scorer = scores.Scorer(ctx, subject, benchmark, scratch)
        found = {task: scorer.scores(task) for task in identity.config.get("tasks") or scores.tasks_of(benchmark)}
    values = {task: a.manifest.stats["scores"] for task, a in found.items()}
    parts = scores.aggregates(benchmark, among=found)

    def write(folder: Path) -> dict[str, Any]:
        import pandas as pd

        tables = []
        for artifact in found.values():
            source = ctx.store.fetch(artifact)
            tables.append(pd.read_parquet(source / "per_query.parquet"))
            _merge(source / "results", folder / "results")
        pd.concat(tables, ignore_index=True).to_parquet(folder / "per_query.parquet", index=False)
        if parts:
            from nvr_tasks.evaluation.run import write_aggregates

            write_aggregates(folder / "results", parts)
        return {
            "scores": values,
            "aggregates": parts,
            "mean": {metric: scores.mean(values, parts, metric) for metric in ("ndcg_at_10", "recall_at_100")},
        }

    return ctx.store.publish(identity, write)


def _merge(source: Path, target: Path) -> None:
    """Add one task's results to those of the others; mteb keeps its settings of all tasks in one file, a line each."""
    for file in sorted(p for p in source.rglob("*") if p.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".jsonl" and place.exists():
            with place.open("ab") as merged:
                merged.write(file.read_bytes())
        else:
            shutil.copyfile(file, place)
