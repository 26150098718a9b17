"""Acting on a decision: the champion moves if it is the one that was compared; else the comparison is made again."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nvr_tasks.artifacts import Artifact
from nvr_tasks.decision import RECORD, compare_again
from nvr_tasks.judging import NEEDS_APPROVAL, PROMOTE
from nvr_tasks.pipeline import Context
from nvr_tasks.registry import ChampionChangedError, Registry, actor
from nvr_tasks.tracking import Tracking

UNKNOWN = -1  # number of moves behind a decision that did not record it: compare again

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

    A rejection stops it whatever the verdict. If the champion has moved since the decision, the challenger is compared
    anew, by the decision's own policy and from scores that are there already; an approval was for the old comparison and
    does not carry over.

    Raises:
        NvrError: the registry cannot be reached, or the new champion was never scored.
    """
    facts = ctx.store.read_json(decision, RECORD)
    registry = Registry(ctx.store, Tracking(ctx.recipe.register_.experiment), facts["model"])
    again = ""
    while True:
        champion = registry.champion()
        stopped = _stopped(ctx, decision, facts, approved_by, rejected_by, reason, again)
        if stopped is not None:
            return Promotion(None if champion is None else str(champion.version), stopped, decision)
        registry.tracking.require(facts["model"], facts["challenger"], facts["digest"])
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
                after=facts.get("moves", UNKNOWN),
                run=ctx.pipeline_run,
            )
        except ChampionChangedError:
            decision = compare_again(ctx, registry, decision)
            facts, approved_by = ctx.store.read_json(decision, RECORD), None
            again = f" (compared again, with version {facts['champion']})"
            continue
        return Promotion(facts["challenger"], None, decision)


def _stopped(
    ctx: Context,
    decision: Artifact,
    facts: Mapping[str, Any],
    approved_by: str | None,
    rejected_by: str | None,
    reason: str,
    again: str,
) -> str | None:
    """Why the champion stays where it is, if it does."""
    if rejected_by is not None:
        return f"rejected by {rejected_by}: {reason or 'no reason given'}"
    wrong = [c for c in facts["criteria"] if not c["passed"] and c.get("looked_at", True)]
    failed = "; ".join(f"{c['name']}: {c['reason']}" for c in wrong)
    if facts["verdict"] not in (PROMOTE, NEEDS_APPROVAL):
        return f"verdict hold{again}: {failed}"
    if facts["verdict"] == NEEDS_APPROVAL and approved_by is None:
        return (
            f"verdict {NEEDS_APPROVAL}{again}: {failed + '; ' if failed else ''}{_how_to_approve(ctx, decision, facts)}"
        )
    if facts["dry_run"] or not ctx.recipe.gate.promote:
        return "dry run (gate.promote is false)"
    return None


def _how_to_approve(ctx: Context, decision: Artifact, facts: Mapping[str, Any]) -> str:
    kept = f"runs/{ctx.pipeline_run}/recipe.yaml"
    if ctx.pipeline_run is not None and ctx.store.storage.get_bytes(kept) is not None:
        recipe = f"{ctx.store.root}/{kept}"
    else:
        recipe = ctx.options.get("recipe") or facts["recipe"]
    where = shlex.join(["--root", ctx.store.root, "--recipe", recipe, "--input", f"decision={decision.uri}"])
    return f"a person has the last word: nvr promote {where} --approved-by NAME --reason WHY"
