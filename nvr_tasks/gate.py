"""Decide from the scores whether the challenger has earned promotion; on promote, move the alias `champion`.

Reads   registration/<fp> · screening/<fp>, if any · evaluation/<fp> of challenger, untrained base and champion
Writes  decision/<fp>: decision.json (verdict, one reason per criterion, intervals, lineage) · report.html

The verdict is *promote* when every criterion of the recipe's `gate` section holds, *needs-approval* when the policy then
wants a person's word, else *hold*. A challenger that the quick tier has stopped is held, and the other criteria are not
looked at. With --decide-only the alias is left to `nvr promote` (in Airflow a task of its
own, so that a hold shows as a skipped promotion).

Example  nvr gate --recipe demo --set gate.min_mean=0.6
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from nvr_tasks.artifacts import Artifact, fingerprint_of
from nvr_tasks.decision import RECORD, REPORT, decide, evaluation_like, registration_of
from nvr_tasks.errors import NvrError
from nvr_tasks.evaluation.subjects import base_identity
from nvr_tasks.evaluation.tiers import KIND, narrowed, stopped, tier_identity
from nvr_tasks.models import student_identity
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one
from nvr_tasks.promotion import act
from nvr_tasks.registry import Registry
from nvr_tasks.tracking import DIGEST_TAG, Tracking

log = logging.getLogger(__name__)


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """A decision is made anew every time; its identity depends on who is champion, so `build` finds it."""
    del ctx, inputs
    return {}


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
    """Decide, record, and (unless decide-only) promote."""
    del plan
    registration = registration_of(ctx.store, ctx.store.open(one(inputs, "registration")))
    tracking = Tracking(ctx.recipe.register_.experiment)
    challenger = tracking.require(registration["name"], registration["version"], registration["digest"])
    registry = Registry(ctx.store, tracking, registration["name"])
    standing = registry.standing()
    champion = standing.champion
    is_champion = champion is not None and str(champion.version) == registration["version"]
    if is_champion and (earlier := _own_promotion(ctx, challenger.tags.get("nvr.decision"))) is not None:
        log.info("this run decided to promote before it was interrupted; its decision stands")
        return _conclude(ctx, tracking, earlier)
    screening = _screening(ctx, inputs, registration)
    against = champion.tags.get(DIGEST_TAG) if champion is not None and not is_champion else None
    evaluations = _evaluations(ctx, inputs, registration, against, screening)
    return _conclude(ctx, tracking, decide(ctx, registry, registration, standing, evaluations, screening))


def _conclude(ctx: Context, tracking: Tracking, artifact: Artifact) -> StageResult:
    """The stage's result from its decision, after acting on it unless that is left to `nvr promote`."""
    decision = ctx.store.read_json(artifact, RECORD)
    figures: dict[str, Any] = {
        "verdict": decision["verdict"],
        "version": decision["challenger"],
        "model": decision["model"],
        "champion": decision["champion"],
        "criteria": decision["criteria"],
    }
    if ctx.pipeline_run is not None:
        figures["report_url"] = tracking.artifact_url(tracking.run(ctx.pipeline_run), f"decision/{REPORT}")
    if not ctx.options.get("decide_only"):
        outcome = act(ctx, artifact)
        figures["promotion"] = outcome.skipped or f"champion is version {outcome.version}"
        figures |= {"notes": list(outcome.notes)} if outcome.notes else {}
    return StageResult("gate", {"decision": [artifact.uri]}, figures)


def _own_promotion(ctx: Context, uri: str | None) -> Artifact | None:
    """The decision that made the challenger champion, if it was this very pipeline run's."""
    if ctx.pipeline_run is None or uri is None or not uri.startswith(ctx.store.root):
        return None
    artifact = ctx.store.get("decision", fingerprint_of(uri))
    if artifact is None or artifact.manifest.config["pipeline_run"] != ctx.pipeline_run:
        return None
    return artifact


