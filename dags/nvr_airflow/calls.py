"""From task to `nvr` command line and back: pure functions, the same for every runner."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nvr_tasks.stages import OPTIONAL_ROLES, RESULT_MARK, Stage, stage

SWITCHES = frozenset({"force", "ablation"})  # options without a value; a template makes "True" of a ticked box
Result = dict[str, Any]  # nvr_tasks.pipeline.StageResult as JSON


class ResultError(Exception):
    """A stage ended well but did not say what it made, or said it in a form that cannot be used."""


def arguments(
    command: str,
    *,
    root: str,
    run_id: str,
    recipe: str | None = None,
    overrides: Iterable[str] = (),
    inputs: Mapping[str, Sequence[str]] | None = None,
    options: Mapping[str, str] | None = None,
    result_line: bool = True,
) -> list[str]:
    """The arguments of `nvr` for one task; `options` are those of single commands (`shard`, `task`, `model`, …)."""
    # Values are joined with `=`, so one that starts with a dash is still a value.
    argv = [command, f"--root={root}", f"--pipeline-run={run_id}"]
    if result_line and command != "finish":
        argv.append("--result-line")
    if recipe is not None:
        argv.append(f"--recipe={recipe}")
    argv += [f"--set={override}" for override in overrides]
    for name, value in (options or {}).items():
        if name in SWITCHES:
            argv += [f"--{name}"] if value == "True" else []
        elif value:
            argv.append(f"--{name}={value}")
    if command == "gate":
        argv.append("--decide-only")  # the alias is moved by the task `promote`, which Airflow can show as skipped
    for role, uris in (inputs or {}).items():
        argv += [f"--input={role}={uri}" for uri in uris or [""]]
    return argv


def inputs_of(reader: Stage, results: Mapping[str, Any]) -> dict[str, list[str]]:
    """URIs of a stage's inputs by role, from its upstream tasks' results (one, or one per mapped task).

    A role that no upstream task makes is left out: `nvr` finds it through the recipe.
    """
    inputs: dict[str, list[str]] = {}
    for role in reader.needs:
        sources = [name for name in results if role in stage(name).makes]
        if not sources:
            continue
        [source] = sources
        given = results[source]
        # A mapped task's results come as a lazy sequence: a slice is one request, a loop one per part and a 404 to end.
        parts = [given] if isinstance(given, Mapping) else given[:]
        uris = [uri for part in parts for uri in part["outputs"].get(role, [])]
        if not uris and role not in OPTIONAL_ROLES:
            made = ", ".join(sorted({r for part in parts for r in part["outputs"]})) or "nothing"
            raise ResultError(
                f"{reader.name} needs {role}, but the result of {source} names only: {made}. "
                f"Clear {source} and its downstream"
            )
        inputs[role] = list(dict.fromkeys(uris))
    return inputs


def parse_result(line: str) -> Result:
    """The result in a marked line.

    Raises:
        ResultError: it is not the JSON of a stage result.
    """
    text = line.removeprefix(RESULT_MARK).strip()
    try:
        result = json.loads(text)
    except ValueError as error:
        raise ResultError(f"the result line is not JSON ({error}): {text[:200]!r}") from None
    if not isinstance(result, dict) or not isinstance(result.get("outputs"), dict):
        raise ResultError(f"the result line has no `outputs`: {text[:200]!r}")
    return result
