"""Score the quick tier of the benchmark, and say whether the challenger is worth scoring on the rest.

Reads   benchmark/<fp> · model/<fp> · registration/<fp> · the champion's version in the MLflow registry
Writes  scores/<fp> of challenger and champion on the tasks of `gate.quick` · screening/<fp>: screening.json

It stops a challenger that is shown to fall short of the champion there (paired over queries, at `gate.alpha`), or whose
mean is below a floor: `nvr score` then leaves the other tasks out, and `nvr gate` holds. It promotes nobody. What it has
scored, `nvr score` does not score again. A recipe without `gate.quick` has no quick tier, and nothing is done.

Example  nvr screen --recipe beir-small --set 'gate.quick={tasks: [SciFact]}'
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvr_tasks.artifacts import Artifact, Identity
from nvr_tasks.errors import NvrError
from nvr_tasks.evaluation import scores
from nvr_tasks.evaluation.comparison import PRIMARY, read_per_query
from nvr_tasks.evaluation.subjects import Subject, subjects
from nvr_tasks.evaluation.tiers import KIND, RECORD, screen, tier_identity
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one

VERSION = 1
ROLES = {"evaluation": "challenger", "evaluation_champion": "champion"}

log = logging.getLogger(__name__)


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """One `screening`, which depends on who is champion; none without a quick tier."""
    if ctx.recipe.gate.quick is None:
        return {}
    return {KIND: [_identity(ctx, ctx.store.open(one(inputs, "benchmark")), _models(ctx, inputs))]}


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
    """Score what is missing on the tasks of the tier, and judge."""
    del plan  # the champion may have changed since
    if ctx.recipe.gate.quick is None:
        return StageResult("screen", {KIND: []}, {"quick_tier": "none"})
    benchmark, models = ctx.store.open(one(inputs, "benchmark")), _models(ctx, inputs)
    identity = _identity(ctx, benchmark, models)
    found = ctx.store.find(identity)
    artifact = found or _screening(ctx, benchmark, models, identity)
    return StageResult("screen", {KIND: [artifact.uri]}, artifact.manifest.stats["figures"], reused=found is not None)


def _screening(ctx: Context, benchmark: Artifact, models: dict[str, Subject], identity: Identity) -> Artifact:
    per_query: dict[str, dict[str, dict[str, float]]] = {}
    for role, subject in models.items():
        per_query[role] = {}
        with ctx.store.workdir("score") as scratch:
            scorer = scores.Scorer(ctx, subject, benchmark, scratch)
            for task in _tasks(ctx):
                folder = ctx.store.fetch(scorer.scores(task), only={"per_query.parquet"})
                per_query[role] |= read_per_query(folder, PRIMARY)
    parts = scores.aggregates(benchmark)
    outcome = screen(ctx.recipe.gate, per_query["challenger"], per_query.get("champion"), parts)
    log.info("quick tier: %s", "the challenger falls short, nothing else is scored" if outcome.stopped else "go on")

    def write(folder: Path) -> dict[str, Any]:
        text = json.dumps(asdict(outcome), indent=2, sort_keys=True, ensure_ascii=False)
        (folder / RECORD).write_text(text, encoding="utf-8")
        figures = {"quick_tier": "stop" if outcome.stopped else "go on", "mean": round(outcome.mean, 4)}
        if outcome.gain is not None:
            figures["gain"] = round(outcome.gain, 4)
        return {"stopped": outcome.stopped, "figures": figures}

    return ctx.store.publish(identity, write)


def _models(ctx: Context, inputs: Inputs) -> dict[str, Subject]:
    """Challenger and champion; one of them if they are the same, there is no champion, or the tier does not look at it."""
    found = {ROLES[s.role]: s for s in subjects(ctx, inputs) if s.role in ROLES}
    champion, quick = found.get("champion"), ctx.recipe.gate.quick
    alike = champion is not None and champion.identity == found["challenger"].identity
    if alike or (quick is not None and quick.max_shortfall is None):
        found.pop("champion", None)
    return found


def _identity(ctx: Context, benchmark: Artifact, models: dict[str, Subject]) -> Identity:
    absent = sorted(set(_tasks(ctx)) - set(scores.tasks_of(benchmark)))
    if absent:
        raise NvrError(
            f"{benchmark.uri} has no {', '.join(absent)}, which gate.quick.tasks names: pass another benchmark"
        )
    looked_at = {
        role: {task: scores.identity(ctx, model, benchmark, task).fingerprint for task in _tasks(ctx)}
        for role, model in models.items()
    }
    config = {
        "policy": tier_identity(ctx.recipe.gate),
        "models": {role: model.identity for role, model in models.items()},
        "scores": looked_at,
    }
    return Identity(KIND, VERSION, config, {"benchmark": benchmark.uri})


def _tasks(ctx: Context) -> tuple[str, ...]:
    return () if ctx.recipe.gate.quick is None else ctx.recipe.gate.quick.tasks
