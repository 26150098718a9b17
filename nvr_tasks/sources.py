"""Say whether the sources of the training data, or of the benchmark, have changed since it was last asked.

Reads   revisions, ETags and digests of the sources (no data), and what they were the last time
Writes  the record refs/sources/…: what they are now

Nothing changed counts as skipped (exit status 99 with --result-line). A pipeline run that asks again gets the same
answer again, so that a task which was killed before it could announce a change does so when it is tried again.

Example  nvr sources --recipe beir-small --of benchmark
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult

TRAINING, BENCHMARK = "training", "benchmark"
WHICH = (TRAINING, BENCHMARK)


def plan(ctx: Context, inputs: Inputs) -> Plan:  # noqa: ARG001
    """No artefact: a record."""
    return {}


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:  # noqa: ARG001
    """Ask every source, compare, remember."""
    from nvr_tasks.data.reading import benchmark_entries, probe, training_entries

    which = ctx.options.get("of", TRAINING)
    now = probe(training_entries(ctx) if which == TRAINING else benchmark_entries(ctx))
    key = _reference(ctx, which)
    record = ctx.store.read_record(key)
    again = record is not None and ctx.pipeline_run is not None and record["asked_by"] == ctx.pipeline_run
    before = (record["before"] if again else record["now"]) if record is not None else {}
    ctx.store.write_record(key, {"now": now, "before": before, "asked_by": ctx.pipeline_run})
    changed = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
    figures: dict[str, Any] = {"of": which, "sources": len(now), "changed": changed}
    return StageResult("sources", {}, figures, skipped=None if changed else f"no source of the {which} data changed")


def _reference(ctx: Context, which: str) -> str:
    asked: Any = ctx.recipe.data.as_read()["sources" if which == TRAINING else "benchmark"]
    text = json.dumps([which, asked], sort_keys=True, ensure_ascii=False)
    return f"refs/sources/{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
