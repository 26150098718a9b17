"""### Make an earlier version the champion again

| what | where |
|---|---|
| which version | `previous`, or the number of one that passed a gate; `nvr history --recipe NAME` lists all moves |
| a version that never passed a gate | refused, unless *Force* is on |
| what consumers see | the alias `champion` moves in one step; the old champion becomes `previous` |
| a run whose task is tried again | rolls back once: the second try finds the first one's entry in the history |
| what was rolled back from | is not promoted again unless a person approves, and `previous` does not lead back to it |
| undo | run it again with the number of the version that was champion before |
"""

from __future__ import annotations

from airflow.sdk import DAG

from nvr_airflow.params import FORMS
from nvr_airflow.settings import Settings
from nvr_airflow.workflow import header, rollback

settings = Settings.from_env()

with DAG(
    dag_id="nv_retriever_rollback",
    description="Move the alias `champion` back to an earlier version, with a reason, on record.",
    doc_md=__doc__,
    params=FORMS["rollback"].fields(settings.recipe),
    schedule=None,
    **header(settings),
    tags=["nv-retriever", "registry"],
):
    rollback(settings)
