"""Mine positive-aware hard negatives for every training query, exactly, and keep the scored candidates.

Reads   dataset/<fp> · embeddings/<fp> (every shard of the teachers; only when there is something to search)
Writes  candidates/<fp>  per teacher: candidates.parquet, one row per training query: query_id · positive_ids ·
                         positive_scores · candidate_ids · candidate_scores (the best `mine.depth` without a ceiling, by
                         falling score) · near_duplicate_ids · excluded_ids (never mined for this query, and why)
        negatives/<fp>   negatives.parquet, one row per (query, positive): query_id · positive_id · positive_score ·
                         ceiling · negative_ids · negative_scores (fewer than asked where no more are eligible); with
                         several teachers also whose each negative is, with that teacher's ceiling
                         report.html: scores, removals, threshold curves, closest calls

Candidates do not depend on method, threshold or number of negatives: another setting selects from them, and only
queries that the stored depth cannot serve are searched again. Whatever is judged relevant to a query, or to one that is
nearly the same, in any split, and its duplicates and near-duplicates, is never mined.

With `--shard I/N` (N is `runtime.mine_shards`) only block I of the queries is searched and kept, for a later `nvr mine`
to take up: so many tasks share the work, and the result is the same to the byte.

Example  nvr mine --recipe beir-small --set mine.method=margin_pos
         nvr mine --recipe beir-small --suggest      (what each threshold would do, and which one to take)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nvr_tasks.artifacts import Identity
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one, shard_index
from nvr_tasks.settings import CrossEncoder, Reranker

if TYPE_CHECKING:
    from nvr_tasks.mined.blocks import CandidateBlocks
    from nvr_tasks.mined.selecting import Source
    from nvr_tasks.mined.task import MiningTask
    from nvr_tasks.mined.vectors import TeacherVectors

VERSION = 2

log = logging.getLogger(__name__)


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """One `candidates` artefact per teacher at work, and one `negatives` artefact unless nothing is to be selected."""
    from nvr_tasks.mined.identities import candidate_identities, selection_identity

    dataset = one(inputs, "dataset")
    found = candidate_identities(ctx, dataset)
    if ctx.options.keys() & {"shard", "search_only"}:
        return {"candidates": list(found.values())}
    uris = {name: ctx.store.uri(i.kind, i.fingerprint) for name, i in found.items()}
    chosen = [uris[t.name] for t in ctx.recipe.mining_teachers]
    # The first one's role has no number: with one teacher there is nothing to number.
    roles = {f"candidates{f'_{n}' if n > 1 else ''}": uri for n, uri in enumerate(chosen, 1)}
    negatives = Identity("negatives", VERSION, selection_identity(ctx), {"dataset": dataset, **roles})
    return {"candidates": list(found.values()), "negatives": [negatives]}


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
    """Search candidates unless they are there, then select; with the option `shard` only search a block."""
    ctx.store.discard_finished("parts", "candidates")
    with _opened(ctx, inputs) as work:
        if "shard" in ctx.options:
            return _search_block(ctx, work)
        candidates = [blocks.published() for blocks in work.blocks.values()]
        if "search_only" in ctx.options:
            return StageResult("mine", {"candidates": [a.uri for a in candidates]}, {"searches": len(candidates)})
        [to_select] = plan["negatives"]
        from nvr_tasks.mined.selecting import write_selection

        sources = _sources(ctx, work)
        selected = ctx.store.publish(to_select, lambda folder: write_selection(ctx, work.task, sources, folder))
    figures = selected.manifest.stats["figures"]
    return StageResult("mine", {"candidates": [a.uri for a in candidates], "negatives": [selected.uri]}, figures)


def tell(ctx: Context, run: str, outputs: Inputs) -> dict[str, str]:
    """Put the report beside the other records of a pipeline run in MLflow, whether it was made now or before."""
    if "negatives" not in outputs:
        return {}  # a block of queries was searched
    from nvr_tasks.mined.selecting import REPORT_FILE
    from nvr_tasks.tracking import Tracking

    report = ctx.store.fetch(ctx.store.open(one(outputs, "negatives")), only=(REPORT_FILE,)) / REPORT_FILE
    tracking = Tracking(ctx.recipe.register_.experiment)
    mlflow_run = tracking.run(run)
    with tracking.explained():
        tracking.client.log_artifact(mlflow_run.info.run_id, str(report), "mining")
    return {"report_url": tracking.artifact_url(mlflow_run, f"mining/{REPORT_FILE}")}


def suggestion(ctx: Context, inputs: Inputs) -> str:
    """What each threshold of each method would do, as tables, and which one to take; searches candidates if need be."""
    from nvr_tasks.mining.advisor import curves, suggest

    lines = []
    with _opened(ctx, inputs) as work:
        sources = _sources(ctx, work)
        found = [(source.name, curves(source.candidates, source.spec)) for source in sources]
    for name, table in found:
        lines += ["", f"teacher {name}"] if len(found) > 1 else []
        lines.append(
            f"{'method':12}{'threshold':>10}{'kept':>9}{'short rows':>12}{'median margin':>15}{'hidden positives':>18}"
        )
        for curve in table:
            for i, threshold in enumerate(curve.thresholds):
                leak = f"{curve.false[i] / curve.mined[i]:.2%}" if curve.mined[i] else "–"
                lines.append(
                    f"{curve.method:12}{threshold:>10.2f}{curve.kept[i]:>9.1%}{curve.short[i]:>12.2%}{curve.margin[i, 1]:>15.4f}{leak:>18}"
                )
        for curve in table:
            best = suggest(table, curve.method)
            setting = (
                f"mine.threshold={best.threshold:g}"
                if len(found) == 1
                else f"mine.thresholds.{name}={best.threshold:g}"
            )
            lines += ["", f"mine.method={best.method} {setting}", *(f"  {r}" for r in best.reasons)]
    return "\n".join(lines).lstrip("\n")


# ── what build and suggestion share ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Work:
    """A mining task with everything that its selection needs, made when asked for.

    Attributes:
        task: what is mined.
        vectors: of each embedding teacher at work, by name.
        blocks: candidates of each teacher at work, by name; a reranker comes after the teacher it rescores.
    """

    task: MiningTask
    vectors: dict[str, TeacherVectors]
    blocks: dict[str, CandidateBlocks]


@contextmanager
def _opened(ctx: Context, inputs: Inputs) -> Iterator[_Work]:
    from nvr_tasks.dataset import read_dataset
    from nvr_tasks.mined.blocks import CandidateBlocks, blocks_of
    from nvr_tasks.mined.identities import candidate_identities
    from nvr_tasks.mined.scorers import Rescorer, Searcher
    from nvr_tasks.mined.task import MiningTask
    from nvr_tasks.mined.vectors import TeacherVectors

    dataset, recipe = one(inputs, "dataset"), ctx.recipe
    data = read_dataset(ctx.store.fetch(ctx.store.open(dataset)))
    task = MiningTask.of(data)
    identities = candidate_identities(ctx, dataset)
    ranges = blocks_of(len(task.query_ids), recipe.runtime.mine_shards)
    uris, judged_ids = list(inputs.get("embeddings", [])), data.queries["query_id"].tolist()
    with ctx.store.workdir("mine") as scratch:
        vectors = {t.name: TeacherVectors(ctx, t, uris, judged_ids, task, scratch) for t in recipe.teachers}
        work = _Work(task, vectors, {})
        for teacher in recipe.teachers:
            searcher = Searcher(ctx, teacher, identities[teacher.name], task, vectors[teacher.name])
            work.blocks[teacher.name] = CandidateBlocks(ctx.store, searcher, task, ranges)
        for reranker in recipe.mining_teachers:
            if isinstance(reranker, Reranker):
                data.refuse_media(f"{reranker.kind} {reranker.name}")
                found = work.blocks[recipe.retriever(reranker).name]
                rescorer = Rescorer(ctx, reranker, identities[reranker.name], task, found.table)
                work.blocks[reranker.name] = CandidateBlocks(ctx.store, rescorer, task, ranges)
        yield work


def _search_block(ctx: Context, work: _Work) -> StageResult:
    """See that every teacher's candidates of one block of queries are there."""
    shard, count = ctx.options["shard"], ctx.recipe.runtime.mine_shards
    index = shard_index("mine", shard, shard, count)
    made = 0
    start, stop = 0, 0
    for blocks in work.blocks.values():
        start, stop = blocks.blocks[index]
        made += blocks.make((start, stop))
    return StageResult("mine", {}, {"queries": stop - start, "searches": made}, reused=made == 0)


def _sources(ctx: Context, work: _Work) -> list[Source]:
    """What each teacher that decides brings to the selection."""
    from nvr_tasks.mined.rescoring import on_scale
    from nvr_tasks.mined.selecting import Source, spec_of
    from nvr_tasks.mined.tables import read_candidates

    sources = []
    for teacher in ctx.recipe.mining_teachers:
        blocks = work.blocks[teacher.name]
        found = read_candidates(blocks.whole(), work.task, blocks.published().uri)
        if isinstance(teacher, Reranker):
            found = on_scale(found, teacher.scale if isinstance(teacher, CrossEncoder) else "stored")
        spec = spec_of(ctx.recipe.mine, teacher.name)
        sources.append(Source(teacher.name, found, spec, work.vectors.get(teacher.name)))
    return sources
