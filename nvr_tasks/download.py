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
from typing import Any

from nvr_tasks.artifacts import Identity
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult

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
    from nvr_tasks.data import training_set
    from nvr_tasks.data.media_files import MediaFiles
    from nvr_tasks.data.reading import Reader, benchmark_identity, check_names, publish_benchmark

    data = ctx.recipe.data
    check_names(ctx)
    probe = _probe(ctx)  # before reading: a change in between shows at the next run
    with ctx.store.workdir("media") as scratch:
        files = MediaFiles(scratch)
        reader = Reader(ctx, "download", files)
        tasks = [reader.task(entry) for entry in data.benchmark]
        made = training_set.assemble([(s, reader.load(s)) for s in data.sources], tasks, data, ctx.recipe.seed, files)
        for reason, number in made.stats["removed"].items():
            if number:
                log.info("download: removed %s: %s", reason, f"{number:,}")
        identities = {
            "dataset": Identity("dataset", VERSION, {"rows": made.digest()}),
            "benchmark": benchmark_identity(tasks, VERSION),
        }
        artifacts = {
            "dataset": ctx.store.find(identities["dataset"]) or ctx.store.publish(identities["dataset"], made.write),
            "benchmark": publish_benchmark(ctx, tasks, VERSION),
        }
    ctx.store.write_record(
        _reference(ctx),
        {"probe": probe} | {kind: {"config": i.config, "uri": artifacts[kind].uri} for kind, i in identities.items()},
    )
    figures = {name: value for a in artifacts.values() for name, value in a.manifest.stats["figures"].items()}
    return StageResult("download", {kind: [a.uri] for kind, a in artifacts.items()}, figures)


def _reference(ctx: Context) -> str:
    """Key of the record that says what this recipe's sources looked like and which artefacts they gave."""
    asked = {"version": VERSION, "seed": ctx.recipe.seed, "data": ctx.recipe.data.as_read()}
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False)
    return f"refs/download/{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _probe(ctx: Context) -> dict[str, Any]:
    from nvr_tasks.data.reading import benchmark_entries, probe, training_entries

    return probe([*training_entries(ctx), *benchmark_entries(ctx)])
