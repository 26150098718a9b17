"""Compare the variants of an ablation: scores with intervals over queries and seeds, speed of training, and a report.

Reads   cell/<fp> of every variant and seed · audit/<fp>, if `nvr audit` was run
Writes  ablation/<fp>  ablation.json: per variant the scores on each task, means and differences from the baseline with
                       intervals (queries and seeds resampled together; Holm over variants), dev curves, steps and seconds
                       until a share of the best final dev score, what was mined
                       report.html: the same for people, in the manner of the paper's Tables 1 to 4

`nvr ablate` runs everything that this needs.

Example  nvr ablation --recipe beir-small-ablation
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvr_tasks.artifacts import Artifact, Identity
from nvr_tasks.cell import CELL_FILE, PER_QUERY_FILE
from nvr_tasks.cell import identity as cell_identity
from nvr_tasks.cells import Cell, ablation_of, cells_of
from nvr_tasks.errors import NvrError
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one

if TYPE_CHECKING:
    import numpy.typing as npt

    from nvr_tasks.evaluation.variants import Row

VERSION = 2
RESULT_FILE, REPORT_FILE = "ablation.json", "report.html"
METRIC = "ndcg_at_10"

log = logging.getLogger(__name__)


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """One `ablation` artefact, if every cell is given."""
    ablation = ablation_of(ctx.recipe)
    cells = _cells(ctx, inputs)
    config = {
        "cells": [[cell.variant, cell.seed] for cell, _ in cells],
        "changes": {row.name: dict(row.changes) for row in ablation.rows},
        "baseline": ablation.compared_with,
        **ablation.model_dump(include={"reach", "alpha", "resamples", "resample_seed"}),
    }
    audit = _audit(ctx, cells)
    roles = {f"cell_{number}": artifact.uri for number, (_, artifact) in enumerate(cells)}
    return {
        "ablation": [Identity("ablation", VERSION, config, roles | ({} if audit is None else {"audit": audit.uri}))]
    }


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
    """Compare and write."""
    [identity] = plan["ablation"]
    cells = _cells(ctx, inputs)
    artifact = ctx.store.publish(identity, lambda folder: _write(ctx, cells, folder))
    return StageResult("ablation", {"ablation": [artifact.uri]}, artifact.manifest.stats["figures"])


def tell(ctx: Context, run: str, outputs: Inputs) -> dict[str, str]:
    """Table and report into the ablation's MLflow run."""
    from nvr_tasks.tracking import Tracking

    artifact = ctx.store.open(one(outputs, "ablation"))
    folder = ctx.store.fetch(artifact, only=(RESULT_FILE, REPORT_FILE))
    tracking = Tracking(ctx.recipe.register_.experiment)
    found = tracking.run(run)
    table = ctx.store.read_json(artifact, RESULT_FILE)
    tracking.log(found, metrics={f"{row['name']}/{METRIC}": row["mean"]["mean"] for row in table["variants"]})
    with tracking.explained():
        for name in (RESULT_FILE, REPORT_FILE):
            tracking.client.log_artifact(found.info.run_id, str(folder / name), "ablation")
    return {"report_url": tracking.artifact_url(found, f"ablation/{REPORT_FILE}")}


# ── cells ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _cells(ctx: Context, inputs: Inputs) -> list[tuple[Cell, Artifact]]:
    """Every cell with its artefact. Raises NvrError if one is missing, or they were not made from the same data."""
    given = {artifact.manifest.fingerprint: artifact for artifact in map(ctx.store.open, inputs.get("cell", []))}
    if not given:
        raise NvrError("an ablation needs its cells: run `nvr ablate`, or `nvr cell`, with the same recipe first")
    first = next(iter(given.values()))
    benchmark, dataset = first.manifest.inputs["benchmark"], _dataset(ctx, first)
    found = []
    for cell in cells_of(ctx.recipe):
        wanted = cell_identity(ctx, cell, dataset, benchmark).fingerprint
        if wanted not in given:
            raise NvrError(
                f"cell {cell.name} is not among those given (or was made from other data): run `nvr cell --cell {cell.name}` with "
                "the same recipe"
            )
        found.append((cell, given[wanted]))
    return found


