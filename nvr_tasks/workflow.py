"""The whole workflow: opening a pipeline run, the stages in order without Airflow, closing it."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import yaml

from nvr_tasks.artifacts import Store, abandoned, locked
from nvr_tasks.cells import cells_of, distinct, shards_of, shared
from nvr_tasks.config import Recipe
from nvr_tasks.errors import NvrError, RecipeError
from nvr_tasks.pipeline import Context, StageResult, complete_inputs, execute, module_of, stage_results
from nvr_tasks.recipe_files import parse_recipe
from nvr_tasks.stages import OPTIONAL_ROLES, STAGES
from nvr_tasks.stages import stage as stage_of
from nvr_tasks.summary import run_table
from nvr_tasks.tracking import Tracking, tracking_uri, without_credentials
from nvr_tasks.training.division import refuse_impossible
from nvr_tasks.version import code_version

log = logging.getLogger(__name__)

LATEST = "runs/latest.json"
RETRAINING, ABLATION = "manual", "ablation"  # what ids of runs begin with that nobody named
ABLATION_STAGES = ("download", "embed", "search", "cell", "ablation")


def begin(ctx: Context, *, ablation: bool = False, train_gpus: int | None = None) -> StageResult:
    """Open a pipeline run: keep the resolved recipe beside its records and find or create its MLflow run.

    Later stages get the kept recipe, so a recipe file that is edited meanwhile cannot change a run half-way; a run
    that is begun again (its tasks were cleared) goes on with the recipe it began with.

    Args:
        ablation: the run is one of `nvr ablate`.
        train_gpus: GPUs that its training will be given, by another machine than this one; None: nobody knows yet.

    Raises:
        RecipeError: the recipe has no ablation, or wants more GPUs.
    """
    started = datetime.datetime.now(datetime.UTC)
    run_id = ctx.pipeline_run or _new_run_id(RETRAINING)
    recipe = _kept_recipe(ctx.store, run_id) or ctx.recipe
    if ablation:
        cells_of(recipe)  # refused before anything is kept
    if train_gpus is not None:
        try:
            _refuse_untrainable(recipe, ablation=ablation, gpus=train_gpus)
        except NvrError as error:
            raise RecipeError(str(error)) from None
    recipe = _keep_recipe(ctx.store, run_id, ctx.recipe)
    tracking = Tracking(recipe.register_.experiment)
    run = tracking.run(run_id, {"nvr.recipe": recipe.name, "nvr.root": ctx.store.root, "nvr.code": code_version()})
    tracking.log(run, params=_flat(recipe.dump()))
    if run.info.status != "RUNNING":
        tracking.reopen(run)
    figures = {
        "pipeline_run": run_id,
        **_mapped(recipe),
        **({"shards": shards_of(recipe), "cells": distinct(cells_of(recipe))} if ablation else {}),
        "mlflow_run_id": run.info.run_id,
        "mlflow_run_url": tracking.run_url(run),
        "mlflow_tracking_uri": without_credentials(tracking_uri()),
        "recipe": recipe.name,
    }
    uri = f"{ctx.store.root}/{_recipe_key(run_id)}"
    result = StageResult("begin", {"recipe": [uri]}, figures, started_at=started.isoformat(timespec="seconds"))
    ctx.store.write_record(f"runs/{run_id}/begin.json", json.loads(result.to_json()))
    ctx.store.write_record(LATEST, {"pipeline_run": run_id})
    return result


def _mapped(recipe: Recipe) -> dict[str, list[str]]:
    """What tasks are mapped over: `shards` of embed, one per teacher and shard, `blocks` of queries, which mine
    searches by itself unless there are several, and `tasks` of the benchmark."""
    shards, blocks = recipe.runtime.embed_shards, recipe.runtime.mine_shards
    names = [f"{t.name}:" for t in recipe.teachers] if len(recipe.teachers) > 1 else [""]
    return {
        "shards": [f"{name}{i}/{shards}" for name in names for i in range(shards)],
        "blocks": [f"{i}/{blocks}" for i in range(blocks)] if blocks > 1 else [],
        "tasks": [task.task for task in recipe.data.benchmark],
    }


def run(ctx: Context) -> str:
    """All stages in order; returns the summary table.

    Without a run id, a run of the same recipe that was killed on this machine is taken up again, so that it leaves no
    MLflow run behind.
    """
    return _whole(ctx, RETRAINING, _retrain)


def ablate(ctx: Context) -> str:
    """An ablation from data to report; returns the summary table. A killed one is taken up as `run` does.

    Raises:
        RecipeError: the recipe has no ablation.
    """
    return _whole(ctx, ABLATION, _ablate)


def _refuse_untrainable(recipe: Recipe, *, ablation: bool, gpus: int | None = None) -> None:
    """Ask before the first stage what `train` asks, which may be after days of embedding and mining.

    Not of a model that several machines train: by `nvr train` on each of them.
    """
    for one in [cell.recipe for cell in cells_of(recipe)] if ablation else [recipe]:
        if one.runtime.nodes == 1:
            refuse_impossible(one, gpus)


def ablation_plan(ctx: Context) -> str:
    """The cells of an ablation and which of them are there already, as lines. Raises RecipeError if it has none."""
    cells = cells_of(ctx.recipe)
    row = stage_of("cell")
    try:
        wanted = module_of(row).plan(ctx, complete_inputs(row, ctx, {}))["cell"]
        there = [ctx.store.find(identity) is not None for identity in wanted]
    except NvrError:  # nothing was downloaded yet
        there = [False] * len(cells)
    width = max(len(c.name) for c in cells)
    lines = [f"{c.name:<{width}}  {'there' if found else 'to do'}" for c, found in zip(cells, there, strict=True)]
    return "\n".join([*lines, f"{sum(there)} of {len(cells)} cells are there"])


def _whole(ctx: Context, kind: str, body: Callable[[Context], None]) -> str:
    run_id = ctx.pipeline_run or _killed_run(ctx, kind) or _new_run_id(kind)
    expected = ABLATION_STAGES if kind == ABLATION else None
    _refuse_untrainable(_kept_recipe(ctx.store, run_id) or ctx.recipe, ablation=kind == ABLATION)
    ctx = replace(ctx, pipeline_run=run_id, recipe=_keep_recipe(ctx.store, run_id, ctx.recipe))
    with locked(_lock_folder(ctx.store) / f"{run_id}.lock"):  # a killed process leaves it behind, unlocked
        begin(ctx, ablation=kind == ABLATION)
        try:
            body(ctx)
        except BaseException:
            try:
                finish(ctx.store, run_id, expected)
            except Exception as error:  # what stopped the run is the news, not that MLflow could not be told
                log.warning("could not close the run: %s", error)
            raise
        return finish(ctx.store, run_id, expected)


def _retrain(ctx: Context) -> None:
    made: dict[str, list[str]] = {}
    for row in STAGES:
        options = {"decide_only": "1"} if row.name == "gate" else {}
        given = {role: made[role] for role in row.needs if role in made}
        given |= {role: [] for role in row.needs if role in OPTIONAL_ROLES and role not in made}
        result = execute(row, replace(ctx, options=options), given)
        made.update(result.outputs)


def _ablate(ctx: Context) -> None:
    """What the DAG nv_retriever_ablation does, one task after the other."""
    made = execute(stage_of("download"), ctx).outputs
    data = {"dataset": made["dataset"]}
    execute(stage_of("embed"), replace(ctx, recipe=shared(ctx.recipe)), data)
    execute(stage_of("search"), ctx, data)
    cells: list[str] = []
    for cell in cells_of(ctx.recipe):
        given = {**data, "benchmark": made["benchmark"]}
        cells += execute(stage_of("cell"), replace(ctx, options={"cell": cell.name}), given).outputs["cell"]
    execute(stage_of("ablation"), ctx, {"cell": list(dict.fromkeys(cells))})


def _new_run_id(kind: str) -> str:
    return f"{kind}__{datetime.datetime.now(datetime.UTC).isoformat(timespec='milliseconds')}"


def _lock_folder(store: Store) -> Path:
    return store.scratch / "runs"


def _killed_run(ctx: Context, kind: str) -> str | None:
    """The newest run of this kind that was begun here with this very recipe and did not live to finish."""
    for path in sorted(_lock_folder(ctx.store).glob(f"{kind}__*.lock"), reverse=True):
        kept = ctx.store.storage.get_bytes(_recipe_key(path.stem))  # another root's runs may share the scratch folder
        if kept == _recipe_bytes(ctx.recipe) and abandoned(path):
            log.info("taking up run %s, which was killed", path.stem)
            return path.stem
    return None


def _recipe_key(run_id: str) -> str:
    return f"runs/{run_id}/recipe.yaml"


def _recipe_bytes(recipe: Recipe) -> bytes:
    return yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True).encode()


def _keep_recipe(store: Store, run_id: str, given: Recipe) -> Recipe:
    """The recipe that a run began with; the given one if it begins now."""
    kept = _kept_recipe(store, run_id)
    if kept is None:
        store.storage.put_bytes(_recipe_key(run_id), _recipe_bytes(given))
        return given
    if _recipe_bytes(kept) != _recipe_bytes(given):
        log.warning("run %s goes on with the recipe it began with, which differs from the one given now", run_id)
    return kept


def _kept_recipe(store: Store, run_id: str) -> Recipe | None:
    key = _recipe_key(run_id)
    kept = store.storage.get_bytes(key)
    return None if kept is None else parse_recipe(kept.decode(), f"{store.root}/{key}")


def finish(store: Store, pipeline_run: str, expected: Collection[str] | None = None) -> str:
    """Close a pipeline run in MLflow; returns the summary.

    It is FINISHED when all `expected` stages (those of retraining by default) reported, else FAILED.
    """
    opened = store.read_record(f"runs/{pipeline_run}/begin.json")
    results = stage_results(store, pipeline_run)
    complete = {r.stage for r in results} == set(expected or (s.name for s in STAGES))
    if opened is not None:
        recipe = parse_recipe((store.storage.get_bytes(_recipe_key(pipeline_run)) or b"").decode(), pipeline_run)
        tracking = Tracking(recipe.register_.experiment)
        with tracking.explained():
            run_id = opened["figures"]["mlflow_run_id"]
            artifacts = {
                f"{r.stage}{f'-{r.part}' if r.part else ''}": {"outputs": r.outputs, "reused": r.reused}
                for r in results
            }
            tracking.client.log_dict(run_id, artifacts, "artifacts.json")
            tracking.client.set_terminated(run_id, "FINISHED" if complete else "FAILED")
    return run_table(store, pipeline_run)


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings as dotted keys; lists stay whole."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v
        for name, child in tree.items()
        for k, v in _flat(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }
