"""Score the challenger, its untrained base and the current champion with mteb on the mirrored benchmark.

Reads   benchmark/<fp> · model/<fp> · registration/<fp> · the champion's version in the MLflow registry
Writes  evaluation/<fp> per model: <task>.json (mteb's result), per_query.parquet (task, query_id, metric, value)

A model that was scored on this very benchmark before is not scored again, whichever role it had. With --model, one
model only; `--model teacher` checks the benchmark itself against published scores.

Example  nvr evaluate --recipe beir-small --model teacher
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvr_tasks.artifacts import Artifact, Identity
from nvr_tasks.errors import NvrError
from nvr_tasks.models import build_student, load_folder, load_teacher, model_identity, pick_device, student_identity
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one
from nvr_tasks.tracking import CHAMPION, DIGEST_TAG, Tracking

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

VERSION = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model to score: what names it, how it is called, how it is loaded."""

    role: str
    name: str
    identity: dict[str, Any]
    load: Callable[[Path], SentenceTransformer]  # gets a scratch folder


def needs(ctx: Context) -> tuple[str, ...] | None:
    """Inputs of `--model` runs: base, champion and teacher can be scored before anything is trained."""
    return {None: None, "challenger": ("benchmark", "model")}.get(ctx.options.get("model"), ("benchmark",))


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """One `evaluation` artefact per model."""
    return {subject.role: [_identity(ctx, inputs, subject)] for subject in subjects(ctx, inputs)}


def _identity(ctx: Context, inputs: Inputs, subject: Subject) -> Identity:
    config = {"model": subject.identity, **ctx.recipe.evaluate.model_dump(mode="json"), "mteb": version("mteb")}
    return Identity("evaluation", VERSION, config, {"benchmark": one(inputs, "benchmark")})


def subjects(ctx: Context, inputs: Inputs) -> list[Subject]:
    """The models to score; the champion only if there is one. One that is the challenger shares its evaluation."""
    chosen = ctx.options.get("model")
    found = []
    if chosen in (None, "challenger"):
        found.append(_challenger(ctx, inputs))
    if chosen in (None, "base"):
        found.append(_base(ctx))
    if chosen in (None, "champion"):
        champion = _champion(ctx)
        if champion is not None:
            found.append(champion)
        elif chosen == "champion":
            raise NvrError(f"model {ctx.recipe.register_.model_name} has no champion yet: promote a version first")
    if chosen == "teacher":
        found.append(_teacher(ctx))
    return found


def _challenger(ctx: Context, inputs: Inputs) -> Subject:
    artifact = ctx.store.open(one(inputs, "model"))
    runtime = ctx.recipe.runtime

    def load(_: Path) -> SentenceTransformer:
        return load_folder(ctx.store.fetch(artifact), pick_device(runtime))

    return Subject("evaluation", ctx.recipe.register_.model_name, {"digest": artifact.manifest.stats["digest"]}, load)


def _base(ctx: Context) -> Subject:
    student = ctx.recipe.train.student
    return Subject(
        "evaluation_base",
        "untrained-base",
        {"student": student_identity(student)},
        lambda _: build_student(student, ctx.recipe.runtime),
    )


def _teacher(ctx: Context) -> Subject:
    teacher = ctx.recipe.teacher

    def load(_: Path) -> SentenceTransformer:
        model = load_teacher(teacher, ctx.recipe.runtime)
        model.max_seq_length = teacher.max_tokens.passage
        model.prompts = {"query": teacher.prompts.query, "document": teacher.prompts.passage}
        return model

    identity = {
        "model": model_identity(teacher.model),
        "prompts": teacher.prompts.model_dump(),
        "max_tokens": teacher.max_tokens.passage,
    }
    return Subject("evaluation_teacher", teacher.name, {"teacher": identity}, load)


def _champion(ctx: Context) -> Subject | None:
    tracking = Tracking(ctx.recipe.register_.experiment)
    name = ctx.recipe.register_.model_name
    version_ = tracking.alias(name, CHAMPION)
    if version_ is None:
        return None
    digest = version_.tags.get(DIGEST_TAG)
    if digest is None:
        raise NvrError(
            f"version {version_.version} of {name}, the champion, has no tag {DIGEST_TAG}: it was not registered by NVR, so its "
            "scores cannot be kept apart from others'; register it with `nvr register`, or move the alias"
        )

    def load(scratch: Path) -> SentenceTransformer:
        return load_folder(tracking.download(version_, scratch), pick_device(ctx.recipe.runtime))

    return Subject("evaluation_champion", name, {"digest": digest}, load)


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
    """Score the models that have no evaluation on this benchmark yet."""
    outputs: dict[str, list[str]] = {}
    figures_: dict[str, Any] = {}
    for subject in subjects(ctx, inputs):
        identity = plan[subject.role][0] if subject.role in plan else _identity(ctx, inputs, subject)
        artifact = ctx.store.find(identity)
        if artifact is None:
            artifact = _score(ctx, subject, identity)
        else:
            log.info("%s: scored before, reused", subject.role)
        outputs[subject.role] = [artifact.uri]
        figures_.update(figures(subject.role, [artifact]))
    return StageResult("evaluate", outputs, figures_)


def figures(role: str, artifacts: list[Artifact]) -> dict[str, Any]:
    """Mean nDCG@10 (and each task's, for the model in question) under names that tell the roles apart."""
    [artifact] = artifacts
    scores = artifact.manifest.stats["scores"]
    mean = sum(v["ndcg_at_10"] for v in scores.values()) / len(scores)
    if role in ("evaluation", "evaluation_teacher"):
        return {**{task: round(v["ndcg_at_10"], 4) for task, v in scores.items()}, "mean": round(mean, 4)}
    return {f"{role.removeprefix('evaluation_')}_mean": round(mean, 4)}


def _score(ctx: Context, subject: Subject, identity: Identity) -> Artifact:
    from nvr_tasks.evaluation.run import score

    benchmark = ctx.store.fetch(ctx.store.open(identity.inputs["benchmark"]))
    log.info("scoring %s", subject.role)
    with ctx.store.workdir("score") as scratch:
        model = subject.load(scratch)

        def write(folder: Path) -> dict[str, Any]:
            scores = score(
                model,
                subject.name,
                identity.fingerprint,
                benchmark,
                folder,
                dtype=ctx.recipe.evaluate.dtype,
                batch_size=ctx.recipe.runtime.eval_batch_size,
            )
            broken = [
                f"{task} {metric}" for task, v in scores.items() for metric, x in v.items() if not math.isfinite(x)
            ]
            if broken:
                raise NvrError(f"{subject.role} has no finite score on {', '.join(broken)}: its vectors are broken")
            return {"scores": scores}

        return ctx.store.publish(identity, write)
