"""### See whether training data or benchmark have changed

Asks every source for its revision, ETag or digest, and announces what changed since the last time. No data are read.

| what changed | event | what follows |
|---|---|---|
| training data | asset `nv-retriever-sources` | retraining, with `NVR_ON_NEW_DATA=1` |
| benchmark | asset `nv-retriever-benchmark` | `nv_retriever_evaluate` scores the champion on the new one |
| nothing | the task is *skipped*, no event | |

It runs by `NVR_SOURCES_SCHEDULE` (cron), or on demand. A source that is asked for the first time counts as changed.
"""

from __future__ import annotations

from airflow.sdk import DAG

from nvr_airflow.params import FORMS
from nvr_airflow.settings import Settings
from nvr_airflow.workflow import BENCHMARK, SOURCES, header, source_task

settings = Settings.from_env()

with DAG(
    dag_id="nv_retriever_sources",
    description="Announce changed training data and benchmarks, from revisions and ETags alone.",
    doc_md=__doc__,
    params=FORMS["sources"].fields(settings.recipe),
    schedule=settings.sources_schedule,
    **header(settings),
    tags=["nv-retriever", "sources"],
):
    source_task(settings, "training", SOURCES)
    source_task(settings, "benchmark", BENCHMARK)
