"""The models that are scored: what names each, what it is called, how it is loaded. Light: no mteb, no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvr_tasks.errors import NvrError, RecipeError
from nvr_tasks.models import (
    build_student,
    load_folder,
    load_teacher,
    locate_model,
    model_identity,
    pick_device,
    student_identity,
)
from nvr_tasks.pipeline import Context, Inputs, one
from nvr_tasks.registry import Registry
from nvr_tasks.settings import HubModel
from nvr_tasks.tracking import DIGEST_TAG, Tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from sentence_transformers import SentenceTransformer

ROLES = ("challenger", "base", "champion", "teacher")
FORMS = "challenger, base, champion, teacher, models:/NAME@ALIAS, models:/NAME/VERSION or OWNER/NAME@COMMIT of the hub"


@dataclass(frozen=True)
class Subject:
    """A model to score.

    Attributes:
        role: of its `evaluation` artefact.
        name: owner/name under which mteb records it.
        revision: of its weights, as mteb records it.
        identity: what its vectors depend on; equal for the same weights, whichever role they have.
        load: makes the model; gets a scratch folder.
    """

    role: str
    name: str
    revision: str
    identity: dict[str, Any]
    load: Callable[[Path], SentenceTransformer]


def chosen(ctx: Context) -> str | None:
    """What `--model` says. Raises RecipeError unless it is a role, a registered version or a pinned hub model."""
    model = ctx.options.get("model")
    if model is None or model in ROLES or _registered(model) or _hub(model):
        return model
    raise RecipeError(f"--model {model!r} is not allowed: one of {FORMS} (40 hexadecimal digits; branches move)")


def needs(ctx: Context) -> tuple[str, ...]:
    """Inputs of scoring: only the challenger has to be trained and registered first.

    A single model is scored on all tasks, whatever the quick tier says of the challenger.
    """
    return {None: ("benchmark", "model", "registration", "screening"), "challenger": ("benchmark", "model")}.get(
        chosen(ctx), ("benchmark",)
    )


def subjects(ctx: Context, inputs: Inputs) -> list[Subject]:
    """The models to score: challenger, base and, if there is one, champion; or the one that `--model` names.

    None at all when that is the champion and there is none.
    """
    model = chosen(ctx)
    if model == "teacher":
        return [_teacher(ctx)]
    if model is not None and model not in ROLES:
        return [_version(ctx, model) if _registered(model) else _hub_model(ctx, model)]
    found = []
    if model in (None, "challenger"):
        found.append(_challenger(ctx, inputs))
    if model in (None, "base"):
        found.append(_base(ctx))
    if model in (None, "champion"):
        champion = _champion(ctx)
        if champion is not None:
            found.append(champion)
    return found


def nobody(ctx: Context) -> str:
    """Why `subjects` is empty: only the champion can be asked for and missing, which is no mistake."""
    return f"model {ctx.recipe.register_.model_name} has no champion yet"


def _challenger(ctx: Context, inputs: Inputs) -> Subject:
    artifact = ctx.store.open(one(inputs, "model"))
    runtime = ctx.recipe.runtime
    digest = artifact.manifest.stats["digest"]

    def load(_: Path) -> SentenceTransformer:
        return load_folder(ctx.store.fetch(artifact), pick_device(runtime))

    return Subject("evaluation", f"nvr/{ctx.recipe.register_.model_name}", digest, {"digest": digest}, load)


def _base(ctx: Context) -> Subject:
    """The student before training: its weights rounded as training keeps them, computed with in float32 as saved models are."""
    student, runtime = ctx.recipe.student, ctx.recipe.runtime
    return Subject(
        "evaluation_base",
        "nvr/untrained-base",
        "untrained",
        base_identity(student_identity(student)),
        lambda _: build_student(student, runtime).float(),
    )


def base_identity(student: Mapping[str, Any]) -> dict[str, Any]:
    """Identity of the untrained base, given the student's as training records it."""
    if "weights_dtype" not in student:
        return {"student": student}
    return {"student": student, "computed_in": "float32"}  # scores that were computed in weights_dtype are others


def _teacher(ctx: Context) -> Subject:
    teacher = ctx.recipe.teacher

    def load(_: Path) -> SentenceTransformer:
        model = load_teacher(teacher, ctx.recipe.runtime)
        model.max_seq_length = teacher.max_tokens.passage
        model.prompts = teacher.prompts.named()
        return model

    weights = model_identity(teacher.model)
    identity = {"model": weights, "prompts": teacher.prompts.model_dump(), "max_tokens": teacher.max_tokens.passage}
    revision = weights.get("revision") or weights.get("digest") or f"tiny-{weights['version']}"
    return Subject("evaluation_teacher", f"nvr/{teacher.name}", revision, {"teacher": identity}, load)


def _champion(ctx: Context) -> Subject | None:
    tracking = Tracking(ctx.recipe.register_.experiment)
    name = ctx.recipe.register_.model_name
    # By the journal: the gate compares with that one, and the alias may lag behind it.
    version = Registry(ctx.store, tracking, name).champion()
    return None if version is None else _of_version(ctx, tracking, "evaluation_champion", version, "the champion")


def _version(ctx: Context, model: str) -> Subject:
    """models:/NAME@ALIAS or models:/NAME/VERSION."""
    from mlflow.exceptions import MlflowException

    match = _registered(model)
    assert match is not None  # noqa: S101  `chosen` looked
    name, alias, number = match["name"], match["alias"], match["version"]
    tracking = Tracking(ctx.recipe.register_.experiment)
    version = None
    if alias is not None:
        version = tracking.alias(name, alias)
    else:
        with tracking.explained():
            try:
                version = tracking.client.get_model_version(name, number)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
    if version is None:
        raise NvrError(f"there is no {model} in the registry: check name and {'alias' if alias else 'version'}")
    return _of_version(ctx, tracking, "evaluation_model", version, model)


def _of_version(ctx: Context, tracking: Tracking, role: str, version: ModelVersion, called: str) -> Subject:
    digest = version.tags.get(DIGEST_TAG)
    if digest is None:
        raise NvrError(
            f"version {version.version} of {version.name}, {called}, has no tag {DIGEST_TAG}: it was not registered by NVR, so its "
            "scores cannot be kept apart from others'; register it with `nvr register`, or move the alias"
        )

    def load(scratch: Path) -> SentenceTransformer:
        return load_folder(tracking.download(version, scratch), pick_device(ctx.recipe.runtime))

    return Subject(role, f"nvr/{version.name}", digest, {"digest": digest}, load)


def _hub_model(ctx: Context, model: str) -> Subject:
    """OWNER/NAME@COMMIT."""
    match = _hub(model)
    assert match is not None  # noqa: S101  `chosen` looked
    ref = HubModel(type="hub", repo=match["repo"], revision=match["revision"])
    return Subject(
        "evaluation_model",
        ref.repo,
        ref.revision,
        {"hub": model_identity(ref)},
        lambda _: load_folder(locate_model(ref), pick_device(ctx.recipe.runtime)),
    )


def _registered(model: str) -> re.Match[str] | None:
    return re.fullmatch(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))", model)


def _hub(model: str) -> re.Match[str] | None:
    return re.fullmatch(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})", model)
