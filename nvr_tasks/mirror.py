"""Mirror the benchmark alone, to score any model on any suite; training data are left where they are.

Reads   the sources of `data.benchmark`, or their mirrors below $NVR_DATA
Writes  a `benchmark` artefact, the very one that `nvr download` makes of the same content

Example  nvr mirror --recipe beir-small --set 'data.benchmark=[{suite: nano-beir}]'
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from nvr_tasks.artifacts import Identity
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult

VERSION = 1  # of the benchmark artefact, as in `nvr download`


def refresh(ctx: Context) -> bool:
    """Whether the sources have changed since the last mirror of this benchmark; asks them, but reads no data."""
    record = _last(ctx)
    return record is None or record["probe"] != _probe(ctx)


def plan(ctx: Context, inputs: Inputs) -> Plan:  # noqa: ARG001
    """What the last mirror of this benchmark made."""
    record = _last(ctx)
    return {"benchmark": [] if record is None else [Identity("benchmark", VERSION, record["config"])]}


def _last(ctx: Context) -> dict[str, Any] | None:
    """What the last mirror of this benchmark saw and made; None if there was none, or its record is not whole."""
    record = ctx.store.read_record(_reference(ctx))
    return record if isinstance(record, dict) and {"probe", "config"} <= set(record) else None


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:  # noqa: ARG001
    """Read the tasks, make the artefact, and remember what the sources looked like."""
    from nvr_tasks.data.reading import Reader, benchmark_identity, check_names, publish_benchmark

    check_names(ctx)
    probe = _probe(ctx)
    reader = Reader(ctx, "mirror")
    tasks = [reader.task(entry) for entry in ctx.recipe.data.benchmark]
    artifact = publish_benchmark(ctx, tasks, VERSION)
    record = {"probe": probe, "config": benchmark_identity(tasks, VERSION).config}
    ctx.store.write_record(_reference(ctx), record)
    return StageResult("mirror", {"benchmark": [artifact.uri]}, dict(artifact.manifest.stats["figures"]))


def _reference(ctx: Context) -> str:
    asked = ctx.recipe.data.as_read()["benchmark"]
    text = json.dumps([VERSION, asked], sort_keys=True, ensure_ascii=False)
    return f"refs/mirror/{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _probe(ctx: Context) -> dict[str, Any]:
    from nvr_tasks.data.reading import benchmark_entries, probe

    return probe(benchmark_entries(ctx))
