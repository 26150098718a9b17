"""Going back: the champion becomes an earlier version, with a reason, on record."""

from __future__ import annotations

import logging
import shlex
from typing import TYPE_CHECKING

from nvr_tasks.errors import NvrError
from nvr_tasks.pipeline import Context
from nvr_tasks.registry import ROLLBACK, Entry, Registry, actor
from nvr_tasks.tracking import PASSED_TAG, PREVIOUS, Tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

FORCED = " (forced)"

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
        by_move = registry.arrival(str(target.version))
        told = f", by move {by_move.number} ({by_move.who}, {by_move.when}: {by_move.why})" if by_move else ""
        raise NvrError(
            f"version {target.version} of {name} is the champion already{told}: nothing moved, your reason is not recorded"
        )
    if to == PREVIOUS and (back := registry.withdrawn(str(target.version))) is not None:
        raise NvrError(
            f"the alias `previous` of {name} is version {target.version}, which {back.who} rolled back from (move {back.number}: "
            f"{back.why}): nothing moved. If it is to be champion again, name it: {_command(ctx, target)}"
        )
    if not force and not _passed(target):
        raise NvrError(
            f"version {target.version} of {name} never passed a gate: name one that did (`nvr history`), or add --force"
        )
    return registry.move(
        ROLLBACK,
        str(target.version),
        str(champion.version),
        who=by or actor(ctx.pipeline_run),
        why=reason.strip() + (FORCED if force else ""),
        decision=target.tags.get(PASSED_TAG) or target.tags.get("nvr.decision"),
        after=standing.moves,
        run=ctx.pipeline_run,
    )


def notes(ctx: Context, entry: Entry, reason: str) -> list[str]:
    """What whoever rolled back should know: what of it is not on record, and the command that undoes it."""
    found = []
    if entry.why.removesuffix(FORCED) != reason.strip():
        found.append(f"move {entry.number} was begun before ({entry.who}: {entry.why}); your reason is not recorded")
    source = None
    if entry.source is not None:
        source = Tracking(ctx.recipe.register_.experiment).version(ctx.recipe.register_.model_name, entry.source)
    if source is not None:
        found.append(f"to undo this: {_command(ctx, source)}")
    return found


def _passed(version: ModelVersion) -> bool:
    return PASSED_TAG in version.tags or "nvr.decision" in version.tags


def _command(ctx: Context, version: ModelVersion) -> str:
    """How to make a version champion, to be copied into a shell; the recipe says of which model."""
    recipe = ctx.options.get("recipe_words") or shlex.join(["--recipe", ctx.recipe.name])
    force = "" if _passed(version) else " --force"
    return f"nvr rollback {shlex.join(['--root', ctx.store.root])} {recipe} --to {version.version}{force} --reason WHY"


def _done_before(registry: Registry, run: str | None, begun: int | None, to: str) -> Entry | None:
    """This rollback as an earlier try of its pipeline run made it, or as a killed process began it."""
    for entry in reversed(registry.history()):
        ours = entry.number == begun or (run is not None and entry.run == run)
        if ours and entry.action == ROLLBACK and entry.happened and to in (PREVIOUS, entry.target):
            return entry
    return None
