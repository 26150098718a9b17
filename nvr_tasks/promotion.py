"""Acting on a decision: the champion moves if it is the one that was compared; else the comparison is made again."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from nvr_tasks.artifacts import Artifact
from nvr_tasks.decision import RECORD, compare_again
from nvr_tasks.judging import NEEDS_APPROVAL, PROMOTE
from nvr_tasks.pipeline import Context
from nvr_tasks.registry import ChampionChangedError, Registry, actor
from nvr_tasks.tracking import Tracking

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Promotion:
    """What became of a decision."""

    version: str | None  # the champion now
    skipped: str | None  # why nothing was moved
    decision: Artifact  # the one acted on: another than the given one if the champion had changed


def act(
    ctx: Context,
    decision: Artifact,
    *,
    approved_by: str | None = None,
    rejected_by: str | None = None,
    reason: str = "",
) -> Promotion:
    """Move `champion` when the verdict is promote, or a person has approved what needs it. Safe to repeat.

    A champion that changed since the decision is compared with anew, from scores that are there already; an approval
    was for the old comparison and does not carry over.

    Raises:
        NvrError: the registry cannot be reached, or the new champion was never scored.
    """
    facts = ctx.store.read_json(decision, RECORD)
    tracking = Tracking(ctx.recipe.register_.experiment)
    registry = Registry(ctx.store, tracking, facts["model"])
    again = ""
    while True:
        champion = registry.champion()
        now = None if champion is None else str(champion.version)
        if facts["verdict"] == NEEDS_APPROVAL and rejected_by is not None:
            return Promotion(now, f"rejected by {rejected_by}: {reason or 'no reason given'}", decision)
        if facts["verdict"] == NEEDS_APPROVAL and approved_by is None:
            return Promotion(now, f"verdict {NEEDS_APPROVAL}{again}: {_how_to_approve(decision)}", decision)
        if facts["verdict"] not in (PROMOTE, NEEDS_APPROVAL):
            failed = "; ".join(f"{c['name']}: {c['reason']}" for c in facts["criteria"] if not c["passed"])
            return Promotion(now, f"verdict hold{again}: {failed}", decision)
        if facts["dry_run"]:
            return Promotion(now, "dry run (gate.promote is false)", decision)
        tracking.require(facts["model"], facts["challenger"], facts["digest"])
        by = approved_by if facts["verdict"] == NEEDS_APPROVAL else None
        try:
            registry.move(
                "promote",
                facts["challenger"],
                facts["champion"],
                who=by or actor(ctx.pipeline_run),
                why=f"approved: {reason or 'no reason given'}"
                if by
                else f"met every criterion of recipe {facts['recipe']}",
                decision=decision.uri,
            )
        except ChampionChangedError as changed:
            if changed.found is None:
                raise
            decision = compare_again(ctx, tracking, decision, changed.found)
            facts, approved_by = ctx.store.read_json(decision, RECORD), None
            again = f" (compared again, with version {facts['champion']})"
            continue
        return Promotion(facts["challenger"], None, decision)


def _how_to_approve(decision: Artifact) -> str:
    return f"a person has the last word: nvr promote --input decision={decision.uri} --approved-by NAME --reason WHY"
