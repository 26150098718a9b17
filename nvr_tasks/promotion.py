"""Moving the alias `champion`: the last act of a decision, safe to repeat."""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass

from nvr_tasks.artifacts import Artifact
from nvr_tasks.errors import NvrError
from nvr_tasks.pipeline import Context
from nvr_tasks.tracking import CHALLENGER, CHAMPION, Tracking

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Promotion:
    """What became of a decision."""

    version: str | None  # the champion now
    skipped: str | None  # why nothing was moved


def promote(ctx: Context, decision: Artifact) -> Promotion:
    """Act on a decision: move `champion` when the verdict is promote and nobody moved it meanwhile.

    Repeating it is harmless: when the alias is there already, nothing happens.

    Raises:
        NvrError: the champion is no longer the version that the challenger was compared with.
    """
    facts = ctx.store.read_json(decision, "decision.json")
    name, challenger = facts["model"], facts["challenger"]
    tracking = Tracking(ctx.recipe.register_.experiment)
    now = tracking.alias(name, CHAMPION)
    champion = None if now is None else str(now.version)
    if facts["verdict"] != "promote":
        reasons = "; ".join(f"{c['name']}: {c['reason']}" for c in facts["criteria"] if not c["passed"])
        return Promotion(champion, f"verdict hold: {reasons}")
    if facts["dry_run"]:
        return Promotion(champion, "dry run (gate.promote is false)")
    if champion != challenger:
        if champion != facts["champion"]:
            raise NvrError(
                f"{name}@champion is version {champion} now, but the decision compared with version {facts['champion']}: "
                "run `nvr evaluate` and `nvr gate` again"
            )
        tracking.require(name, challenger, facts["digest"])
        # The record first: a crash behind the move must not leave a champion that nothing accounts for.
        tracking.tag(name, challenger, {"nvr.decision": decision.uri})
        tracking.point(name, CHAMPION, challenger)
        log.info("champion of %s: version %s → version %s", name, champion or "none", challenger)
    tracking.tag(name, challenger, {"nvr.decision": decision.uri, "nvr.promoted_at": _now()})
    waiting = tracking.alias(name, CHALLENGER)
    if waiting is not None and str(waiting.version) == challenger:  # another run's challenger stays one
        with tracking.explained():
            tracking.client.delete_registered_model_alias(name, CHALLENGER)
    return Promotion(challenger, None)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
