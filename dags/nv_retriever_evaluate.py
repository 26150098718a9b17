"""### Score any model on any benchmark

A registered version, a model of the hub at a pinned commit, or the champion, on an mteb suite, on single tasks or on the
recipe's own benchmark. What was scored before (same weights, same content of the task) is not scored again.

| what | where |
|---|---|
| the scores | the *MLflow run* link of any task; the `evaluation` artefact holds mteb's own result files and per-query scores |
| a wrong task name | fails task `mirror` before anything is downloaded, and names the nearest ones |
| when it runs | on demand, and for the champion when `nv_retriever_sources` finds that the benchmark changed |
| no champion yet | tasks `score` and `evaluate` are *skipped* |
"""

from __future__ import annotations

from airflow.sdk import DAG

from nvr_airflow.params import FORMS
from nvr_airflow.settings import Settings
from nvr_airflow.workflow import BENCHMARK, begin, benchmark_tasks, finish, header, stage_task
from nvr_tasks.stages import stage

settings = Settings.from_env()
STEPS = ("mirror", "score", "evaluate")

with DAG(
    dag_id="nv_retriever_evaluate",
    description="Score a registered version or a hub model on any suite or list of mteb Retrieval tasks.",
    doc_md=__doc__,
    params=FORMS["evaluate"].fields(settings.recipe),
    schedule=[BENCHMARK],
    **header(settings),
    tags=["nv-retriever", "evaluation"],
):
    opened = begin(settings, form="evaluate")
    model = {"model": "{{ params.model }}"}
    tasks: dict[str, object] = {}
    tasks["mirror"] = stage_task(settings, stage("mirror"), opened, tasks)
    tasks["score"] = stage_task(settings, stage("score"), opened, tasks, parts=benchmark_tasks(opened), options=model)
    tasks["evaluate"] = stage_task(settings, stage("evaluate"), opened, tasks, options=model)
    tasks["evaluate"] >> finish(settings, opened, expect=STEPS)
