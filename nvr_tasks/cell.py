"""Mine, train and score one cell of an ablation: a variant of the recipe with a seed.

Reads   dataset/<fp> · benchmark/<fp> · candidates/<fp> and embeddings/<fp> of the variant's teachers, made once for all
Writes  negatives/<fp>, model/<fp>, scores/<fp> as `nvr mine`, `nvr train` and `nvr score` write them, and
        cell/<fp>  cell.json: scores, dev nDCG@10 over steps, seconds per step, what was mined
                   per_query.parquet (task, query_id, metric, value)

Cells know nothing of each other. Nothing is registered and no alias moves. A killed cell goes on from its last
checkpoint, and with the tasks that it has not scored. Variants that come to the same settings share a cell.

Example  nvr cell --recipe beir-small-ablation --cell perc_pos-95:18      (all of them without --cell)
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nvr_tasks.artifacts import Artifact, Identity
from nvr_tasks.cells import Cell, candidates_plan, chosen, inside
from nvr_tasks.errors import NvrError
from nvr_tasks.evaluation.scores import VERSION as SCORES_VERSION
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, execute, locate, module_of, one
from nvr_tasks.stages import stage

VERSION = 2
CELL_FILE, PER_QUERY_FILE = "cell.json", "per_query.parquet"

log = logging.getLogger(__name__)


def needs(ctx: Context) -> tuple[str, ...]:  # noqa: ARG001
    """Candidates are found by the variant's teachers, whichever were searched."""
    return ("dataset", "benchmark")


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """One `cell` artefact for each chosen cell."""
    return {"cell": [identity(ctx, cell, one(inputs, "dataset"), one(inputs, "benchmark")) for cell in chosen(ctx)]}


def identity(ctx: Context, cell: Cell, dataset: str, benchmark: str) -> Identity:
    """What names a cell: the model that it trains and the benchmark that scores it, not what the variant is called."""
    within, uri = inside(ctx, cell.recipe), ctx.store.uri
    [negatives] = module_of(stage("mine")).plan(within, {"dataset": [dataset]})["negatives"]
    trained_on = {"dataset": [dataset], "negatives": [uri(negatives.kind, negatives.fingerprint)]}
    [model] = module_of(stage("train")).plan(within, trained_on)["model"]
    settings = cell.recipe.evaluate.model_dump(mode="json")
    config = {"evaluate": settings, "mteb": version("mteb"), "scores": SCORES_VERSION}
    return Identity("cell", VERSION, config, {"model": uri(model.kind, model.fingerprint), "benchmark": benchmark})


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
    """Work through the chosen cells that are not there yet."""
    dataset, benchmark = one(inputs, "dataset"), one(inputs, "benchmark")
    cells = chosen(ctx)
    for cell in cells:
        _refuse_unshared(ctx, cell, dataset)
    artifacts = []
    for number, (cell, wanted) in enumerate(zip(cells, plan["cell"], strict=True), 1):
        log.info("cell %s%s", cell.name, f" ({number} of {len(cells)})" if len(cells) > 1 else "")
        artifacts.append(ctx.store.find(wanted) or _make(ctx, cell, wanted, dataset, benchmark))
    return StageResult("cell", {"cell": [a.uri for a in artifacts]}, figures("cell", artifacts))


def figures(role: str, artifacts: list[Artifact]) -> dict[str, Any]:
    """The figures of one cell; of several, how many."""
    del role
    return dict(artifacts[0].manifest.stats["figures"]) if len(artifacts) == 1 else {"cells": len(artifacts)}


def tell(ctx: Context, run: str, outputs: Inputs) -> dict[str, Any]:
    """Scores and dev curve into the ablation's MLflow run, under the cell's name."""
    from nvr_tasks.tracking import Tracking

    tracking = Tracking(ctx.recipe.register_.experiment)
    found = tracking.run(run)
    for cell, uri in zip(chosen(ctx), outputs["cell"], strict=True):
        told = ctx.store.read_json(ctx.store.open(uri), CELL_FILE)
        label = f"{cell.variant}/seed {cell.seed}"
        tracking.log(found, metrics={f"{label}/ndcg_at_10/{t}": v["ndcg_at_10"] for t, v in told["scores"].items()})
        for step, value in told["curve"]:
            tracking.log(found, metrics={f"{label}/dev_ndcg_at_10": value}, step=step)
    return {}


def _refuse_unshared(ctx: Context, cell: Cell, dataset: str) -> None:
    """A cell that made candidates of its own would cost a search, or two at once; all select from the same."""
    for wanted in candidates_plan(ctx, cell.recipe, dataset)["candidates"]:
        if ctx.store.find(wanted) is None:
            raise NvrError(
                f"cell {cell.name} has no candidates at {ctx.store.uri(wanted.kind, wanted.fingerprint)}: run `nvr search` with "
                "the same recipe first, or `nvr ablate`, which does"
            )


