"""From evaluations to a recorded decision. Used by the gate, and by `promote` when the champion changed meanwhile."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from nvr_tasks.artifacts import Artifact, Identity, Store, fingerprint_of
from nvr_tasks.errors import NvrError
from nvr_tasks.evaluation import footprint
from nvr_tasks.evaluation.comparison import PRIMARY, RECALL, compare, interval_of_mean, read_per_query, task_weights
from nvr_tasks.evaluation.footprint import Footprint
from nvr_tasks.evaluation.tiers import KIND as SCREENING
from nvr_tasks.evaluation.tiers import read_screening
from nvr_tasks.html import mark
from nvr_tasks.judging import (
    HOLD,
    NEEDS_APPROVAL,
    PROMOTE,
    Criterion,
    Evidence,
    judge,
    not_looked_at,
    quick_tier,
    verdict,
)
from nvr_tasks.lineage import lineage
from nvr_tasks.pipeline import Context
from nvr_tasks.policy import Gate
from nvr_tasks.registry import Registry, Standing
from nvr_tasks.rejections import turned_down
from nvr_tasks.report import decision_report
from nvr_tasks.tracking import DIGEST_TAG, MODEL_TAG, PASSED_TAG, Tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

VERSION = 3
RECORD, REPORT = "decision.json", "report.html"
ROLES = {"evaluation": "challenger", "evaluation_base": "base", "evaluation_champion": "champion"}

log = logging.getLogger(__name__)


def decide(
    ctx: Context,
    registry: Registry,
    registration: Mapping[str, Any],
    standing: Standing,
    evaluations: Mapping[str, Artifact],
    screening: Artifact | None = None,
) -> Artifact:
    """Judge, record as a `decision` artefact (decision.json, report.html), and tell MLflow.

    Args:
        registration: registration.json of the challenger, with the artefact's `fingerprint`.
        standing: the champion of now; the decision holds only while nothing moves.
        evaluations: by role; without `evaluation_champion` when there is no champion or the challenger is it.
        screening: what the quick tier said. If it stopped the challenger, `evaluations` hold its tasks alone.

    Raises:
        NvrError: the evaluations cannot be compared, or a model to be measured cannot be loaded.
    """
    policy, tracking, champion = ctx.recipe.gate, registry.tracking, standing.champion
    is_champion = champion is not None and str(champion.version) == registration["version"]
    folders = {role: ctx.store.fetch(artifact, only={"per_query.parquet"}) for role, artifact in evaluations.items()}
    per_query = {role: read_per_query(folder, PRIMARY) for role, folder in folders.items()}
    against = per_query.get("evaluation_champion")
    parts = evaluations["evaluation"].manifest.stats["aggregates"]
    comparison = None if against is None else compare(policy, per_query["evaluation"], against, parts)
    quick = None if screening is None else read_screening(ctx.store, screening)
    moved = screening is not None and not is_champion and _compared_with(screening) != _digest(champion)
    costs: dict[str, Footprint] = {}
    if quick is not None and quick.stopped:
        tasks = policy.judged(task.task for task in ctx.recipe.data.benchmark)
        criteria = [quick_tier(quick, moved), *not_looked_at(policy, tasks, champion is not None and not is_champion)]
        reached = HOLD
    else:
        costs = _footprints(ctx, tracking, registration, None if is_champion else champion, evaluations["evaluation"])
        evidence = Evidence(
            challenger=_scores(evaluations["evaluation"]),
            base=_scores(evaluations["evaluation_base"]),
            queries={task: len(values) for task, values in per_query["evaluation"].items()},
            weights=task_weights(per_query["evaluation"], parts),
            comparison=comparison,
            is_champion=is_champion,
            recall=_recall(policy, evaluations),
            footprint=costs.get("challenger"),
            champion_footprint=costs.get("champion"),
        )
        criteria = [*([] if quick is None else [quick_tier(quick, moved)]), *judge(policy, evidence)]
        reached = verdict(policy, criteria, comparison)
    objections = [] if is_champion else _objections(registry, registration["version"])
    criteria += objections
    if objections and reached == PROMOTE:
        reached = NEEDS_APPROVAL
    decision: dict[str, Any] = {
        "verdict": reached,
        "criteria": [asdict(c) for c in criteria],
        "model": registration["name"],
        "challenger": registration["version"],
        "digest": registration["digest"],
        "champion": None if champion is None else str(champion.version),
        "moves": standing.moves,
        "dry_run": not policy.promote,
        "quick": None if quick is None else asdict(quick),
        "scores": {ROLES[role]: _scores(artifact) for role, artifact in evaluations.items()},
        "means": {ROLES[role]: a.manifest.stats["mean"][PRIMARY] for role, a in evaluations.items()},
        "intervals": {
            ROLES[role]: {task: interval_of_mean(policy, v) for task, v in tasks.items()}
            for role, tasks in per_query.items()
        },
        "comparison": None if comparison is None else asdict(comparison),
        "footprints": {role: asdict(cost) for role, cost in costs.items()},
        "policy": policy.model_dump(mode="json"),
        "evaluations": {role: fingerprint_of(a.uri) for role, a in evaluations.items()},
        "model_artifact": registration["model"],
        "recipe": ctx.recipe.name,
        "pipeline_run": ctx.pipeline_run,
    }
    artifact = _publish(ctx, registration, evaluations, decision, screening)
    for criterion in criteria:
        log.info("%s %s: %s", mark(asdict(criterion)), criterion.name, criterion.reason)
    log.info("verdict: %s", decision["verdict"])
    if decision["verdict"] == PROMOTE:
        tracking.tag(registration["name"], registration["version"], {PASSED_TAG: artifact.uri})
    if ctx.pipeline_run is not None:
        _log_to_mlflow(ctx.pipeline_run, tracking, decision, ctx.store.fetch(artifact))
    return artifact


def _recall(policy: Gate, evaluations: Mapping[str, Artifact]) -> tuple[float, float] | None:
    """Mean Recall@100 of challenger and champion, if the policy looks at it and there is one."""
    if policy.max_recall_loss is None or "evaluation_champion" not in evaluations:
        return None
    ours, theirs = (evaluations[r].manifest.stats["mean"][RECALL] for r in ("evaluation", "evaluation_champion"))
    return float(ours), float(theirs)


def _objections(registry: Registry, version: str) -> list[Criterion]:
    """What scores cannot outweigh: a person took this version out of service, or turned it down."""
    remedy = "a person's approval: task `approve` in Airflow, or `nvr promote --approved-by`"
    found = []
    if (back := registry.withdrawn(version)) is not None:
        told = f"{back.who} rolled back from this version (move {back.number}, {back.when}): {back.why}"
        found.append(Criterion("not rolled back from", False, told, remedy))
    if (rejected := turned_down(registry, version)) is not None:
        found.append(Criterion("not rejected", False, rejected.told, remedy))
    return found


def compare_again(ctx: Context, registry: Registry, old: Artifact) -> Artifact:
    """A new decision on the same challenger, by the same policy, against the champion of now, which must have scores.

    Raises:
        NvrError: there is no champion, it was never scored on this benchmark in the same way, or the policy is of another
            version of NVR.
    """
    facts = ctx.store.read_json(old, RECORD)
    standing = registry.standing()
    champion = standing.champion
    if champion is None:
        raise NvrError(
            f"{facts['model']}@champion is gone since the decision: look at `nvr history`, then run `nvr gate` again"
        )
    ctx = replace(ctx, recipe=ctx.recipe.model_copy(update={"gate": _policy(facts), "name": facts["recipe"]}))
    registration = registration_of(ctx.store, ctx.store.input_of(old, "registration"))
    mine = ctx.store.open(ctx.store.uri("evaluation", facts["evaluations"]["evaluation"]))
    base = ctx.store.open(ctx.store.uri("evaluation", facts["evaluations"]["evaluation_base"]))
    evaluations = {"evaluation": mine, "evaluation_base": base}
    if str(champion.version) != registration["version"]:
        theirs = evaluation_like(ctx.store, mine, champion.tags.get(DIGEST_TAG))
        if theirs is None:
            raise NvrError(
                f"{facts['model']}@champion is version {champion.version} now, but the decision compared with version "
                f"{facts['champion']}, and version {champion.version} was never scored on this benchmark: "
                "run `nvr evaluate` and `nvr gate` again"
            )
        evaluations["evaluation_champion"] = theirs
    if str(champion.version) == facts["champion"]:
        log.info(
            "the champion is version %s again: it has moved and come back since: comparing again", champion.version
        )
    else:
        before = f"version {facts['champion']}" if facts["champion"] else "none"
        log.info(
            "the champion is version %s now, the decision compared with %s: comparing again", champion.version, before
        )
    screening = ctx.store.input_of(old, SCREENING) if SCREENING in old.manifest.inputs else None
    return decide(ctx, registry, registration, standing, evaluations, screening)


def registration_of(store: Store, artifact: Artifact) -> dict[str, Any]:
    """registration.json of a challenger, with the artefact's `fingerprint`."""
    return {**store.read_json(artifact, "registration.json"), "fingerprint": artifact.manifest.fingerprint}


