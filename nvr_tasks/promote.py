"""Move the alias `champion` if the verdict is promote and the champion is still the one that was compared.

Reads   decision/<fp>
Writes  the aliases `champion` and `previous` in the MLflow registry, the journal behind `nvr history` (a rejection, too) ·
        promotion/<fp>: promotion.json

If the champion changed meanwhile, the challenger is compared with the new one first. A hold or a dry run moves nothing
and counts as skipped (exit status 99 with --result-line), not as failed. A decision that needs approval moves nothing
without --approved-by. What a killed promotion left half-done is finished first.

Example  nvr promote --recipe demo --input decision=file:///…/decision/3f2a…
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nvr_tasks.artifacts import Identity
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one
from nvr_tasks.promotion import act

VERSION = 1


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """The record of the promotion; of which decision, only `build` can tell."""
    del ctx, inputs
    return {}


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
    """Act on the decision."""
    del plan
    given = ctx.store.open(one(inputs, "decision"))
    outcome = act(
        ctx,
        given,
        approved_by=ctx.options.get("approved_by"),
        rejected_by=ctx.options.get("rejected_by"),
        reason=ctx.options.get("reason", ""),
    )
    figures: dict[str, Any] = {"champion": outcome.version} | ({"notes": list(outcome.notes)} if outcome.notes else {})
    if outcome.skipped:
        return StageResult("promote", {}, figures, skipped=outcome.skipped)

    def write(folder: Path) -> dict[str, Any]:
        record = {"champion": outcome.version, "decision": outcome.decision.uri}
        (folder / "promotion.json").write_text(json.dumps(record, indent=2, sort_keys=True), encoding="utf-8")
        return {"figures": {"champion": outcome.version}}

    artifact = ctx.store.publish(Identity("promotion", VERSION, {}, {"decision": outcome.decision.uri}), write)
    return StageResult("promote", {"promotion": [artifact.uri]}, figures)
