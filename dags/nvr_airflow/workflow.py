"""From the table of stages to tasks. `begin` opens a run (setup), `finish` closes it whatever happened (teardown)."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from airflow.sdk import Asset, AssetOrTimeSchedule, CronTriggerTimetable, XComArg

from nvr_airflow.approval import ApproveOperator, answer_form
from nvr_airflow.operator import BEGIN, FINISH, RECIPE_KEY, RUN_URL_KEY, PartsOperator
from nvr_airflow.runners import gpus_of, runner
from nvr_airflow.settings import Settings
from nvr_tasks.stages import OPTIONAL_ROLES, Resources, Stage
from nvr_tasks.stages import stage as stage_of

MAPPED = {
    "embed": "shard",
    "mine": "shard",
    "score": "task",
    "cell": "cell",
}  # stages that may run once per part; the option for it
IN_BLOCKS = frozenset({"mine"})  # stages that mapped tasks may do block by block before they run
DATASET = Asset("nv-retriever-dataset", uri="nvr://nv-retriever/dataset", group="nv-retriever")
CHAMPION = Asset("nv-retriever-champion", uri="nvr://nv-retriever/champion", group="nv-retriever")
INDEX = Asset("nv-retriever-index", uri="nvr://nv-retriever/index", group="nv-retriever")
# What `nv_retriever_sources` announces. Retraining is scheduled on SOURCES and not on DATASET, which it makes itself.
SOURCES = Asset("nv-retriever-sources", uri="nvr://nv-retriever/sources", group="nv-retriever")
BENCHMARK = Asset("nv-retriever-benchmark", uri="nvr://nv-retriever/benchmark", group="nv-retriever")
OUTLETS = {"download": [DATASET], "promote": [CHAMPION], "swap": [INDEX]}

BOOKKEEPING = Resources(cpu=1, memory_gb=2)
BOOKKEEPING_TIMEOUT_S = 600
MAX_RETRY_DELAY = datetime.timedelta(minutes=30)


def header(settings: Settings) -> dict[str, Any]:
    """What all DAGs, and their tasks, have in common."""
    return {
        "start_date": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        "catchup": False,
        "max_active_runs": 1,
        "default_args": {
            "owner": "nvr",
            "retries": settings.retries,
            "retry_delay": datetime.timedelta(seconds=settings.retry_delay_s),
            "retry_exponential_backoff": 2.0,
            "max_retry_delay": MAX_RETRY_DELAY,
        },
    }


def retraining_schedule(settings: Settings) -> Any:
    """When retraining runs by itself: by the clock, when training data have changed, by either, or never."""
    if not settings.on_new_data:
        return settings.schedule
    if settings.schedule is None:
        return [SOURCES]
    return AssetOrTimeSchedule(timetable=CronTriggerTimetable(settings.schedule, timezone="UTC"), assets=[SOURCES])


def begin(
    settings: Settings, form: str = "retrain", options: Mapping[str, str] | None = None, trains: str | None = None
) -> Any:
    """The first task: the recipe is checked and stored in full, the MLflow run opened, shards and tasks counted.

    Args:
        trains: the stage that trains, if one does: whether it gets as many GPUs as the recipe wants is checked, too.
    """
    gpus = None
    if trains is not None:
        gpus = gpus_of(settings, settings.resources_of(trains, stage_of(trains).resources))
    if gpus is not None:
        options = {**(options or {}), "train-gpus": str(gpus)}
    doc = (
        "Checks recipe and overrides, stores the resolved recipe with the run and opens the MLflow run.\n\n`nvr begin`"
    )
    return _task(
        settings,
        BEGIN,
        BOOKKEEPING,
        timeout_s=BOOKKEEPING_TIMEOUT_S,
        doc=doc,
        recipe="{{ params.recipe }}",
        form=form,
        options=options,
    ).as_setup()


def finish(settings: Settings, opened: Any, expect: Sequence[str] = ()) -> Any:
    """The last task: summary into the log, MLflow run closed. Runs after a failure too, and does not hide it.

    Args:
        expect: stages that a complete run has; those of retraining by default.
    """
    doc = (
        "Prints the summary of the run and closes its MLflow run, whether the stages succeeded or not.\n\n`nvr finish`"
    )
    task = _task(
        settings,
        FINISH,
        BOOKKEEPING,
        timeout_s=BOOKKEEPING_TIMEOUT_S,
        doc=doc,
        mlflow_run_url=_of_begin(RUN_URL_KEY),
        options={"expect": ",".join(expect)},
    )
    return task.as_teardown(setups=opened)


def parts_of(opened: Any, figure: str, task_id: str, doc: str) -> Any:
    """A list that `begin` counted, to map over."""
    listed = PartsOperator(
        task_id=task_id,
        figure=figure,
        doc_md=doc,
        execution_timeout=datetime.timedelta(seconds=BOOKKEEPING_TIMEOUT_S),
    )
    opened >> listed
    return listed.output


def benchmark_tasks(opened: Any) -> Any:
    """Which tasks the benchmark has: `score` is mapped over them."""
    doc = "Names of the benchmark's tasks, as `nvr begin` told: `score` runs once for each."
    return parts_of(opened, "tasks", "benchmark_tasks", doc)


def ablation_cells(opened: Any) -> Any:
    """Which cells the ablation has: `cell` is mapped over them."""
    doc = "Names of the ablation's cells (`VARIANT:SEED`), as `nvr begin` told: `cell` runs once for each."
    return parts_of(opened, "cells", "ablation_cells", doc)


def approve(settings: Settings, gate: Any) -> Any:
    """Between gate and promotion: a person's word, when the policy wants it."""
    return ApproveOperator(
        task_id="approve",
        result=gate.output,
        params=answer_form(),
        response_timeout=datetime.timedelta(hours=settings.approval_hours),
        execution_timeout=datetime.timedelta(seconds=BOOKKEEPING_TIMEOUT_S),
        doc_md="Asks a person when the verdict is `needs-approval` (recipe: `gate.approval`); else passes at once. "
        f"No answer within {settings.approval_hours:g} hours is a rejection.\n\n"
        "By hand: `nvr promote --input decision=… --approved-by NAME --reason WHY`",
    )


