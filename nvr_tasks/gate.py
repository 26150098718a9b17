"""Decide from the scores whether the challenger has earned promotion; on promote, move the alias `champion`.

Reads   registration/<fp> · evaluation/<fp> of challenger, untrained base and champion
Writes  decision/<fp>: decision.json (verdict, one reason per criterion) · report.html

The verdict is *promote* when every criterion of the recipe's `gate` section holds, else *hold*. With --decide-only
the alias is left to `nvr promote` (in Airflow a task of its own, so that a hold shows as a skipped promotion).

Example  nvr gate --recipe demo --set gate.min_mean=0.6
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvr_tasks.artifacts import Artifact, Identity, fingerprint_of
from nvr_tasks.config import Gate
from nvr_tasks.errors import NvrError
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one
from nvr_tasks.tracking import CHAMPION, DIGEST_TAG, Tracking

VERSION = 1
PROMOTE, HOLD = "promote", "hold"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Criterion:
    """One condition of the gate, met or not, with the numbers that say why."""

    name: str
    passed: bool
    reason: str


Scores = dict[str, float]  # task → nDCG@10


def judge(
    policy: Gate, challenger: Scores, base: Scores, champion: Scores | None, *, is_champion: bool = False
) -> list[Criterion]:
    """Hold scores against the policy.

    Args:
        challenger: nDCG@10 per task, from 0 to 1.
        base: of the untrained student.
        champion: of the current champion; None when there is none.
        is_champion: the challenger is the champion already.

    Raises:
        NvrError: the models were scored on different tasks, or the champion's scores are missing.
    """
    for role, scores in (("base", base), ("champion", champion)):
        if scores is not None and set(scores) != set(challenger):
            raise NvrError(
                f"challenger and {role} were scored on different tasks ({sorted(challenger)} and {sorted(scores)}): run `nvr evaluate` again"
            )
    mean, base_mean = _mean(challenger), _mean(base)
    criteria = [_floor("mean nDCG@10", mean, policy.min_mean)]
    criteria += [
        _floor(f"{task} nDCG@10", challenger[task], floor) for task, floor in sorted(policy.min_per_task.items())
    ]
    gain = mean - base_mean
    criteria.append(
        Criterion(
            "gain over the untrained base",
            gain >= policy.min_gain_over_base,
            f"{mean:.4f} − {base_mean:.4f} = {gain:+.4f}, at least {policy.min_gain_over_base:+.4f} wanted",
        )
    )
    if is_champion:
        return [
            *criteria,
            Criterion("new model", False, "this version is the champion already; there is nothing to promote"),
        ]
    if champion is None:
        return [*criteria, Criterion("gain over the champion", True, "there is no champion yet")]
    gain = mean - _mean(champion)
    criteria.append(
        Criterion(
            "gain over the champion",
            gain > policy.min_gain_over_champion,
            f"{mean:.4f} − {_mean(champion):.4f} = {gain:+.4f}, more than {policy.min_gain_over_champion:+.4f} wanted",
        )
    )
    for task in sorted(challenger):
        loss = champion[task] - challenger[task]
        criteria.append(
            Criterion(
                f"loss on {task}",
                loss <= policy.max_loss_per_task,
                f"{champion[task]:.4f} → {challenger[task]:.4f}, a loss of at most {policy.max_loss_per_task:.4f} allowed",
            )
        )
    return criteria


def _floor(name: str, value: float, floor: float) -> Criterion:
    return Criterion(name, value >= floor, f"{value:.4f}, at least {floor:.4f} wanted")


def _mean(scores: Scores) -> float:
    return sum(scores.values()) / len(scores)


# ── stage ────────────────────────────────────────────────────────────────────────────────────────────────────────


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """A decision is made anew every time; its identity depends on who is champion, so `build` finds it."""
    del ctx, inputs
    return {}


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
    """Decide, record, and (unless decide-only) promote."""
    del plan
    from nvr_tasks.report import decision_report

    registration = ctx.store.read_json(ctx.store.open(one(inputs, "registration")), "registration.json")
    tracking = Tracking(ctx.recipe.register_.experiment)
    champion = tracking.alias(registration["name"], CHAMPION)
    challenger = tracking.require(registration["name"], registration["version"], registration["digest"])
    is_champion = champion is not None and str(champion.version) == registration["version"]
    if is_champion and (earlier := _own_promotion(ctx, challenger.tags.get("nvr.decision"))) is not None:
        log.info("this run decided to promote before it was interrupted; its decision stands")
        return _conclude(ctx, earlier)
    evaluations = _evaluations(
        ctx, inputs, champion.tags.get(DIGEST_TAG) if champion is not None and not is_champion else None
    )
    scores = {role: _scores(ctx, uri) for role, uri in evaluations.items()}
    criteria = judge(
        ctx.recipe.gate,
        scores["evaluation"],
        scores["evaluation_base"],
        scores.get("evaluation_champion"),
        is_champion=is_champion,
    )
    verdict = PROMOTE if all(c.passed for c in criteria) else HOLD
    decision = {
        "verdict": verdict,
        "criteria": [asdict(c) for c in criteria],
        "model": registration["name"],
        "challenger": registration["version"],
        "digest": registration["digest"],
        "champion": None if champion is None else str(champion.version),
        "dry_run": not ctx.recipe.gate.promote,
        "scores": {role.removeprefix("evaluation").strip("_") or "challenger": s for role, s in scores.items()},
        "policy": ctx.recipe.gate.model_dump(mode="json"),
        "evaluations": {role: fingerprint_of(uri) for role, uri in evaluations.items()},
        "model_artifact": registration["model"],
        "recipe": ctx.recipe.name,
        "pipeline_run": ctx.pipeline_run,
    }
    identity = Identity("decision", VERSION, decision, {"registration": one(inputs, "registration")})

    def write(folder: Path) -> dict[str, Any]:
        (folder / "decision.json").write_text(
            json.dumps(decision, indent=2, sort_keys=True, ensure_ascii=False), encoding="utf-8"
        )
        (folder / "report.html").write_text(decision_report(decision), encoding="utf-8")
        return {"figures": {"verdict": verdict}}

    artifact = ctx.store.publish(identity, write)
    for criterion in criteria:
        log.info("%s %s: %s", "✓" if criterion.passed else "✗", criterion.name, criterion.reason)
    log.info("verdict: %s", verdict)
    if ctx.pipeline_run is not None:
        _log_to_mlflow(ctx, tracking, decision, ctx.store.fetch(artifact))
    return _conclude(ctx, artifact)


def _conclude(ctx: Context, artifact: Artifact) -> StageResult:
    """The stage's result from its decision, after acting on it unless that is left to `nvr promote`."""
    decision = ctx.store.read_json(artifact, "decision.json")
    figures: dict[str, Any] = {
        "verdict": decision["verdict"],
        "version": decision["challenger"],
        "model": decision["model"],
        "criteria": decision["criteria"],
    }
    if not ctx.options.get("decide_only"):
        from nvr_tasks.promotion import promote

        outcome = promote(ctx, artifact)
        figures["promotion"] = outcome.skipped or f"champion is version {outcome.version}"
    return StageResult("gate", {"decision": [artifact.uri]}, figures)