def _dataset(ctx: Context, cell: Artifact) -> str:
    return ctx.store.open(cell.manifest.inputs["model"]).manifest.inputs["dataset"]


def _audit(ctx: Context, cells: list[tuple[Cell, Artifact]]) -> Artifact | None:
    """The audit of the recipe on the same data, if there is one."""
    from nvr_tasks import audit
    from nvr_tasks.judge import Endpoint

    dataset = _dataset(ctx, cells[0][1])
    for endpoint in (Endpoint.from_environment(), None):
        found = ctx.store.find(audit.identity(ctx, dataset, endpoint))
        if found is not None:
            return found
    return None


# ── the work ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _write(ctx: Context, cells: list[tuple[Cell, Artifact]], folder: Path) -> dict[str, Any]:
    from nvr_tasks.ablation_report import ablation_report
    from nvr_tasks.evaluation.comparison import task_weights
    from nvr_tasks.evaluation.scores import aggregates
    from nvr_tasks.evaluation.variants import compared, speed

    ablation = ablation_of(ctx.recipe)
    benchmark = ctx.store.open(cells[0][1].manifest.inputs["benchmark"])
    told = {cell.name: ctx.store.read_json(artifact, CELL_FILE) for cell, artifact in cells}
    rows, queries = _rows(ctx, cells, told)
    weights = task_weights(queries, aggregates(benchmark))
    draws = {"draws": ablation.resamples, "seed": ablation.resample_seed}
    variants = compared(rows, ablation.compared_with, weights, alpha=ablation.alpha, **draws)
    relevant = _relevant(ctx, cells)
    for row in variants:
        own = [cell for cell, _ in cells if cell.variant == row["name"]]
        row["changes"] = next(dict(v.changes) for v in ablation.rows if v.name == row["name"])
        row["mining"] = _mean([told[c.name]["mining"] for c in own])
        row["relevant"] = relevant.get(row["name"])
        row["steps"] = told[own[0].name]["training"]["figures"]["steps"]
    record = {
        "recipe": ctx.recipe.name,
        "metric": METRIC,
        "baseline": ablation.compared_with,
        "seeds": list(ablation.seeds),
        "alpha": ablation.alpha,
        "resamples": ablation.resamples,
        "queries": queries,
        "weights": weights,
        "variants": variants,
        "reach": ablation.reach,
        "speed": speed(rows if _one_dev_set(cells) else [], ablation.reach),
        "shared": {"dataset": _dataset(ctx, cells[0][1]), "benchmark": benchmark.uri},
        "models": {cell.name: told[cell.name]["model"] for cell, _ in cells},
    }
    (folder / RESULT_FILE).write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / REPORT_FILE).write_text(ablation_report(record), encoding="utf-8")
    best = max(variants, key=lambda row: row["mean"]["mean"])
    figures = {
        "variants": len(variants),
        "seeds": len(ablation.seeds),
        "best": best["name"],
        "mean": round(best["mean"]["mean"], 4),
        f"{ablation.compared_with}_mean": round(
            next(r for r in variants if r["name"] == ablation.compared_with)["mean"]["mean"], 4
        ),
    }
    return {"figures": figures}


