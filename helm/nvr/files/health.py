"""What `helm test` asks: are Airflow's services and MLflow healthy, and are the DAGs there without import errors?

Standard library; reads AIRFLOW_URL, AIRFLOW_ADMIN_PASSWORD (unset: DAGs cannot be asked for), MLFLOW_URL, TIMEOUT_S.
"""

import json
import os
import time
import urllib.error
import urllib.request

AIRFLOW, MLFLOW = os.environ["AIRFLOW_URL"], os.environ["MLFLOW_URL"]
PASSWORD = os.environ.get("AIRFLOW_ADMIN_PASSWORD")
SERVICES = ("metadatabase", "scheduler", "dag_processor", "triggerer")
DAG = "nv_retriever_retrain"
# Within the cluster, never by a proxy.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def fetch(url: str, body: dict[str, str] | None = None, token: str = "") -> bytes:
    """The answer to a GET, or to a POST of `body`."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    asked = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    with OPENER.open(asked, timeout=10) as answer:
        return bytes(answer.read())


def missing() -> list[str]:
    """What is not (yet) as it should be."""
    wrong = []
    health = json.loads(fetch(f"{AIRFLOW}/api/v2/monitor/health"))
    wrong += [
        f"Airflow's {name} is {health[name]['status']}" for name in SERVICES if health[name]["status"] != "healthy"
    ]
    if MLFLOW.startswith("http"):
        fetch(f"{MLFLOW.rstrip('/')}/health")
    if PASSWORD:
        login = fetch(f"{AIRFLOW}/auth/token", {"username": "admin", "password": PASSWORD})
        token = json.loads(login)["access_token"]
        errors = json.loads(fetch(f"{AIRFLOW}/api/v2/importErrors", token=token))["import_errors"]
        wrong += [f"{error['filename']} cannot be imported: {error['stack_trace']}" for error in errors]
        try:
            fetch(f"{AIRFLOW}/api/v2/dags/{DAG}", token=token)
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            wrong.append(f"Airflow has no DAG {DAG}")
    return wrong


def main() -> int:
    """Ask until all is well or the time is up."""
    deadline = time.monotonic() + float(os.environ["TIMEOUT_S"])
    while True:
        try:
            wrong = missing()
        except (OSError, ValueError, KeyError) as error:
            wrong = [f"{getattr(error, 'url', '') or AIRFLOW + ' or ' + MLFLOW}: {error!r}"]
        if not wrong:
            print(f"Airflow ({', '.join(SERVICES)}) and MLflow are healthy" + (f", {DAG} is there" if PASSWORD else ""))
            return 0
        if time.monotonic() > deadline:
            print("\n".join(wrong))
            return 1
        time.sleep(3)


raise SystemExit(main())