def _own_promotion(ctx: Context, uri: str | None) -> Artifact | None:
    """The decision that made the challenger champion, if it was this very pipeline run's."""
    if ctx.pipeline_run is None or uri is None or not uri.startswith(ctx.store.root):
        return None
    artifact = ctx.store.get("decision", fingerprint_of(uri))
    if artifact is None or artifact.manifest.config["pipeline_run"] != ctx.pipeline_run:
        return None
    return artifact


def _evaluations(ctx: Context, inputs: Inputs, champion_digest: str | None) -> dict[str, str]:
    """The evaluations to compare; refuses scores of a model that is no longer the champion."""
    found = {role: one(inputs, role) for role in ("evaluation", "evaluation_base")}
    if champion_digest is None:
        return found
    champion = inputs.get("evaluation_champion", [])
    if champion and ctx.store.open(champion[0]).manifest.config["model"] == {"digest": champion_digest}:
        return {**found, "evaluation_champion": champion[0]}
    raise NvrError(
        "the champion changed after the evaluation, or was never scored: run `nvr evaluate` again, then `nvr gate`"
    )


def _scores(ctx: Context, uri: str) -> Scores:
    return {task: float(v["ndcg_at_10"]) for task, v in ctx.store.open(uri).manifest.stats["scores"].items()}


def _log_to_mlflow(ctx: Context, tracking: Tracking, decision: dict[str, Any], folder: Path) -> None:
    run = tracking.run(str(ctx.pipeline_run))
    metrics = {
        f"ndcg_at_10/{role}/{task}": value
        for role, tasks in decision["scores"].items()
        for task, value in tasks.items()
    }
    tracking.log(run, metrics=metrics)
    with tracking.explained():
        tracking.client.set_tag(run.info.run_id, "nvr.verdict", decision["verdict"])
        for name in ("decision.json", "report.html"):
            tracking.client.log_artifact(run.info.run_id, str(folder / name), "decision")