def _rows(
    ctx: Context, cells: list[tuple[Cell, Artifact]], told: Mapping[str, Any]
) -> tuple[list[Row], dict[str, int]]:
    """What was measured of each variant, and how many queries each task has."""
    import numpy as np

    from nvr_tasks.evaluation.variants import Row

    queries: dict[str, list[str]] = {}
    values: dict[str, dict[str, list[npt.NDArray[np.float64]]]] = {}
    for cell, artifact in cells:
        for task, of_task in _per_query(ctx, artifact).items():
            ids = queries.setdefault(task, list(of_task))
            if ids != list(of_task):
                raise NvrError(
                    f"cell {cell.name} was scored on other queries of {task} than the others: report this as a bug"
                )
            values.setdefault(cell.variant, {}).setdefault(task, []).append(np.array(list(of_task.values())))
    rows = []
    for variant, by_task in values.items():
        of_variant = [cell for cell, _ in cells if cell.variant == variant]
        own = [told[cell.name] for cell in of_variant]
        rows.append(
            Row(
                variant,
                {task: np.stack(arrays) for task, arrays in by_task.items()},
                [[(int(step), float(value)) for step, value in t["curve"]] for t in own],
                [_pace(cell, t) for cell, t in zip(of_variant, own, strict=True)],
                of_variant[0].recipe.train.model_dump_json(),
                [t["training"]["machine"] for t in own if "machine" in t["training"]],
            )
        )
    return rows, {task: len(ids) for task, ids in queries.items()}


def _pace(cell: Cell, told: Mapping[str, Any]) -> float:
    """Seconds per step; 0 where stages of different batches have none in common."""
    alone = len(cell.recipe.train.schedule) == 1
    return float(told["training"].get("seconds_per_step") or 0) if alone else 0.0


def _one_dev_set(cells: list[tuple[Cell, Artifact]]) -> bool:
    """Whether all variants have the same dev queries, which are those of the sources that they train on."""
    from nvr_tasks.training_settings import sources_of

    return len({sources_of(cell.recipe.train.schedule) for cell, _ in cells}) == 1


def _per_query(ctx: Context, artifact: Artifact) -> dict[str, dict[str, float]]:
    """Task → query → nDCG@10, by query id."""
    import pandas as pd

    from nvr_tasks.artifacts import reading

    path = ctx.store.fetch(artifact, only=(PER_QUERY_FILE,)) / PER_QUERY_FILE
    with reading(path):
        frame = pd.read_parquet(path)
    frame = frame[frame["metric"] == METRIC].sort_values("query_id")
    return {
        str(task): dict(zip(part["query_id"].astype(str), part["value"].astype(float), strict=True))
        for task, part in frame.groupby("task", sort=True)
    }


def _mean(told: list[dict[str, float] | None]) -> dict[str, float] | None:
    """What cells tell of the negatives that they trained on, mean over seeds; None for a variant that has none."""
    found = [figures for figures in told if figures is not None]
    names = [name for name in (found[0] if found else {}) if all(name in figures for figures in found)]
    return {name: sum(figures[name] for figures in found) / len(found) for name in names} if found else None


def _relevant(ctx: Context, cells: list[tuple[Cell, Artifact]]) -> dict[str, list[dict[str, Any]]]:
    """Of variants whose method was audited: what share of its negatives is really relevant, by each kind of evidence."""
    from nvr_tasks import audit
    from nvr_tasks.audit_report import MAIN
    from nvr_tasks.mined.selecting import spec_of
    from nvr_tasks.mining.audit import ALL, ARMS, own_method, paper_specs

    artifact = _audit(ctx, cells)
    if artifact is None:
        return {}
    estimates = audit.read_estimates(ctx.store.fetch(artifact, only=(audit.RESULT_FILE,)) / audit.RESULT_FILE)
    teacher = ctx.recipe.teacher.name
    audited = spec_of(ctx.recipe.mine, teacher)
    specs = paper_specs(audited)
    found = {}
    for cell, _ in cells:
        if [t.name for t in cell.recipe.mining_teachers] != [teacher] or cell.variant in found:
            continue
        spec = spec_of(cell.recipe.mine, teacher)
        if (spec.num_negatives, spec.positive_policy) != (audited.num_negatives, audited.positive_policy):
            continue  # the share among one negative per query says nothing of that among four
        try:
            method = own_method(specs, spec)
        except StopIteration:
            continue
        found[cell.variant] = [
            {"experiment": e.experiment, **asdict(e.share), "value": e.share.value}
            for e in estimates
            if e.method == method
            and e.measure == MAIN
            and (e.part, e.guards) == (ALL, ARMS[-1].name)
            and e.share.trials
        ]
    return found
