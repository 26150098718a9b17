"""What every stage shares: its context, its result, the cache rule, and how a stage's inputs are found.

A stage module (`nvr_tasks.<stage>`) has a docstring that is its contract and two functions:

- `plan(ctx, inputs) -> dict[role, list[Identity]]`: which artefacts it would make; light, no torch.
- `build(ctx, inputs, plan) -> StageResult`: makes them.

and, where a result depends on the outside world, `refresh(ctx) -> bool`: whether that has changed since the last run.

`execute` calls `build` only when a planned artefact is missing. Stages know artefacts, never each other. Three more
functions are optional: `needs(ctx)` (other inputs than the table's, for some options), `figures(role, artifacts)`
(key figures of reused artefacts, when their manifests' `stats["figures"]` do not say) and `tell(ctx, run, outputs)`
(what a pipeline run's MLflow run is to hold, reused or not).
"""

from __future__ import annotations

import datetime
import importlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, cast

from nvr_tasks.artifacts import Artifact, Identity, Store
from nvr_tasks.config import Recipe
from nvr_tasks.errors import NvrError, RecipeError
from nvr_tasks.stages import ON_DEMAND, OPTIONAL_ROLES, STAGES, Stage, kind_of, maker

log = logging.getLogger(__name__)

Inputs = Mapping[str, list[str]]  # role → artefact URIs
Plan = dict[str, list[Identity]]
Tell = Callable[["Context", str, dict[str, list[str]]], dict[str, Any]]  # for MLflow; gives further figures


@dataclass(frozen=True)
class Context:
    """What a stage works with.

    Attributes:
        recipe: the validated recipe.
        store: where artefacts live.
        pipeline_run: id of the workflow run (Airflow's run_id) that groups records and the MLflow run, as `run_key`
            made it; None when a stage is run by hand.
        options: arguments of single stages (`shard` of embed, `model` of evaluate, …).
    """

    recipe: Recipe
    store: Store
    pipeline_run: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)


def run_key(pipeline_run: str) -> str:
    """A run id as one segment of a storage key."""
    key = re.sub(r"[^\w.:+~-]", "-", pipeline_run)
    return key if key.strip(".") else key.replace(".", "-")  # `..` would be another folder


@dataclass(frozen=True)
class StageResult:
    """What a stage reports: small, JSON, travels by XCom."""

    stage: str
    outputs: dict[str, list[str]]
    figures: dict[str, Any] = field(default_factory=dict)
    reused: bool = False
    skipped: str | None = None  # why there was rightly nothing to do
    seconds: float = 0.0
    started_at: str = ""
    part: str = ""  # e.g. "minilm-0of2" of a mapped stage

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


