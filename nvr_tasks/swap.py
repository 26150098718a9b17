"""Point serving at the index, unless the champion has moved since the index was built.

Reads   index/<fp> · the champion's version in the MLflow registry
Writes  refs/index/<registered model>/<number>.json: index, model version and digest of its weights, in one record

The record is put in place whole or not at all. An index whose model is no longer champion is not pointed at: that counts
as skipped (exit status 99 with --result-line), and the run for the new champion builds its own.

Example  nvr swap --recipe demo
"""

from __future__ import annotations

from nvr_tasks.errors import NvrError
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one
from nvr_tasks.pointer import Pointer, advance, key
from nvr_tasks.registry import Registry
from nvr_tasks.tracking import CHAMPION, DIGEST_TAG, Tracking


def plan(ctx: Context, inputs: Inputs) -> Plan:  # noqa: ARG001
    """No artefact: a record."""
    return {}


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:  # noqa: ARG001
    """Compare the champion with the index's model, and swap."""
    artifact = ctx.store.open(one(inputs, "index"))
    digest = artifact.manifest.config["model"]["digest"]
    name = ctx.recipe.register_.model_name
    registry = Registry(ctx.store, Tracking(ctx.recipe.register_.experiment), name)
    champion = registry.champion()
    if champion is None:
        raise NvrError(f"model {name} has no champion: there is nothing to serve; promote a version first")
    version = str(champion.version)

    def still_champion() -> bool:
        now = registry.champion()
        return now is not None and str(now.version) == version and now.tags.get(DIGEST_TAG) == digest

    pointer = advance(ctx.store, Pointer(name, version, digest, artifact.uri), still_champion)
    if pointer is None:
        why = f"the index holds vectors of other weights than {name}@{CHAMPION}: run `nvr index` for it"
        return StageResult("swap", {}, {}, skipped=why)
    uri = f"{ctx.store.root}/{key(name, pointer.number)}"
    return StageResult("swap", {"pointer": [uri]}, {"serves": f"{name} version {version}", "since": pointer.since})
