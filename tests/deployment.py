"""A deployment of the workflow as its tests see it: Airflow and MLflow over REST, a run of the demo cut down to seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvr_tasks.stages import STAGES as TABLE

REPOSITORY = Path(__file__).resolve().parents[1]
STAND_INS = REPOSITORY / "tests" / "containers" / "stand-ins"
sys.path.insert(0, str(REPOSITORY / "tools"))

import containers  # noqa: E402

STAGES = [s.name for s in TABLE]
DAG = "nv_retriever_retrain"
MODEL = "nv-retriever-demo"
# The demo, cut down to seconds: little text, few steps, no bar to clear.
TINY = [
    "data.sources.0.origin.packages=[networkx]",
    "data.sources.0.max_queries=60",
    "data.benchmark.0.origin.packages=[networkx]",
    "data.benchmark.0.origin.test_percent=5",
    "data.dev_queries=10",
    "embed.teachers.0.max_tokens.passage=32",
    "train.student.layers=1",
    "train.student.max_tokens=32",
    "train.steps=40",
    "train.warmup_steps=1",
    "train.batch_size=8",
    "gate.min_gain_over_base=-1",
    "gate.max_loss_per_task=1",
    "runtime.checkpoint_every_steps=5",
    "runtime.mine_shards=2",
]
LONG = ["seed=18", "train.steps=100000", "runtime.checkpoint_every_steps=1000"]
# Times the usual time limits, on a machine that is busy otherwise.
SLOW = float(os.environ.get("NVR_TEST_PATIENCE", "1"))


def until(condition: Callable[[], Any], what: str, timeout_s: float = 300) -> Any:
    deadline = time.monotonic() + timeout_s * SLOW
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s * SLOW:.0f} s: {what}"
        time.sleep(0.5)
    return found


def docker(*words: str, check: bool = True) -> str:
    """One command of the docker client."""
    done = subprocess.run([*containers.docker(), *words], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.strip()


def stand_in_image(name: str) -> str:
    """Of `postgres` or `s3`, built if need be: for machines that reach no image registry."""
    image = f"nvr-stand-in-{name}:dev"
    if not docker("images", "--quiet", image):
        build = ["build", "--quiet", "--file", str(STAND_INS / f"{name}.Dockerfile"), "--tag", image]
        docker(*build, str(REPOSITORY if name == "s3" else STAND_INS))
    return image


class Deployment:
    """A session with Airflow's and MLflow's REST interfaces."""

    airflow = ""  # addresses
    mlflow_server = ""
    token = ""

    def log_in(self, password: str) -> None:
        """As the administrator."""
        self.token = ""
        status, token = self.rest("/auth/token", {"username": "admin", "password": password})
        assert status == 201, token
        self.token = token["access_token"]

    def rest(
        self, path: str, body: Any = None, method: str | None = None, server: str | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of a request, to Airflow unless told otherwise; POST when there is a body."""
        request = urllib.request.Request(  # noqa: S310  of our own
            f"{server or self.airflow}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.token}"} if self.token else {})},
            method=method,
        )
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def start(self, dag: str = DAG, **conf: Any) -> str:
        """A run with these Params; returns its path below the REST interface."""
        status, run = self.rest(f"/api/v2/dags/{dag}/dagRuns", {"logical_date": None, "conf": conf})
        assert status == 200, run
        return f"/api/v2/dags/{dag}/dagRuns/{urllib.parse.quote(run['dag_run_id'])}"

    def trigger(self, *overrides: str) -> str:
        """A run of the small demo, as soon as the DAG is known."""
        until(lambda: self.rest(f"/api/v2/dags/{DAG}")[0] == 200, "the DAG is known", 120)
        return self.start(recipe="demo", overrides=[*TINY, *overrides])

    def wait(self, run: str, timeout_s: float = 600) -> str:
        return str(
            until(
                lambda: (state := self.rest(run)[1]["state"]) not in ("queued", "running") and state,
                f"{run} ends",
                timeout_s,
            )
        )

    def tasks(self, run: str) -> list[dict[str, Any]]:
        return list(self.rest(f"{run}/taskInstances")[1]["task_instances"])

    def log(self, run: str, task: str, attempt: int = 1, part: int = -1) -> str:
        status, body = self.rest(f"{run}/taskInstances/{task}/logs/{attempt}?map_index={part}")
        return (
            "\n".join(f"{line.get('event', line)} {line.get('error_detail', '')}" for line in body["content"])
            if status == 200
            else str(body)
        )

    def results(self, run: str) -> dict[str, dict[str, Any]]:
        """The stages' results, from XCom, by task and map index."""
        found = {}
        for ti in self.tasks(run):
            if ti["task_id"] in STAGES:
                path = f"{run}/taskInstances/{ti['task_id']}/xcomEntries/return_value?map_index={ti['map_index']}"
                found[f"{ti['task_id']}[{ti['map_index']}]"] = self.rest(path)[1]["value"]
        return found

    def mlflow(self, path: str, body: Any = None) -> Any:
        """JSON of a request to MLflow."""
        status, answer = self.rest(f"/api/2.0/mlflow/{path}", body, server=self.mlflow_server)
        assert status == 200, answer
        return answer

    def champion(self, alias: str = "champion") -> str:
        """The version that an alias points to."""
        return str(self.mlflow(f"registered-models/alias?name={MODEL}&alias={alias}")["model_version"]["version"])

    def failure(self, run: str) -> str:
        tasks = self.tasks(run)
        told = [
            self.log(run, t["task_id"], t["try_number"], t["map_index"])
            for t in tasks
            if t["state"] in ("failed", "up_for_retry")
        ]
        return f"{[(t['task_id'], t['state']) for t in tasks]}\n" + "\n".join(told)[-6000:]


def fingerprints(results: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """By role: kind and fingerprint of artefacts whose identity hangs on data and recipe alone."""
    made: dict[str, list[str]] = {}
    for result in results.values():
        for role, uris in result["outputs"].items():
            if role not in ("registration", "decision", "promotion", "evaluation_champion"):
                made[role] = sorted([*made.get(role, []), *("/".join(uri.rsplit("/", 2)[1:]) for uri in uris)])
    return made
