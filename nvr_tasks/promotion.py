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
from nvr_tasks.registry import ChampionChangedError, Entry, Registry, actor
from nvr_tasks.rejections import Rejection, reject, turned_down
from nvr_tasks.tracking import Tracking

CAME_BACK = ", which has moved and come back since"
UNKNOWN = -1  # number of moves behind a decision that did not record it: compare again

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Promotion:
    """What became of a decision."""

    version: str | None  # the champion now
    skipped: str | None  # why nothing was moved
    decision: Artifact  # the one acted on: another than the given one if the champion had changed
    notes: tuple[str, ...] = ()  # what else whoever acts should know


def act(
    ctx: Context,
    decision: Artifact,
    *,
    approved_by: str | None = None,
    rejected_by: str | None = None,
    reason: str = "",
) -> Promotion:
    """Move `champion` when the verdict is promote, or a person has approved what needs it. Safe to repeat.

    A rejection stops it whatever the verdict, and goes on record: from then on the version needs a person's approval. If
    the champion has moved since the decision, the challenger is compared anew, by the decision's own policy and from scores
    that are there already; an approval was for the old comparison and does not carry over.

    Raises:
        NvrError: the registry cannot be reached, or the new champion was never scored.
    """
    facts = ctx.store.read_json(decision, RECORD)
    registry = Registry(ctx.store, Tracking(ctx.recipe.register_.experiment), facts["model"])
    if rejected_by is not None:
        return _rejected(ctx, registry, decision, facts, rejected_by, reason)
    again = ""
    while True:
        now = _champion(registry)
        done = now == facts["challenger"] != facts["champion"]  # by an earlier try, or somebody else
        rejected = turned_down(registry, facts["challenger"])
        stopped = _stopped(ctx, decision, facts, done or approved_by is not None, again)
        if stopped is None and rejected and not done and approved_by is None:  # a machine does not overrule a person
            stopped = f"{rejected.told}; {_how_to_approve(ctx, decision, facts)}"
        if stopped is not None:
            return Promotion(now, stopped, decision)
        notes = [rejected.told] if rejected else []
        registry.tracking.require(facts["model"], facts["challenger"], facts["digest"])
        who, why = _record(ctx, facts, approved_by, reason)
        try:
            entry = registry.move(
                "promote",
                facts["challenger"],
                facts["champion"],
                who=who,
                why=why,
                decision=decision.uri,
                after=facts.get("moves", UNKNOWN),
                run=ctx.pipeline_run,
            )
        except ChampionChangedError:
            before = facts["champion"]
            decision = compare_again(ctx, registry, decision)
            facts = ctx.store.read_json(decision, RECORD)
            if approved_by is not None:
                approved_by, reason = None, ""
            again = (
                f" (compared again, with version {facts['champion']}{CAME_BACK if facts['champion'] == before else ''})"
            )
            continue
        if done or (entry.who, entry.why) != (who, why):
            arrival = registry.arrival(facts["challenger"]) or entry
            notes.append(_done_before(arrival, (who, why), approved_by, reason))
        return Promotion(facts["challenger"], None, decision, tuple(notes))


def _rejected(
    ctx: Context, registry: Registry, decision: Artifact, facts: Mapping[str, Any], who: str, why: str
) -> Promotion:
    """Put a rejection on record. What is champion already is not rejected but rolled back from."""
    now = _champion(registry)
    said = f"rejected by {who}{': ' if why else ''}{why}"
    if now is not None and now == facts["challenger"]:
        late = f"version {now} is champion already, so this is not recorded; `nvr rollback` takes it back"
        return Promotion(now, f"{said}; {late}", decision)
    reject(registry, Rejection(now, facts["challenger"], who, why, decision.uri, ctx.pipeline_run))
    if (then := _champion(registry)) == facts["challenger"]:
        said += f"; version {then} became champion at the same time: `nvr rollback` takes it back"
    return Promotion(then, said, decision)


def _champion(registry: Registry) -> str | None:
    found = registry.champion()
    return None if found is None else str(found.version)


def _record(ctx: Context, facts: Mapping[str, Any], approved_by: str | None, reason: str) -> tuple[str, str]:
    """Who and why of a move. A person's word that was not needed is on record beside what sufficed."""
    met = f"met every criterion of recipe {facts['recipe']}"
    colon = f": {reason}" if reason else ""
    if approved_by is None:
        return actor(ctx.pipeline_run), met + (f"; {reason}" if reason else "")
    if facts["verdict"] == NEEDS_APPROVAL:
        return approved_by, f"approved{colon}"
    return actor(ctx.pipeline_run), f"{met}; approved by {approved_by}{colon}"


def _done_before(entry: Entry, record: tuple[str, str], approved_by: str | None, reason: str) -> str:
    """That nothing is left to do, and what of that is not recorded."""
    told = f"version {entry.champion} is champion already, by move {entry.number} ({entry.who}, {entry.when}: {entry.why}): nothing moved"
    if (approved_by or reason) and (entry.who, entry.why) != record:
        told += f"; your {'reason' if reason else 'approval'} is not recorded"
    return told


def _stopped(
    ctx: Context,
    decision: Artifact,
    facts: Mapping[str, Any],
    approved: bool,
    again: str,
) -> str | None:
    """Why the champion stays where it is, if it does."""
    wrong = [c for c in facts["criteria"] if not c["passed"] and c.get("looked_at", True)]
    failed = "; ".join(f"{c['name']}: {c['reason']}" for c in wrong)
    if facts["verdict"] not in (PROMOTE, NEEDS_APPROVAL):
        return f"verdict hold{again}: {failed}"
    if facts["verdict"] == NEEDS_APPROVAL and not approved:
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