def _screening(ctx: Context, inputs: Inputs, registration: Mapping[str, Any]) -> Artifact | None:
    """What the quick tier said, if the policy has one; refuses what was said of another model, or by another policy."""
    if ctx.recipe.gate.quick is None:
        return None
    screening = ctx.store.open(one(inputs, KIND))
    config = screening.manifest.config
    version = f"{registration['name']} version {registration['version']}"
    if config["models"]["challenger"] != {"digest": registration["digest"]}:
        raise NvrError(f"{screening.uri} is about other weights than {version}: run `nvr screen` for it")
    if config["policy"] != tier_identity(ctx.recipe.gate):
        raise NvrError(f"{screening.uri} was made by another policy than gate.quick: run `nvr screen` again")
    evaluation = ctx.store.open(one(inputs, "evaluation"))
    if screening.manifest.inputs["benchmark"] != evaluation.manifest.inputs["benchmark"]:
        raise NvrError(f"{screening.uri} is about another benchmark than {evaluation.uri}: run `nvr screen` again")
    return screening


def _evaluations(
    ctx: Context,
    inputs: Inputs,
    registration: Mapping[str, Any],
    champion_digest: str | None,
    screening: Artifact | None,
) -> dict[str, Artifact]:
    """The evaluations to compare; refuses scores of other models, or from another benchmark, than they should be.

    A verdict wants the scores of all its tasks. After a quick tier that stopped the challenger there are its tasks' alone,
    and the champion's only if it is still the one that was scored: there is nothing to be shown any more.
    """
    found = {role: ctx.store.open(one(inputs, role)) for role in ("evaluation", "evaluation_base")}
    mine, base = found["evaluation"], found["evaluation_base"]
    version = f"{registration['name']} version {registration['version']}"
    if mine.manifest.config["model"] != {"digest": registration["digest"]}:
        raise NvrError(f"{mine.uri} holds the scores of other weights than {version}: run `nvr evaluate` for it")
    if base.manifest.config["model"] != base_identity(_student(ctx, registration)):
        raise NvrError(
            f"{base.uri} holds the scores of another model than {version} was trained from: run `nvr evaluate`"
        )
    if _way(base) != _way(mine):
        raise NvrError(
            f"{base.uri} and {mine.uri} were scored on other benchmarks or in other ways: run `nvr evaluate`"
        )
    quick = ctx.recipe.gate.quick
    wanted = None if quick is None else narrowed(ctx, inputs, ctx.store.input_of(mine, "benchmark"))
    if mine.manifest.config.get("tasks") != wanted:
        covers = ", ".join(mine.manifest.config.get("tasks") or ["the whole benchmark"])
        raise NvrError(
            f"{mine.uri} holds the scores of {covers}, but the verdict is about {', '.join(wanted or ['the whole benchmark'])}: "
            "run `nvr evaluate` again"
        )
    if champion_digest is None:
        return found
    given = [ctx.store.open(uri) for uri in inputs.get("evaluation_champion", [])]
    theirs = next(
        (a for a in given if a.manifest.config["model"] == {"digest": champion_digest} and _way(a) == _way(mine)), None
    )
    # A run beside this one may have promoted since: then it has scored what it promoted.
    theirs = theirs or evaluation_like(ctx.store, mine, champion_digest)
    if theirs is not None:
        return {**found, "evaluation_champion": theirs}
    if screening is not None and stopped(screening):
        return found
    raise NvrError(
        "the champion changed after the evaluation, or was never scored: run `nvr evaluate` again, then `nvr gate`"
    )


def _student(ctx: Context, registration: Mapping[str, Any]) -> Any:
    """What the challenger was trained from, as training recorded it."""
    model = ctx.store.get("model", registration["model"])
    return student_identity(ctx.recipe.student) if model is None else model.manifest.config["student"]


def _way(evaluation: Artifact) -> tuple[Any, ...]:
    """All that decides scores beside the model: benchmark, settings, versions."""
    manifest = evaluation.manifest
    config = {key: value for key, value in manifest.config.items() if key != "model"}
    return manifest.stage_version, config, dict(manifest.inputs)