def _policy(facts: Mapping[str, Any]) -> Gate:
    """The policy that a decision was made by; a recipe given since is another's, or was edited."""
    try:
        return Gate.model_validate(facts["policy"])
    except ValidationError as error:
        wrong = error.errors()[0]
        raise NvrError(
            f"the decision's policy is not one of this version of NVR ({'.'.join(map(str, wrong['loc']))}: {wrong['msg']}): "
            "run `nvr gate` again"
        ) from None


def evaluation_like(store: Store, evaluation: Artifact, digest: str | None) -> Artifact | None:
    """Another registered model's evaluation, made in the same way on the same benchmark, if there is one."""
    manifest = evaluation.manifest
    config = {**manifest.config, "model": {"digest": digest}}
    return store.find(Identity(manifest.kind, manifest.stage_version, config, manifest.inputs))


def _compared_with(screening: Artifact) -> str | None:
    """Digest of the champion that the quick tier compared with."""
    champion = screening.manifest.config["models"].get("champion")
    return None if champion is None else str(champion["digest"])


def _digest(champion: Any) -> str | None:
    return None if champion is None else champion.tags.get(DIGEST_TAG)


def _publish(
    ctx: Context,
    registration: Mapping[str, Any],
    evaluations: Mapping[str, Artifact],
    decision: dict[str, Any],
    screening: Artifact | None,
) -> Artifact:
    model = ctx.store.get("model", registration["model"])
    made_from = [a for a in (model, screening, *evaluations.values()) if a is not None]
    decision["lineage"] = lineage(ctx.store, made_from)
    inputs = {"registration": ctx.store.uri("registration", registration["fingerprint"])}
    if screening is not None:
        inputs[SCREENING] = screening.uri

    def write(folder: Path) -> dict[str, Any]:
        text = json.dumps(decision, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / RECORD).write_text(text, encoding="utf-8")
        (folder / REPORT).write_text(decision_report(decision), encoding="utf-8")
        return {"figures": {"verdict": decision["verdict"]}}

    return ctx.store.publish(Identity("decision", VERSION, decision, inputs), write)


