"""What every DAG must keep to, the shape of ours, and what parsing it may cost."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from dag_files import REPOSITORY, run_python

from nvr_tasks.stages import STAGES

GOLDEN = Path(__file__).with_name("golden")
DAG_ID = "nv_retriever_retrain"
DAG_IDS = sorted(path.stem for path in (REPOSITORY / "dags").glob("nv_retriever_*.py"))


def tasks_of(dag: Any) -> list[Any]:
    return sorted(dag.tasks, key=lambda t: t.task_id)


def attribute(task: Any, name: str) -> Any:
    """An operator's attribute, mapped or not."""
    return (
        task.partial_kwargs.get(name) if task.is_mapped and name in task.partial_kwargs else getattr(task, name, None)
    )


def violations(dag: Any) -> list[str]:
    """The house's policy; each line names the DAG, the task and the fix."""
    found = []

    def expect(met: object, where: str, wrong: str, fix: str) -> None:
        if not met:
            found.append(f"{where}: {wrong}; {fix}")

    name = f"DAG {dag.dag_id}"
    expect(dag.doc_md, name, "no doc_md", "give the file a docstring and pass doc_md=__doc__")
    expect(dag.description, name, "no description", "say in one sentence what a run achieves")
    expect(dag.tags, name, "no tags", "pass tags=[…], people filter by them")
    expect(
        dag.max_active_runs == 1, name, f"max_active_runs={dag.max_active_runs}", "two runs would race for one alias: 1"
    )
    expect(not dag.catchup, name, "catchup is on", "missed intervals must not start a retraining each: catchup=False")
    expect(dag.start_date, name, "no start_date", "a schedule needs one")
    for task in tasks_of(dag):
        where = f"{name}, task {task.task_id}"
        timeout = attribute(task, "execution_timeout")
        expect(attribute(task, "doc_md"), where, "no doc_md", "say what it does, reads and writes")
        expect(attribute(task, "owner") not in (None, "", "airflow"), where, "no owner", "set owner in default_args")
        expect(
            (attribute(task, "retries") or 0) >= 1, where, "no retries", "every command may be repeated: retries ≥ 1"
        )
        expect(attribute(task, "retry_exponential_backoff"), where, "no backoff", "set retry_exponential_backoff")
        expect(attribute(task, "max_retry_delay"), where, "unbounded backoff", "set max_retry_delay")
        expect(isinstance(timeout, timedelta), where, "no execution_timeout", "a task that hangs must end: set one")
    return found


def structure(dag: Any) -> dict[str, Any]:
    """The shape of a DAG as plain JSON."""
    return {
        "dag_id": dag.dag_id,
        "schedule": dag.schedule if isinstance(dag.schedule, str | None) else [asset.uri for asset in dag.schedule],
        "max_active_runs": dag.max_active_runs,
        "tags": sorted(dag.tags),
        "params": {name: dag.params.get_param(name).schema for name in dag.params},
        "tasks": {
            task.task_id: {
                "operator": task.task_type,
                "upstream": sorted(task.upstream_task_ids),
                "mapped": task.is_mapped,
                "setup": task.is_setup,
                "teardown": task.is_teardown,
                "trigger_rule": str(getattr(task.trigger_rule, "value", task.trigger_rule)),
                "pool": attribute(task, "pool"),
                "retries": attribute(task, "retries"),
                "timeout_s": int(attribute(task, "execution_timeout").total_seconds()),
                "outlets": [asset.uri for asset in attribute(task, "outlets") or []],
            }
            for task in tasks_of(dag)
        },
    }


@pytest.fixture
def bag(dags: Callable[..., Any]) -> Any:
    return dags(NVR_RETRIES="", NVR_GPU_POOL="nvr_gpu", NVR_PROMOTION_POOL="nvr_promotion")


def test_every_dag_file_can_be_imported(bag: Any) -> None:
    assert bag.import_errors == {}
    assert sorted(bag.dags) == DAG_IDS


def test_the_policy_is_kept(bag: Any) -> None:
    found = [line for dag in bag.dags.values() for line in violations(dag)]
    assert not found, "\n".join(found)


def test_the_policy_names_dag_task_and_fix() -> None:
    from airflow.providers.standard.operators.empty import EmptyOperator
    from airflow.sdk import DAG

    with DAG("careless") as dag:
        EmptyOperator(task_id="idle")
    found = violations(dag)
    assert "DAG careless: no tags; pass tags=[…], people filter by them" in found
    assert any(line.startswith("DAG careless, task idle: no execution_timeout; ") for line in found)


@pytest.mark.parametrize("dag_id", DAG_IDS)
def test_the_structure_is_the_one_on_record(bag: Any, dag_id: str) -> None:
    """Update after a change on purpose: UPDATE_GOLDEN=1 … pytest tests/airflow -k on_record."""
    golden = GOLDEN / f"{dag_id}.json"
    # Recipes come and go without changing the DAG.
    shape = structure(bag.dags[dag_id])
    if "recipe" in shape["params"]:
        shape["params"]["recipe"]["examples"] = "…"
    text = json.dumps(shape, indent=2, sort_keys=True) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


def test_the_dag_has_one_task_per_stage_in_a_runnable_order(bag: Any) -> None:
    dag = bag.dags[DAG_ID]
    divided = {"mine_blocks", "mine_block", "benchmark_tasks"}
    assert {t.task_id for t in dag.tasks} == {"begin", "approve", "finish", *divided, *(s.name for s in STAGES)}
    for stage in STAGES:
        makers = {s.name for s in STAGES if set(s.makes) & set(stage.needs)}
        assert makers <= dag.task_dict[stage.name].upstream_task_ids


