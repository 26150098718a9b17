"""mteb's own tasks by name. mteb is imported when one is asked for."""

from __future__ import annotations

import difflib
from typing import Any

from nvr_tasks.errors import NvrError


def official_task(name: str) -> Any:
    """mteb's Retrieval task of that name, not loaded.

    Raises:
        NvrError: mteb has no task of that name (the nearest ones are named), or it is no retrieval task.
    """
    import mteb
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    try:
        task = mteb.get_task(name)
    except (KeyError, ValueError):
        names = sorted({t.metadata.name for t in mteb.get_tasks(task_types=["Retrieval"])})
        folded = {n.casefold(): n for n in names}
        near = [folded[n] for n in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.4)]
        raise NvrError(
            f"mteb has no task {name!r}; nearest: {', '.join(near) or 'none'}. For a benchmark of your own set official: false"
        ) from None
    if not isinstance(task, AbsTaskRetrieval):
        raise NvrError(
            f"mteb task {name} is of type {task.metadata.type}, not Retrieval: remove it from data.benchmark"
        )
    return task


def subset_of(task: Any, subset: str | None) -> str:
    """The subset (language) that is read and scored: the one asked for, or the only one there is.

    Raises:
        NvrError: there is none of that name, or there are several and none was named.
    """
    there = list(task.hf_subsets)
    if subset is None and len(there) == 1:
        return str(there[0])
    if subset is not None and subset in there:
        return subset
    named = "no subset was named" if subset is None else f"there is no subset {subset!r}"
    raise NvrError(
        f"mteb task {task.metadata.name}: {named}; its subsets: {', '.join(sorted(there))}. "
        "Give `origin: {type: mteb, task: …, subset: …}`"
    )
