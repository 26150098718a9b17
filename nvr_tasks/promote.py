"""Move the alias `champion` if the verdict is promote and the champion is still the one that was compared.

Reads   decision/<fp>
Writes  the alias `champion` in the MLflow registry · promotion/<fp>: promotion.json

A hold or a dry run moves nothing and counts as skipped (exit status 99 with --result-line), not as failed.

Example  nvr promote --recipe demo --input decision=file:///…/decision/3f2a…
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nvr_tasks.artifacts import Identity
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one
from nvr_tasks.promotion import promote

VERSION = 1


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """The record of the promotion."""
    del ctx
    return {"promotion": [Identity("promotion", VERSION, {}, {"decision": one(inputs, "decision")})]}


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
    """Act on the decision."""
    decision = ctx.store.open(one(inputs, "decision"))
    outcome = promote(ctx, decision)
    if outcome.skipped:
        return StageResult("promote", {}, {"champion": outcome.version}, skipped=outcome.skipped)

    def write(folder: Path) -> dict[str, Any]:
        record = {"champion": outcome.version, "decision": decision.uri}
        (folder / "promotion.json").write_text(json.dumps(record, indent=2, sort_keys=True), encoding="utf-8")
        return {"figures": {"champion": outcome.version}}

    artifact = ctx.store.publish(plan["promotion"][0], write)
    return StageResult("promote", {"promotion": [artifact.uri]}, {"champion": outcome.version})