class StageModule(Protocol):
    """The two functions of a stage module."""

    def plan(self, ctx: Context, inputs: Inputs) -> Plan:
        """Identities of the artefacts the stage would make."""

    def build(self, ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
        """Make the artefacts that are missing."""


def module_of(stage: Stage) -> StageModule:
    """Import a stage's module."""
    return cast(StageModule, importlib.import_module(stage.module))


def shard_index(stage: str, chosen: str, shard: str, total: int) -> int:
    """I of `shard`, which must be I/N with N = `total`. Raises RecipeError; `chosen` is what the user wrote."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or int(match[2]) != total or int(match[1]) >= total:
        raise RecipeError(
            f"--shard {chosen!r} is not allowed: this recipe has {total} shards, 0/{total} to {total - 1}/{total} "
            f"(runtime.{stage}_shards)"
        )
    return int(match[1])


def one(inputs: Inputs, role: str) -> str:
    """The single input of a role."""
    uris = inputs.get(role, [])
    if len(uris) != 1:
        raise NvrError(f"expected one input {role!r}, got {len(uris)}: pass it as --input {role}=URI")
    return uris[0]


def execute(stage: Stage, ctx: Context, given: Inputs | None = None) -> StageResult:
    """Run one stage, or find that all it would make is there already.

    Inputs that are not given are located through the recipe. Records the result under `runs/` when the context
    belongs to a pipeline run.
    """
    started = datetime.datetime.now(datetime.UTC)
    clock = time.perf_counter()
    module = module_of(stage)
    part = part_of(ctx.options)
    record = f"runs/{ctx.pipeline_run}/{stage.name}{f'-{part}' if part else ''}.json"
    if ctx.pipeline_run is not None:
        ctx.store.storage.delete(record)  # of an earlier try: until this one is done, the stage is not
    log.info("%s: start%s", stage.name, f" ({part})" if part else "")
    inputs = complete_inputs(stage, ctx, given or {})
    # Optional: a stage whose result depends on the outside world says whether that has changed since it last ran.
    stale = bool(getattr(module, "refresh", lambda _: False)(ctx))
    plan = module.plan(ctx, inputs)
    found = _find_all(ctx.store, plan) if stage.cached and not stale else None
    if found is not None:
        outputs = {role: [a.uri for a in artifacts] for role, artifacts in found.items()}
        figures: dict[str, Any] = {}
        describe = getattr(module, "figures", _figures)
        for role, artifacts in found.items():
            figures.update(describe(role, artifacts))
        result = StageResult(stage.name, outputs, figures, reused=True)
    else:
        result = module.build(ctx, inputs, plan)
    result = replace(
        result,
        seconds=round(time.perf_counter() - clock, 2),
        started_at=started.isoformat(timespec="seconds"),
        part=part,
    )
    if ctx.pipeline_run is not None:
        # Before the record: killed in between, the stage runs again, finds its artefacts and tells once more.
        tell: Tell = getattr(module, "tell", lambda *_: {})
        result = replace(result, figures=result.figures | tell(ctx, ctx.pipeline_run, result.outputs))
        ctx.store.write_record(record, json.loads(result.to_json()))
    log.info("%s: %s in %.1f s", stage.name, _outcome(result), result.seconds)
    return result


def part_of(options: Mapping[str, str]) -> str:
    """Which part of a mapped stage this is, as a name that files may have: a shard (`0of2`), a task, a cell (`naive-17`)."""
    part = options.get("shard") or options.get("task") or options.get("cell") or options.get("of") or ""
    return part.replace("/", "of").replace(":", "-")


def locate(ctx: Context, role: str, given: Inputs | None = None) -> list[Artifact]:
    """Find the artefacts of a role for this recipe by planning upstream stages from the data set downwards.

    What is made from `given` artefacts is looked for where they are given.

    Raises:
        NvrError: one was never made; the message names the stage to run.
    """
    row = maker(role)
    ctx = replace(ctx, options={})  # they are another stage's: its shard says nothing about this one's
    plan = module_of(row).plan(
        ctx, complete_inputs(row, ctx, {r: uris for r, uris in (given or {}).items() if r in row.needs})
    )
    artifacts = []
    for identity in plan.get(role, []):
        artifact = ctx.store.find(identity)
        if artifact is None:
            raise missing(ctx, role, ctx.store.uri(identity.kind, identity.fingerprint))
        artifacts.append(artifact)
    if not artifacts and role not in OPTIONAL_ROLES:
        raise missing(ctx, role, ctx.store.root)
    return artifacts


def missing(ctx: Context, role: str, where: str) -> NvrError:
    """The error for an input that no stage has made yet."""
    if role == "decision":  # each run of the gate makes another; which one to act on is for people to say
        return NvrError("which decision? Pass the one that `nvr gate` printed: --input decision=URI")
    return NvrError(
        f"no {role} for recipe {ctx.recipe.name} at {where}: run `nvr {maker(role).name}` with the same recipe first"
    )


def complete_inputs(stage: Stage, ctx: Context, given: Inputs) -> dict[str, list[str]]:
    """The inputs of a stage: those given, and the others as located through the recipe. Raises NvrError as of `locate`."""
    unknown = sorted(set(given) - set(stage.needs))
    if unknown:
        raise NvrError(
            f"stage {stage.name} has no input {', '.join(unknown)}; it reads: {', '.join(stage.needs) or 'nothing'}"
        )
    narrowed = getattr(module_of(stage), "needs", lambda _: None)(ctx)
    complete = {}
    for role in stage.needs if narrowed is None else narrowed:
        if role in given:
            found = [ctx.store.open(uri) for uri in given[role]]
            for artifact in found:
                if artifact.manifest.kind != kind_of(role):
                    raise NvrError(
                        f"--input {role}={artifact.uri} is of kind {artifact.manifest.kind}, expected {kind_of(role)}: pass another URI"
                    )
        else:
            found = locate(ctx, role, given)
        for artifact in found:
            ctx.store.check(artifact)  # fail now, with a message, not after an hour of work
        complete[role] = [artifact.uri for artifact in found]
    return complete


def _find_all(store: Store, plan: Plan) -> dict[str, list[Artifact]] | None:
    found: dict[str, list[Artifact]] = {}
    for role, identities in plan.items():
        artifacts = [store.find(identity) for identity in identities]
        if any(a is None for a in artifacts):
            return None
        found[role] = [a for a in artifacts if a is not None]
    for artifact in (a for those in found.values() for a in those):
        store.check(artifact)  # reused, so nobody else may read its files today
    return found if any(found.values()) else None


def _figures(role: str, artifacts: list[Artifact]) -> dict[str, Any]:
    del role
    return {name: value for a in artifacts for name, value in a.manifest.stats.get("figures", {}).items()}


def _outcome(result: StageResult) -> str:
    if result.skipped:
        return f"skipped ({result.skipped})"
    return "reused" if result.reused else "done"


def stage_results(store: Store, pipeline_run: str) -> list[StageResult]:
    """The recorded results of a pipeline run, in the order of the workflow."""
    order = {s.name: i for i, s in enumerate((*STAGES, *ON_DEMAND))}
    results = []
    for key in store.storage.list(f"runs/{pipeline_run}"):
        if not key.endswith(".json"):
            continue
        record = store.read_record(key)
        if isinstance(record, dict) and record.get("stage") in order:
            results.append(StageResult(**record))
    return sorted(results, key=lambda r: (order[r.stage], r.part))
