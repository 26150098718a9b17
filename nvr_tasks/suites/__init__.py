"""Named benchmarks of mteb, pinned: which tasks a suite has, and at which commit of the hub their data are read.

`mteb.json` is generated from mteb's own metadata (tests/test_suites.py compares), so that a recipe is expanded, and a
DAG file parsed, without importing mteb, and a recipe means the same under every version of mteb.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any


@functools.cache
def table() -> dict[str, Any]:
    """{"suites": {name: [task]}, "aggregates": {task: [parts]}, "tasks": {task: {"repo", "revision", "split"}}}."""
    found: dict[str, Any] = json.loads((files("nvr_tasks.suites") / "mteb.json").read_text(encoding="utf-8"))
    return found


def expand(entries: Sequence[Any]) -> list[Any]:
    """The entries of `data.benchmark` with every suite and aggregate replaced by its tasks, and origins filled in.

    `{suite: mteb-eng-v1}` becomes the tasks of the suite; `{task: CQADupstackRetrieval}` its twelve parts, each with
    `part_of`; `{task: NFCorpus}` gets mteb's data set as its origin. What is not understood is left for the schema to refuse.

    Raises:
        ValueError: no suite of that name, or an entry of a suite has other keys.
    """
    expanded: list[Any] = []
    for entry in entries:
        if isinstance(entry, Mapping) and "suite" in entry:
            for name in _suite(entry):
                expanded += _task({"task": name})
        elif isinstance(entry, Mapping) and isinstance(entry.get("task"), str):
            expanded += _task(dict(entry))
        else:
            expanded.append(entry)
    return expanded


def members(names: Sequence[Any]) -> list[Any]:
    """Names of tasks, with those of suites and aggregates replaced by the names of their tasks."""
    found: list[Any] = []
    for name in names:
        if isinstance(name, str) and name in table()["suites"]:
            found += [task["task"] for task in expand([{"suite": name}])]
        elif isinstance(name, str) and name in table()["aggregates"]:
            found += table()["aggregates"][name]
        else:
            found.append(name)
    return found


def _suite(entry: Mapping[str, Any]) -> list[str]:
    suites: dict[str, list[str]] = table()["suites"]
    more = sorted(set(entry) - {"suite"})
    if more:
        raise ValueError(f"an entry with `suite` has nothing else, but this one has {', '.join(more)}")
    if entry["suite"] not in suites:
        raise ValueError(f"no suite {entry['suite']!r}; there are {', '.join(suites)}")
    return suites[entry["suite"]]


def _task(entry: dict[str, Any]) -> list[dict[str, Any]]:
    name, official = entry["task"], entry.get("official", True)
    parts = table()["aggregates"].get(name)
    if official and parts and not {"origin", "mirror", "part_of"} & set(entry):
        return [task for part in parts for task in _task({**entry, "task": part, "part_of": name})]
    known = table()["tasks"].get(name)
    if official and "origin" not in entry:
        if known is None:  # read with mteb's own loader
            entry["origin"] = {"type": "mteb", "task": name}
        else:
            entry["origin"] = {"type": "hf", "repo": known["repo"], "revision": known["revision"]}
            entry.setdefault("split", known["split"])
    return [entry]
