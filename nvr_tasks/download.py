"""Fetch, validate, de-duplicate and decontaminate the training data, and mirror the benchmark.

Reads   the sources of `data.sources` and `data.benchmark`: BEIR folders and archives (folder, file://, s3://, https://),
        data sets of the Hugging Face Hub, documentation of installed packages; mirrors below $NVR_DATA when it is set.
Writes  a `dataset` artefact (corpus, queries, qrels as parquet) and a `benchmark` artefact (one BEIR folder per task),
        both named by their content: a source that moved but did not change makes nothing new.
Example nvr download --recipe demo
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nvr_tasks.artifacts import Identity
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult

if TYPE_CHECKING:
    from nvr_tasks.config import WithOrigin
    from nvr_tasks.data.raw import RawData

VERSION = 1

log = logging.getLogger(__name__)


def refresh(ctx: Context) -> bool:
    """Whether the sources have changed since the last download by this recipe; asks them, but reads no data."""
    record = _last(ctx)
    return record is None or record["probe"] != _probe(ctx)


def plan(ctx: Context, inputs: Inputs) -> Plan:  # noqa: ARG001
    """What the last download by this recipe made. No source is asked: `refresh` does that when the stage itself runs."""
    record = _last(ctx)
    if record is None:
        return {"dataset": [], "benchmark": []}
    return {kind: [Identity(kind, VERSION, record[kind]["config"])] for kind in ("dataset", "benchmark")}


def _last(ctx: Context) -> dict[str, Any] | None:
    """What the last download by this recipe saw and made; None if there was none, or its record is not whole."""
    record = ctx.store.read_record(_reference(ctx))
    return record if isinstance(record, dict) and {"probe", "dataset", "benchmark"} <= set(record) else None


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:  # noqa: ARG001
    """Read every source, make both artefacts, and remember what the sources looked like."""
    from nvr_tasks.data import benchmark, sources, training_set

    data = ctx.recipe.data
    official = [t.task for t in data.benchmark if t.official]
    if official:  # a wrong name is told now, not when everything is trained
        from nvr_tasks.evaluation.tasks import official_class

        for name in official:
            official_class(name)
    probe = _probe(ctx)  # before reading: a change in between shows at the next run
    read: dict[str, RawData] = {}

    def load(entry: WithOrigin) -> RawData:
        source = sources.resolve(entry)
        key = source.model_dump_json()
        if key not in read:
            with ctx.store.workdir("sources") as work:
                raw = sources.read(source, work, ctx.store.scratch / "downloads")
            log.info(
                "download: %s: %s documents, %s queries, splits %s",
                sources.describe(source),
                f"{len(raw.documents):,}",
                f"{len(raw.queries):,}",
                ", ".join(f"{split} {len(rows):,}" for split, rows in sorted(raw.qrels.items())),
            )
            read[key] = raw
        return read[key]

    tasks = [benchmark.select(t.task, t.split, t.official, load(t)) for t in data.benchmark]
    made = training_set.assemble([(s, load(s)) for s in data.sources], tasks, data, ctx.recipe.seed)
    for reason, number in made.stats["removed"].items():
        if number:
            log.info("download: removed %s: %s", reason, f"{number:,}")
    identities = {
        "dataset": Identity("dataset", VERSION, {"rows": made.digest()}),
        "benchmark": Identity("benchmark", VERSION, {"tasks": {t.name: t.entry() for t in tasks}}),
    }
    artifacts = {
        "dataset": ctx.store.find(identities["dataset"]) or ctx.store.publish(identities["dataset"], made.write),
        "benchmark": ctx.store.find(identities["benchmark"])
        or ctx.store.publish(identities["benchmark"], lambda folder: benchmark.write(tasks, folder)),
    }
    ctx.store.write_record(
        _reference(ctx),
        {"probe": probe} | {kind: {"config": i.config, "uri": artifacts[kind].uri} for kind, i in identities.items()},
    )
    figures = {name: value for a in artifacts.values() for name, value in a.manifest.stats["figures"].items()}
    return StageResult("download", {kind: [a.uri] for kind, a in artifacts.items()}, figures)


def _reference(ctx: Context) -> str:
    """Key of the record that says what this recipe's sources looked like and which artefacts they gave."""
    asked = {"version": VERSION, "seed": ctx.recipe.seed, "data": ctx.recipe.data.model_dump(mode="json")}
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False)
    return f"refs/download/{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _entries(ctx: Context) -> Iterator[tuple[str, WithOrigin]]:
    for source in ctx.recipe.data.sources:
        yield f"source {source.name}", source
    for task in ctx.recipe.data.benchmark:
        yield f"task {task.task}", task


def _probe(ctx: Context) -> dict[str, Any]:
    """Identity of every source as it is now: cheap to ask, different when the content is."""
    from nvr_tasks.data import sources

    known: dict[str, Any] = {}
    found = {}
    for name, entry in _entries(ctx):
        source = sources.resolve(entry)
        key = source.model_dump_json()
        if key not in known:
            known[key] = sources.probe(source)
        found[name] = {"source": source.model_dump(mode="json"), "version": known[key]}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]  # as it reads back from the record
