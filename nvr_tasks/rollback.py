"""Going back: the champion becomes an earlier version, with a reason, on record."""

from __future__ import annotations

import logging

from nvr_tasks.errors import NvrError
from nvr_tasks.pipeline import Context
from nvr_tasks.registry import ROLLBACK, Entry, Registry, actor
from nvr_tasks.tracking import PASSED_TAG, PREVIOUS, Tracking

log = logging.getLogger(__name__)


def rollback(ctx: Context, to: str, reason: str, *, by: str | None = None, force: bool = False) -> Entry:
    """Move `champion` to a version that passed a gate.

    A pipeline run rolls back once, however often it tries; what a killed process began is finished, not done again.

    Args:
        to: a version number, or `previous`: what the alias of that name points to, unless that was rolled back from.
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
    begun = registry.unfinished()
    standing = registry.standing()
    done = _done_before(registry, ctx.pipeline_run, begun, to)
    if done is not None:
        log.info("move %d was this rollback, from version %s to %s: done before", done.number, done.source, done.target)
        return done
    champion = standing.champion
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
    if to == PREVIOUS and (back := registry.withdrawn(str(target.version))) is not None:
        raise NvrError(
            f"the alias `previous` of {name} is version {target.version}, which {back.who} rolled back from (move {back.number}: "
            f"{back.why}): to make it champion again, name it: --to {target.version}"
        )
    if not force and PASSED_TAG not in target.tags and "nvr.decision" not in target.tags:
        raise NvrError(
            f"version {target.version} of {name} never passed a gate: name one that did (`nvr history`), or add --force"
        )
    return registry.move(
        ROLLBACK,
        str(target.version),
        str(champion.version),
        who=by or actor(ctx.pipeline_run),
        why=reason.strip() + (" (forced)" if force else ""),
        decision=target.tags.get(PASSED_TAG) or target.tags.get("nvr.decision"),
        after=standing.moves,
        run=ctx.pipeline_run,
    )


def _done_before(registry: Registry, run: str | None, begun: int | None, to: str) -> Entry | None:
    """This rollback as an earlier try of its pipeline run made it, or as a killed process began it."""
    for entry in reversed(registry.history()):
        ours = entry.number == begun or (run is not None and entry.run == run)
        if ours and entry.action == ROLLBACK and entry.happened and to in (PREVIOUS, entry.target):
            return entry
    return None
