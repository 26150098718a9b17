"""From the table of stages to tasks. `begin` opens a run (setup), `finish` closes it whatever happened (teardown)."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from airflow.sdk import Asset, XComArg

from nvr_airflow.operator import BEGIN, FINISH, RECIPE_KEY, RUN_URL_KEY, BlocksOperator
from nvr_airflow.runners import runner
from nvr_airflow.settings import Settings
from nvr_tasks.stages import OPTIONAL_ROLES, Resources, Stage, maker

MAPPED = frozenset({"embed"})  # stages that run once per shard
IN_BLOCKS = frozenset({"mine"})  # stages that mapped tasks may do block by block before they run
DATASET = Asset("nv-retriever-dataset", uri="nvr://nv-retriever/dataset", group="nv-retriever")
CHAMPION = Asset("nv-retriever-champion", uri="nvr://nv-retriever/champion", group="nv-retriever")
OUTLETS = {"download": [DATASET], "promote": [CHAMPION]}

BOOKKEEPING = Resources(cpu=1, memory_gb=2)
BOOKKEEPING_TIMEOUT_S = 600
MAX_RETRY_DELAY = datetime.timedelta(minutes=30)


def default_args(settings: Settings) -> dict[str, Any]:
    """What all tasks have in common."""
    return {
        "owner": "nvr",
        "retries": settings.retries,
        "retry_delay": datetime.timedelta(seconds=settings.retry_delay_s),
        "retry_exponential_backoff": 2.0,
        "max_retry_delay": MAX_RETRY_DELAY,
    }


def begin(settings: Settings) -> Any:
    """The first task: the recipe is checked and stored in full, the MLflow run opened, the shards counted."""
    doc = (
        "Checks recipe and overrides, stores the resolved recipe with the run and opens the MLflow run.\n\n`nvr begin`"
    )
    return _task(
        settings, BEGIN, BOOKKEEPING, timeout_s=BOOKKEEPING_TIMEOUT_S, doc=doc, recipe="{{ params.recipe }}"
    ).as_setup()


def finish(settings: Settings, opened: Any) -> Any:
    """The last task: summary into the log, MLflow run closed. Runs after a failure too, and does not hide it."""
    doc = (
        "Prints the summary of the run and closes its MLflow run, whether the stages succeeded or not.\n\n`nvr finish`"
    )
    task = _task(
        settings, FINISH, BOOKKEEPING, timeout_s=BOOKKEEPING_TIMEOUT_S, doc=doc, mlflow_run_url=_of_begin(RUN_URL_KEY)
    )
    return task.as_teardown(setups=opened)


def stage_task(settings: Settings, stage: Stage, opened: Any, tasks: Mapping[str, Any]) -> Any:
    """The task of one stage, downstream of those that make what it needs; the first ones follow `begin`."""
    upstream = {maker(role).name for role in stage.needs}
    common: dict[str, Any] = {
        "timeout_s": stage.timeout_s,
        "recipe": _of_begin(RECIPE_KEY),
        "mlflow_run_url": _of_begin(RUN_URL_KEY),
        "results": {name: tasks[name].output for name in sorted(upstream)},
        "pool": settings.gpu_pool if stage.resources.gpu else "default_pool",
    }
    shards = opened.output if stage.name in MAPPED else None
    outlets = OUTLETS.get(stage.name, [])
    if stage.name not in IN_BLOCKS:
        task = _task(settings, stage.name, stage.resources, doc=_doc(stage), shards=shards, outlets=outlets, **common)
        if not upstream:
            opened >> task
        return task
    # Blocks are finished work that the stage takes up. Without any, those tasks are skipped and the stage does it all.
    listed = BlocksOperator(
        task_id=f"{stage.name}_blocks",
        doc_md=f"Lists the blocks that `{stage.name}` is divided over (`runtime.{stage.name}_shards`); none: it is not.",
        execution_timeout=datetime.timedelta(seconds=BOOKKEEPING_TIMEOUT_S),
    )
    opened >> listed
    doc = f"One block of the work of `{stage.name}`; skipped when it is not divided.\n\n`nvr {stage.name} --shard I/N`"
    blocks = _task(
        settings,
        stage.name,
        stage.resources,
        task_id=f"{stage.name}_block",
        doc=doc,
        shards=listed.output,
        outlets=[],
        **common,
    )
    task = _task(
        settings,
        stage.name,
        stage.resources,
        doc=_doc(stage),
        outlets=outlets,
        trigger_rule="none_failed",
        **common,
    )
    blocks >> task
    return task


def _of_begin(key: str) -> str:
    # A template rather than `begin.output[key]`, which would draw an arrow from `begin` to every task.
    return f"{{{{ ti.xcom_pull(task_ids='{BEGIN}', key='{key}') }}}}"


def _task(
    settings: Settings,
    command: str,
    resources: Resources,
    *,
    timeout_s: int,
    doc: str,
    shards: XComArg | None = None,
    task_id: str | None = None,
    **arguments: Any,
) -> Any:
    operator, of_runner = runner(settings)(settings, resources)
    common: dict[str, Any] = {
        "task_id": task_id or command,
        "command": command,
        "root": settings.root,
        "execution_timeout": datetime.timedelta(seconds=timeout_s),
        "doc_md": doc,
        **of_runner,
        **arguments,
    }
    if shards is None:
        return operator(**common)
    return operator.partial(**common, map_index_template="{{ task.shard }}").expand(shard=shards)


def _doc(stage: Stage) -> str:
    wants = [f"{stage.resources.cpu:g} CPU", f"{stage.resources.memory_gb:g} GB", f"{stage.resources.gpu} GPU"]
    return (
        f"{stage.summary[0].upper()}{stage.summary[1:]}.\n\n"
        f"- reads: {_roles(stage.needs)}\n- writes: {_roles(stage.makes)}\n"
        f"- wants: {', '.join(wants)}; at most {stage.timeout_s // 60} min per try\n\n"
        f"By hand: `nvr {stage.name} --recipe …` (`nvr {stage.name} --help`)"
    )


def _roles(roles: tuple[str, ...]) -> str:
    return ", ".join(f"{r} (if any)" if r in OPTIONAL_ROLES else r for r in roles) or "nothing"