def _scores(artifact: Artifact) -> dict[str, float]:
    return {task: float(v["ndcg_at_10"]) for task, v in artifact.manifest.stats["scores"].items()}


def _footprints(
    ctx: Context,
    tracking: Tracking,
    registration: Mapping[str, Any],
    champion: ModelVersion | None,
    evaluation: Artifact,
) -> dict[str, Footprint]:
    """Footprints by role, if the policy looks at them. Loads the models, challenger and champion side by side."""
    if not footprint.wanted(ctx.recipe.gate):
        return {}
    from nvr_tasks.models import load_folder, pick_device

    device = pick_device(ctx.recipe.runtime)
    with ctx.store.workdir("footprint") as scratch:
        challenger = ctx.store.open(ctx.store.uri("model", registration["model"]))
        folders = {"challenger": ctx.store.fetch(challenger)}
        if champion is not None:
            folders["champion"] = _champion_folder(ctx, tracking, champion, scratch)
        models = [load_folder(folder, device) for folder in folders.values()]
        benchmark = ctx.store.fetch(ctx.store.input_of(evaluation, "benchmark"))
        return dict(zip(folders, footprint.measure(list(folders.values()), models, benchmark), strict=True))


def _champion_folder(ctx: Context, tracking: Tracking, champion: ModelVersion, scratch: Path) -> Path:
    """The champion's model: its artefact if it was made below this root, else what the registry holds."""
    uri = champion.tags.get(MODEL_TAG, "")
    known = ctx.store.get("model", fingerprint_of(uri)) if uri else None
    if known is not None and known.manifest.stats["digest"] == champion.tags.get(DIGEST_TAG):
        return ctx.store.fetch(known)
    return tracking.download(champion, scratch)


def _log_to_mlflow(pipeline_run: str, tracking: Tracking, decision: dict[str, Any], folder: Path) -> None:
    run = tracking.run(pipeline_run)
    metrics = {
        f"ndcg_at_10/{role}/{task}": value
        for role, tasks in decision["scores"].items()
        for task, value in tasks.items()
    }
    quick = decision["quick"] or {}
    metrics |= {f"quick/{name}": quick[name] for name in ("mean", "gain", "high", "p") if quick.get(name) is not None}
    if decision["comparison"] is not None and not quick.get("stopped"):
        metrics |= {f"gate/{name}": decision["comparison"][name] for name in ("gain", "low", "high", "p", "detectable")}
    tracking.log(run, metrics=metrics)
    with tracking.explained():
        tracking.client.set_tag(run.info.run_id, "nvr.verdict", decision["verdict"])
        for name in (RECORD, REPORT):
            tracking.client.log_artifact(run.info.run_id, str(folder / name), "decision")