def rollback(settings: Settings) -> Any:
    """The one task of the rollback DAG."""
    return _task(
        settings,
        "rollback",
        BOOKKEEPING,
        timeout_s=BOOKKEEPING_TIMEOUT_S,
        doc="Makes an earlier version the champion again and records it in the history.\n\n`nvr rollback`",
        recipe="{{ params.recipe }}",
        options={
            "to": "{{ params.to }}",
            "reason": "{{ params.reason }}",
            "by": "{{ dag_run.triggering_user_name or '' }}",
            "force": "{{ params.force }}",
        },
        form="rollback",
        outlets=OUTLETS["promote"],
        pool=settings.promotion_pool,
    )


def stage_task(
    settings: Settings,
    stage: Stage,
    opened: Any,
    tasks: Mapping[str, Any],
    *,
    parts: Any = None,
    options: Mapping[str, str] | None = None,
    answer: Any = None,
) -> Any:
    """The task of one stage, downstream of those that make what it needs; the first ones follow `begin`.

    Args:
        tasks: the DAG's tasks so far, by stage.
        parts: what a mapped stage is mapped over.
        options: further options of the command.
        answer: what a person said of the decision; for `promote`, which then takes its turn.
    """
    upstream = [name for name in sorted(tasks) if set(stage_of(name).makes) & set(stage.needs)]
    common: dict[str, Any] = {
        "timeout_s": stage.timeout_s,
        "recipe": _of_begin(RECIPE_KEY),
        "mlflow_run_url": _of_begin(RUN_URL_KEY),
        "results": {name: tasks[name].output for name in upstream},
        "options": dict(options or {}),
        "pool": settings.gpu_pool if settings.resources_of(stage.name, stage.resources).gpu else "default_pool",
    }
    if answer is not None:
        common |= {"answer": answer, "pool": settings.promotion_pool, "max_active_tis_per_dag": 1}
    outlets = OUTLETS.get(stage.name, [])
    if stage.name not in IN_BLOCKS:
        made = _task(
            settings, stage.name, stage.resources, doc=_doc(settings, stage), parts=parts, outlets=outlets, **common
        )
        if not upstream:
            opened >> made
        return made
    # Blocks are finished work that the stage takes up. Without any, those tasks are skipped and the stage does it all.
    doc = f"Lists the blocks that `{stage.name}` is divided over (`runtime.{stage.name}_shards`); none: it is not."
    listed = parts_of(opened, "blocks", f"{stage.name}_blocks", doc)
    doc = f"One block of the work of `{stage.name}`; skipped when it is not divided.\n\n`nvr {stage.name} --shard I/N`"
    blocks = _task(
        settings,
        stage.name,
        stage.resources,
        task_id=f"{stage.name}_block",
        doc=doc,
        parts=listed,
        outlets=[],
        **common,
    )
    made = _task(
        settings,
        stage.name,
        stage.resources,
        doc=_doc(settings, stage),
        outlets=outlets,
        trigger_rule="none_failed",
        **common,
    )
    blocks >> made
    return made


def source_task(settings: Settings, which: str, outlet: Asset) -> Any:
    """Asks the sources of the training data or of the benchmark; skipped, without an event, when nothing changed."""
    row = stage_of("sources")
    return _task(
        settings,
        row.name,
        row.resources,
        timeout_s=row.timeout_s,
        doc=f"Compares revisions, ETags and digests of the {which} sources with those of the last time; reads no data.\n\n"
        f"`nvr sources --of {which}`",
        task_id=which,
        recipe="{{ params.recipe }}",
        options={"of": which},
        form="sources",
        outlets=[outlet],
    )


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
    parts: XComArg | None = None,
    task_id: str | None = None,
    **arguments: Any,
) -> Any:
    operator, of_runner = runner(settings)(settings, settings.resources_of(command, resources))
    common: dict[str, Any] = {
        "task_id": task_id or command,
        "command": command,
        "root": settings.root,
        "execution_timeout": datetime.timedelta(seconds=timeout_s),
        "doc_md": doc,
        **of_runner,
        **arguments,
    }
    if parts is None:
        return operator(**common)
    return operator.partial(**common, part_option=MAPPED[command], map_index_template="{{ task.part }}").expand(
        part=parts
    )


def _doc(settings: Settings, stage: Stage) -> str:
    asked = settings.resources_of(stage.name, stage.resources)
    wants = [f"{asked.cpu:g} CPU", f"{asked.memory_gb:g} GB", f"{asked.gpu} GPU"]
    return (
        f"{stage.summary[0].upper()}{stage.summary[1:]}.\n\n"
        f"- reads: {_roles(stage.needs)}\n- writes: {_roles(stage.makes)}\n"
        f"- wants: {', '.join(wants)}; at most {stage.timeout_s // 60} min per try\n\n"
        f"By hand: `nvr {stage.name} --recipe …` (`nvr {stage.name} --help`)"
    )


def _roles(roles: tuple[str, ...]) -> str:
    return ", ".join(f"{r} (if any)" if r in OPTIONAL_ROLES else r for r in roles) or "nothing"
