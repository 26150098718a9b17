"""### Serve passages under the champion's vectors

An example of a consumer: a new champion triggers it. The serving corpus is embedded with the champion into a faiss index,
the index is tried against exact search, and the pointer is swapped: one record that names index *and* model version, so
that the two never disagree, whatever is promoted meanwhile.

| what | where |
|---|---|
| what serves now | `refs/index/<registered model>/`, the record with the highest number; embed queries with the version it names |
| a skipped `swap` | the champion has moved since the index was built; the run for the new one follows |
| the corpus and the index's settings | `index:` of the recipe; the passages of the data set by default |
| when it runs | at every new champion, once it is switched on; on demand for the recipe of the form |
"""

from __future__ import annotations

from airflow.sdk import DAG

from nvr_airflow.params import FORMS
from nvr_airflow.settings import Settings
from nvr_airflow.workflow import CHAMPION, begin, finish, header, stage_task
from nvr_tasks.stages import stage

settings = Settings.from_env()
STEPS = ("index", "swap")

with DAG(
    dag_id="nv_retriever_reindex",
    description="Embed the serving corpus with the new champion, check the index, swap the pointer.",
    doc_md=__doc__,
    params=FORMS["recipe"].fields(settings.recipe),
    schedule=[CHAMPION],
    is_paused_upon_creation=True,  # an example: it costs an embedding of the corpus per champion
    **header(settings),
    tags=["nv-retriever", "serving"],
):
    opened = begin(settings, form="recipe")
    tasks: dict[str, object] = {}
    for name in STEPS:
        tasks[name] = stage_task(settings, stage(name), opened, tasks)
    tasks["swap"] >> finish(settings, opened, expect=STEPS)
