"""### Retrain the retriever, promote it if it earned it

The NV-Retriever workflow (arXiv:2407.15831): a teacher's scores pick hard negatives below a ceiling that each
positive sets, the student is trained on them, registered in MLflow, scored with MTEB, and becomes `champion` only if
the gate says so.

| what | where |
|---|---|
| a recipe's settings | `nvr config --recipe NAME`; the form's *Overrides* change any of them |
| a held promotion | task `promote` is *skipped*, the run is a success; its log and `decision.json` say why |
| a quick tier that stopped the challenger | `screen` says so; `score` leaves the other tasks out, and the gate holds |
| a promotion that waits | task `approve` asks for a person's word (recipe: `gate.approval`) |
| a failed task | clear it: finished artefacts are reused, nothing is registered twice |
| the record of a run | the *MLflow run* link of any task, and `nvr show runs/RUN_ID` |
| why these negatives, why this verdict | the *Report* link of `mine` and of `gate` |
| when it runs | on demand, by `NVR_SCHEDULE` (cron), and with `NVR_ON_NEW_DATA=1` when training data changed; how: `NVR_RUNNER` |
"""

from __future__ import annotations

from airflow.sdk import DAG

from nvr_airflow.params import form
from nvr_airflow.settings import Settings
from nvr_airflow.workflow import approve, begin, benchmark_tasks, finish, header, retraining_schedule, stage_task
from nvr_tasks.stages import STAGES

settings = Settings.from_env()

with DAG(
    dag_id="nv_retriever_retrain",
    description="Mine positive-aware hard negatives, train, register, evaluate and promote the retriever.",
    doc_md=__doc__,
    params=form(settings.recipe),
    schedule=retraining_schedule(settings),
    **header(settings),
    tags=["nv-retriever", "retraining"],
):
    opened = begin(settings, trains="train")
    tasks: dict[str, object] = {}
    parts = {"embed": opened.output, "score": benchmark_tasks(opened)}
    for stage in STAGES:
        answer = approve(settings, tasks["gate"]).output if stage.name == "promote" else None
        tasks[stage.name] = stage_task(settings, stage, opened, tasks, parts=parts.get(stage.name), answer=answer)
    tasks[STAGES[-1].name] >> finish(settings, opened)
