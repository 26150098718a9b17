"""Going back: the champion becomes an earlier version, with a reason, on record."""

from __future__ import annotations

import logging

from nvr_tasks.errors import NvrError
from nvr_tasks.pipeline import Context
from nvr_tasks.registry import Entry, Registry, actor
from nvr_tasks.tracking import PASSED_TAG, PREVIOUS, Tracking

log = logging.getLogger(__name__)


def rollback(ctx: Context, to: str, reason: str, *, by: str | None = None, force: bool = False) -> Entry:
    """Move `champion` to a version that passed a gate.

    Args:
        to: a version number, or `previous`: what the alias of that name points to.
        reason: for the record; not empty.
        by: who wants it; the pipeline run or the user if unset.
        force: also to a version that never passed a gate.

    Raises:
        NvrError: no reason, no such version, one that never passed a gate, or the champion changed at that moment.
    """
    if not reason.strip():
        raise NvrError('a rollback needs a reason, it goes on record: --reason "what is wrong with the champion"')
    name = ctx.recipe.register_.model_name
    tracking = Tracking(ctx.recipe.register_.experiment)
    registry = Registry(ctx.store, tracking, name)
    champion = registry.champion()
    if champion is None:
        raise NvrError(f"{name} has no champion in this MLflow: there is nothing to roll back")
    target = tracking.alias(name, PREVIOUS) if to == PREVIOUS else tracking.version(name, to)
    if target is None:
        known = (
            "no move of the champion has left one" if to == PREVIOUS else "`nvr history` names those that were champion"
        )
        raise NvrError(f"{name} has no version {to!r} to go back to: {known}")
    if str(target.version) == str(champion.version):
        raise NvrError(f"version {target.version} of {name} is the champion already")
    if not force and PASSED_TAG not in target.tags and "nvr.decision" not in target.tags:
        raise NvrError(
            f"version {target.version} of {name} never passed a gate: name one that did (`nvr history`), or add --force"
        )
    return registry.move(
        "rollback",
        str(target.version),
        str(champion.version),
        who=by or actor(ctx.pipeline_run),
        why=reason.strip() + (" (forced)" if force else ""),
        decision=target.tags.get(PASSED_TAG) or target.tags.get("nvr.decision"),
    )
