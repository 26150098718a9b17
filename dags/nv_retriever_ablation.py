"""### Put mining methods to the test

Every variant (a mining method with threshold, sampling and teacher, or any other change of mining and training) is trained and
scored with every seed. Data set, embeddings and candidates are made once; only selection, training and scoring repeat.

| what | where |
|---|---|
| the variants | the recipe's `ablation.variants`, or the form's methods × thresholds × samplings × teachers, crossed with the seeds |
| the table, curves and intervals | the *Report* link of `ablation`, and `nvr show runs/RUN_ID` |
| a failed cell | clear it: it goes on from its last checkpoint; cells that are done are reused, in later runs, too |
| what becomes of the models | they stay artefacts: nothing is registered, no alias moves |
| several cells at a time | as many as the pool `NVR_GPU_POOL` has slots for |
"""

from __future__ import annotations

from airflow.sdk import DAG

from nvr_airflow.params import FORMS
from nvr_airflow.settings import Settings
from nvr_airflow.workflow import ablation_cells, begin, finish, header, stage_task
from nvr_tasks.stages import stage

settings = Settings.from_env()
STEPS = ("download", "embed", "search", "cell", "ablation")

with DAG(
    dag_id="nv_retriever_ablation",
    description="Train and score variants of a recipe with several seeds and compare them.",
    doc_md=__doc__,
    params=FORMS["ablation"].fields(settings.recipe),
    schedule=None,
    **header(settings),
    tags=["nv-retriever", "ablation"],
):
    opened = begin(settings, form="ablation", options={"ablation": "True"}, trains="cell")
    parts = {"embed": opened.output, "cell": ablation_cells(opened)}
    tasks: dict[str, object] = {}
    for name in STEPS:
        tasks[name] = stage_task(settings, stage(name), opened, tasks, parts=parts.get(name))
    tasks["ablation"] >> finish(settings, opened, expect=STEPS)
