"""Register the trained model in MLflow, with its lineage, under the alias `challenger`.

Reads   model/<fp>
Writes  an MLflow model version (flavours sentence_transformers and pyfunc with the param `kind`) · registration/<fp>: registration.json

The same model is registered once: a version with these weights is found by its digest and reused. A retry after a
crash makes no second version.

Example  nvr register --recipe demo
"""

from __future__ import annotations

import json
import logging
import platform
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvr_tasks.artifacts import Artifact, Identity, fingerprint_of
from nvr_tasks.models import has_own_modules, load_folder
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one
from nvr_tasks.serving import flavour
from nvr_tasks.tracking import CHALLENGER, CHAMPION, DIGEST_TAG, MODEL_TAG, Tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

VERSION = 1
RECORD = "registration.json"
REQUIREMENTS = ("mlflow", "sentence-transformers", "torch", "transformers")  # mlflow whole: `mlflow models serve`

log = logging.getLogger(__name__)


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """One `registration` artefact."""
    config = {"model_name": ctx.recipe.register_.model_name}
    return {"registration": [Identity("registration", VERSION, config, {"model": one(inputs, "model")})]}


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
    """Find or make the version, point `challenger` at it, record it."""
    [identity] = plan["registration"]
    name = ctx.recipe.register_.model_name
    model = ctx.store.open(one(inputs, "model"))
    digest = model.manifest.stats["digest"]
    tracking = Tracking(ctx.recipe.register_.experiment)
    version = tracking.version_with_digest(name, digest)
    reused = version is not None
    if version is None:
        version = _register(ctx, tracking, name, digest, model)
        log.info("registered %s version %s", name, version.version)
    else:
        log.info("%s version %s is this model already; nothing new is registered", name, version.version)
    champion = tracking.alias(name, CHAMPION)
    if champion is None or champion.version != version.version:
        tracking.point(name, CHALLENGER, version.version)

    record = {
        "name": name,
        "version": str(version.version),
        "run_id": version.run_id,
        "model": fingerprint_of(model.uri),
        "digest": digest,
    }
    artifact = ctx.store.find(identity)
    if artifact is not None and ctx.store.read_json(artifact, RECORD) != record:
        ctx.store.delete(artifact)  # it speaks of another registry; this one is in force now
        artifact = None
    if artifact is None:
        artifact = ctx.store.publish(identity, lambda folder: _write(folder, record))
    figures = {"model": name, "version": str(version.version), "new": not reused}
    return StageResult("register", {"registration": [artifact.uri]}, figures, reused=reused)


def _write(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True), encoding="utf-8")
    return {"figures": {"model": record["name"], "version": record["version"]}}


def _register(ctx: Context, tracking: Tracking, name: str, digest: str, artifact: Artifact) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    run = tracking.run(ctx.pipeline_run or f"by-hand-{fingerprint_of(artifact.uri)}", {"nvr.recipe": ctx.recipe.name})
    lineage = _lineage(ctx, artifact)
    source = _logged_model(tracking, run.info.experiment_id, digest) or _log_model(
        ctx, run.info.run_id, digest, artifact, lineage
    )
    with tracking.explained():
        try:
            tracking.client.create_registered_model(
                name, description="Retriever trained by NVR; load models:/<name>@champion."
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # Tags come with the version in one call: a crash right after it leaves a version that a retry recognises.
        version = tracking.client.create_model_version(
            name,
            source=f"models:/{source}",
            run_id=run.info.run_id,
            model_id=source,
            tags={DIGEST_TAG: digest, MODEL_TAG: artifact.uri, **{f"nvr.{k}": v for k, v in lineage.items()}},
            description=f"recipe {ctx.recipe.name}, model {fingerprint_of(artifact.uri)[:12]}",
        )
    first = tracking.version_with_digest(name, digest)
    if first is not None and str(first.version) != str(version.version):  # another process registered it meanwhile
        with tracking.explained():
            tracking.client.delete_model_version(name, version.version)
        return first
    return version


def _logged_model(tracking: Tracking, experiment_id: str, digest: str) -> str | None:
    """Id of a model that an earlier try logged whole, but did not come to register."""
    with tracking.explained():
        found = tracking.client.search_logged_models([experiment_id], filter_string=f"tags.`{DIGEST_TAG}` = '{digest}'")
    ready = [m for m in found if str(m.status) == "READY"]
    return str(ready[0].model_id) if ready else None


def _log_model(ctx: Context, run_id: str, digest: str, artifact: Artifact, lineage: dict[str, str]) -> str:
    import mlflow
    from sentence_transformers import SentenceTransformer

    folder = ctx.store.fetch(artifact)
    model = load_folder(folder, "cpu")
    dense = isinstance(model, SentenceTransformer)  # a vector per token fits no signature and no pyfunc
    kind = flavour if dense else mlflow.sentence_transformers
    dim = len(model.encode(flavour.EXAMPLE[0]))
    info = None
    with mlflow.start_run(run_id=run_id, log_system_metrics=False):
        info = mlflow.models.Model.log(
            artifact_path=None,
            name="retriever",
            flavor=kind,
            model=model,
            signature=flavour.signature(dim) if dense else False,
            input_example=flavour.EXAMPLE if dense and not has_own_modules(folder) else None,  # MLflow tries it
            pip_requirements=[f"{package}=={installed(package).split('+')[0]}" for package in REQUIREMENTS],
            tags={DIGEST_TAG: digest, **{f"nvr.{k}": v for k, v in lineage.items()}},
            metadata={"nvr": lineage},
            extra_files=[str(folder / "README.md")],
        )
    return str(info.model_id)


def _lineage(ctx: Context, artifact: Artifact) -> dict[str, str]:
    """What the model was made from, as short strings, read from the artefacts themselves and not from today's recipe."""
    inputs = artifact.manifest.inputs
    negatives = ctx.store.input_of(artifact, "negatives")
    scored = [
        ctx.store.input_of(negatives, role).manifest.config
        for role in sorted(negatives.manifest.inputs, key=lambda r: (len(r), r))
        if role.startswith("candidates")
    ]
    rerankers = ("cross_encoder", "late_interaction")
    teachers = [config.get("teacher") or {k: v for k, v in config.items() if k in rerankers} for config in scored]
    searched = {k: v for config in reversed(scored) for k, v in config.items() if k not in ("teacher", *rerankers)}
    return {
        "recipe": ctx.recipe.name,
        "dataset": fingerprint_of(inputs["dataset"]),
        "negatives": fingerprint_of(inputs["negatives"]),
        "model_artifact": fingerprint_of(artifact.uri),
        "teacher": json.dumps(teachers[0] if len(teachers) == 1 else teachers, sort_keys=True),
        "mining": json.dumps({**searched, **negatives.manifest.config}, sort_keys=True),
        "training": json.dumps(artifact.manifest.config, sort_keys=True),
        "code_version": artifact.manifest.code_version,
        "python": platform.python_version(),
    }