def _make(ctx: Context, cell: Cell, wanted: Identity, dataset: str, benchmark: str) -> Artifact:
    within = inside(ctx, cell.recipe)
    embeddings = [a.uri for a in locate(within, "embeddings", {"dataset": [dataset]})]
    mined = execute(stage("mine"), within, {"dataset": [dataset], "embeddings": embeddings})
    negatives = one(mined.outputs, "negatives")
    trained = execute(stage("train"), within, {"dataset": [dataset], "negatives": [negatives]})
    model = one(trained.outputs, "model")
    scoring = replace(within, options={"model": "challenger"})
    scored = execute(stage("score"), scoring, {"benchmark": [benchmark], "model": [model]})
    if model != wanted.inputs["model"]:
        raise NvrError(
            f"cell {cell.name} made {model} where {wanted.inputs['model']} was planned; report this as a bug"
        )

    def write(folder: Path) -> dict[str, Any]:
        mining = _trained_on(ctx, cell, dataset, negatives)
        return _write(ctx, model, negatives, scored.outputs["scores"], mining, folder)

    return ctx.store.publish(wanted, write)


def _write(
    ctx: Context, model: str, negatives: str, scores: list[str], mining: dict[str, float] | None, folder: Path
) -> dict[str, Any]:
    import pandas as pd

    from nvr_tasks.artifacts import reading

    trained = ctx.store.open(model).manifest.stats
    tables, values = [], {}
    for artifact in map(ctx.store.open, scores):
        task = artifact.manifest.config["task"]["name"]
        values[task] = artifact.manifest.stats["scores"]
        path = ctx.store.fetch(artifact, only=(PER_QUERY_FILE,)) / PER_QUERY_FILE
        with reading(path):
            tables.append(pd.read_parquet(path))
    pd.concat(tables, ignore_index=True).to_parquet(folder / PER_QUERY_FILE, index=False)
    curve = _curve(ctx, model)
    told = {
        "model": model,
        "negatives": negatives,
        "scores": values,
        "curve": curve,
        "training": {
            k: trained[k]
            for k in ("figures", "seconds_per_step", "machine", "random_negatives", "resumed_from")
            if k in trained
        },
        "mining": mining,
    }
    (folder / CELL_FILE).write_text(json.dumps(told, ensure_ascii=False, indent=1), encoding="utf-8")
    summary = {task: round(v["ndcg_at_10"], 4) for task, v in values.items()}
    if curve:
        summary["dev_ndcg_at_10"] = round(curve[-1][1], 4)
    return {"figures": summary}


def _trained_on(ctx: Context, cell: Cell, dataset: str, negatives: str) -> dict[str, float] | None:
    """What the stage with the most mined negatives trained on; None if no stage has any.

    Returns:
        {"pairs": (query, positive) pairs, "of_pairs": those mined, "negatives": mined ones per pair, "short": share of pairs with
        fewer than training uses, "own_source": share of negatives from the query's own source, "mean_margin": mean of the
        positive's score − that of the hardest negative; missing where rows have scores by several teachers}
    """
    import pandas as pd

    from nvr_tasks.artifacts import reading
    from nvr_tasks.dataset import read_dataset
    from nvr_tasks.mined.tables import NEGATIVES_FILE
    from nvr_tasks.training.examples import trained_on

    used = max(cell.recipe.train.schedule, key=lambda s: s.hard_negatives)
    if not used.hard_negatives:
        return None
    data = read_dataset(ctx.store.fetch(ctx.store.open(dataset)))
    path = ctx.store.fetch(ctx.store.open(negatives), only=(NEGATIVES_FILE,)) / NEGATIVES_FILE
    with reading(path):
        rows = pd.read_parquet(path, columns=["query_id", "positive_score", "negative_ids", "negative_scores"])
    kept = rows[trained_on(used, data, rows)]
    most = None if used.choice == "drawn" else used.hard_negatives  # drawn: of all that were mined
    given = [ids[:most] for ids in kept["negative_ids"]]
    own = sum(
        d.partition("/")[0] == q.partition("/")[0] for q, ids in zip(kept["query_id"], given, strict=True) for d in ids
    )
    count = sum(map(len, given))
    told = {
        "pairs": len(kept),
        "of_pairs": len(rows),
        "negatives": count / max(1, len(kept)),
        "short": sum(len(ids) < used.hard_negatives for ids in given) / max(1, len(kept)),
        "own_source": own / max(1, count),
    }
    hardest = kept["negative_scores"].map(lambda s: max(s[:most], default=float("nan")))
    margins = (kept["positive_score"] - hardest).dropna()
    return told | ({"mean_margin": float(margins.mean())} if len(margins) else {})


def _curve(ctx: Context, model: str) -> list[tuple[int, float]]:
    """(step, dev nDCG@10) as training logged them."""
    name = "log.jsonl"
    text = (ctx.store.fetch(ctx.store.open(model), only=(name,)) / name).read_text(encoding="utf-8")
    entries = [json.loads(line) for line in text.splitlines()]
    return [(int(e["step"]), e["dev_ndcg_at_10"]) for e in entries if "dev_ndcg_at_10" in e]