def test_deployment_settings_reach_the_dag(dags: Callable[..., Any]) -> None:
    dag = dags(
        NVR_SCHEDULE="0 3 * * 1",
        NVR_RECIPE="beir-small",
        NVR_RETRIES="5",
        NVR_RETRY_DELAY_S="7",
        NVR_GPU_POOL="",
        NVR_PROMOTION_POOL="",
    ).dags[DAG_ID]
    assert dag.schedule == "0 3 * * 1"
    assert dag.params["recipe"] == "beir-small"
    assert dag.task_dict["train"].retries == 5
    assert dag.task_dict["train"].retry_delay == timedelta(seconds=7)
    assert {attribute(t, "pool") for t in dag.tasks} == {"default_pool"}
    assert not dag.task_dict["begin"].options, "a process has the GPUs of its worker, which nobody knows beforehand"


def test_retraining_can_wait_for_new_data_for_the_clock_or_for_either(dags: Callable[..., Any]) -> None:
    from airflow.sdk import AssetOrTimeSchedule

    sources = ["nvr://nv-retriever/sources"]
    assert [a.uri for a in dags(NVR_ON_NEW_DATA="1").dags[DAG_ID].schedule] == sources
    both = dags(NVR_ON_NEW_DATA="1", NVR_SCHEDULE="0 3 * * 1").dags[DAG_ID].timetable
    assert isinstance(both, AssetOrTimeSchedule)
    assert both.timetable.expression == "0 3 * * 1"
    assert [a.uri for a in both.asset_condition.objects] == sources


def test_no_dag_waits_for_what_it_makes_itself(dags: Callable[..., Any]) -> None:
    """It would never come to rest."""
    for dag in dags(NVR_ON_NEW_DATA="1").dags.values():
        waits = {a.uri for a in dag.schedule} if isinstance(dag.schedule, list) else set()
        makes = {asset.uri for task in dag.tasks for asset in attribute(task, "outlets") or []}
        assert not waits & makes, dag.dag_id


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NVR_ON_NEW_DATA": "maybe"}, "NVR_ON_NEW_DATA is 'maybe': expected 1 or 0"),
        ({"NVR_RUNNER": "balloon"}, "NVR_RUNNER is 'balloon'; available: docker, kubernetes, process"),
        ({"NVR_APPROVAL_HOURS": "0"}, "NVR_APPROVAL_HOURS is '0': expected a number, above 0"),
        ({"NVR_APPROVAL_HOURS": "1e-9"}, "expected a number, above 0"),
        ({"NVR_APPROVAL_HOURS": "inf"}, "NVR_APPROVAL_HOURS is 'inf': expected a number"),
        ({"NVR_APPROVAL_HOURS": "nan"}, "NVR_APPROVAL_HOURS is 'nan': expected a number"),
        ({"NVR_RETRY_DELAY_S": "1e300"}, "and at most 1,000,000"),
        ({"NVR_RETRIES": "many"}, "NVR_RETRIES is 'many': expected a number, 0 or more"),
    ],
)
def test_a_wrong_setting_is_a_clear_import_error(
    dags: Callable[..., Any], environ: dict[str, str], message: str
) -> None:
    errors = dags(**environ).import_errors
    assert len(errors) == len(DAG_IDS)
    assert all(message in error for error in errors.values())


PARSE = """
import json, os, sys, time
import airflow.sdk
from airflow.sdk import DAG, Asset, BaseOperator, BaseOperatorLink, Param, XComArg
import airflow.sdk.exceptions
import socket
def refuse(*args, **kwargs): raise AssertionError("parsing opened a connection")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from airflow.sdk import Variable, Connection
Variable.get = Connection.get = refuse
before = set(sys.modules)
start = time.process_time()
import nv_retriever_ablation, nv_retriever_evaluate, nv_retriever_reindex, nv_retriever_retrain, nv_retriever_sources
print(json.dumps({"seconds": time.process_time() - start, "modules": sorted(set(sys.modules) - before)}))
"""


def test_parsing_is_cheap_and_touches_nothing(tmp_path: Path) -> None:
    nowhere = f"sqlite:///{tmp_path}/absent/airflow.db"  # opening it would fail
    done = [run_python(PARSE, AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=nowhere) for _ in range(3)]
    assert [d.returncode for d in done] == [0, 0, 0], done[0].stderr
    told = [json.loads(d.stdout.splitlines()[-1]) for d in done]
    assert min(t["seconds"] for t in told) < 0.5  # of this process alone, and the best of three: other work is not ours
    loaded = {name.partition(".")[0] for name in told[0]["modules"]}
    heavy = {
        "torch",
        "numpy",
        "pandas",
        "pyarrow",
        "mlflow",
        "mteb",
        "faiss",
        "boto3",
        "sentence_transformers",
        "sqlite3",
    }
    assert not loaded & heavy


def test_dag_files_keep_to_their_layer() -> None:
    """Only nvr_airflow knows operators; of nvr_tasks, parsing may touch only the light modules."""
    light = {
        "nvr_tasks.stages",
        "nvr_tasks.mine_settings",
        "nvr_tasks.recipe_files",
        "nvr_tasks.errors",
        "nvr_tasks.suites",
    }
    wrong = []
    for file in sorted((REPOSITORY / "dags").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            wrong += [f"{file.name} imports {n}" for n in names if n.startswith("nvr_tasks") and n not in light]
            if file.parent.name == "dags":
                wrong += [f"{file.name} imports {n}" for n in names if n.startswith("airflow") and n != "airflow.sdk"]
    for file in sorted((REPOSITORY / "nvr_tasks").rglob("*.py")):
        text = file.read_text()
        wrong += [
            f"{file.name} imports airflow"
            for line in text.splitlines()
            if line.strip().startswith(("import airflow", "from airflow"))
        ]
    assert not wrong
