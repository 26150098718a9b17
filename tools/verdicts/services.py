"""A running installation of `make up`, and what a person or a client does with it over REST."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

REPOSITORY = Path(__file__).resolve().parents[2]
POLL_S, TAKEN_NOTE_S = 1.0, 3.0
FINISHED = ("success", "failed", "skipped", "upstream_failed")
LONGEST_RUN_S = 3600
USER = "admin"


class WrongOutcomeError(Exception):
    """Something is not as it should be."""


def expect(met: bool, otherwise: str) -> None:
    """Raise WrongOutcomeError unless a condition is met."""
    if not met:
        raise WrongOutcomeError(otherwise)


class Services:
    """Airflow and MLflow in a folder of their own, on free ports.

    Args:
        home: folder of all state.
        settings: environment variables of the deployment (NVR_*).
    """

    def __init__(self, home: Path, settings: dict[str, str]) -> None:
        self.home = home
        self.airflow_port, self.mlflow_port = _ports(home)
        foreign = ("AIRFLOW", "MLFLOW_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)} | settings
        self.token = ""

    @property
    def airflow_url(self) -> str:
        """Address of Airflow."""
        return f"http://127.0.0.1:{self.airflow_port}"

    @property
    def mlflow_url(self) -> str:
        """Address of MLflow."""
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def password(self) -> str:
        """Of the one user."""
        return str(json.loads((self.home / "airflow-passwords.json").read_text())[USER])

    @staticmethod
    def commit() -> str:
        """What is checked out."""
        command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    # ── the installation ─────────────────────────────────────────────────────────────────────────────────────────

    def up(self) -> None:
        """Start everything and log in."""
        self._local("up")
        self._log_in()

    def _log_in(self) -> None:
        self.token = ""
        self.token = self._ask("/auth/token", {"username": USER, "password": self.password})["access_token"]

    def down(self) -> None:
        """Stop everything."""
        self._local("down")

    def _local(self, command: str) -> None:
        done = subprocess.run(
            [
                str(REPOSITORY / ".venv-airflow" / "bin" / "python"),
                str(REPOSITORY / "tools" / "local.py"),
                f"--home={self.home}",
                f"--airflow-port={self.airflow_port}",
                f"--mlflow-port={self.mlflow_port}",
                command,
            ],
            env=self.environment,
            check=False,
        )
        expect(done.returncode == 0, f"tools/local.py {command} failed")

    def nvr(self, *arguments: str) -> str:
        """What an `nvr` command prints, with the installation's registry and artefacts."""
        settings = {"MLFLOW_TRACKING_URI": self.mlflow_url, "NVR_ROOT": str(self.home / "artifacts")}
        done = subprocess.run(
            [str(REPOSITORY / ".venv" / "bin" / "nvr"), *arguments],
            env=self.environment | settings,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        expect(done.returncode == 0, done.stderr)
        return done.stdout

    def end_runs(self, dag: str) -> None:
        """End what an interrupted story left running: runs take turns, and what they have made is kept."""
        left = self._ask(f"/api/v2/dags/{dag}/dagRuns?state=running&state=queued")["dag_runs"]
        for run in left:
            self._ask(f"/api/v2/dags/{dag}/dagRuns/{quote(run['dag_run_id'])}", {"state": "failed"}, method="PATCH")

    # ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def trigger(self, dag: str, conf: dict[str, Any]) -> str:
        """Start a run; returns its path below the REST interface."""
        run = self._ask(f"/api/v2/dags/{dag}/dagRuns", {"logical_date": None, "conf": conf})
        return f"/api/v2/dags/{dag}/dagRuns/{quote(run['dag_run_id'])}"

    def clear(self, dag: str, run: str, task: str) -> None:
        """Have a task, and all that follows it, done again."""
        body = {
            "dry_run": False,
            "dag_run_id": unquote(run.rpartition("/")[2]),
            "task_ids": [task],
            "include_downstream": True,
            "only_failed": False,
            "reset_dag_runs": True,
        }
        self._ask(f"/api/v2/dags/{dag}/clearTaskInstances", body)

    def wait(self, run: str) -> str:
        """The state in which a run ends."""
        deadline = time.monotonic() + LONGEST_RUN_S
        while time.monotonic() < deadline:
            state = str(self._ask(run)["state"])
            if state not in ("queued", "running"):
                return state
            time.sleep(POLL_S)
        raise WrongOutcomeError(f"{run} still runs after {LONGEST_RUN_S} s")

    def answer(self, run: str, task: str, option: str, reason: str) -> None:
        """Wait for the question of a task and answer it, again if it is asked again.

        Airflow 3.3 forgets an answer that comes before its scheduler has seen that the task waits: within a second or two,
        as no person does. The task is then tried again, and asks again.
        """
        where = f"{self.airflow_url}{run}/taskInstances/{task}/-1/hitlDetails"
        answered = False
        while self._ask(run)["state"] in ("queued", "running"):
            state = self.state(run, task)
            if answered and state in FINISHED:
                return
            if state == "awaiting_input":
                time.sleep(TAKEN_NOTE_S)
                body = {"chosen_options": [option], "params_input": {"reason": reason}}
                answered |= self._request(where, body, "PATCH")[0] == 200
            time.sleep(POLL_S)
        expect(answered, f"{task} asked nobody: {run}")

    def state(self, run: str, task: str) -> str:
        """The state of a task."""
        return str(self._ask(f"{run}/taskInstances/{task}")["state"])

    def xcom(self, run: str, task: str) -> Any:
        """What a task returned."""
        return self._ask(f"{run}/taskInstances/{task}/xcomEntries/return_value")["value"]

    def result(self, run: str, task: str) -> dict[str, Any]:
        """A stage's result."""
        found: dict[str, Any] = self.xcom(run, task)
        return found

    # ── registry and artefacts ───────────────────────────────────────────────────────────────────────────────────

    def alias(self, model: str, alias: str) -> str | None:
        """Number of the version that an alias points to, as MLflow's server says."""
        where = f"{self.mlflow_url}/api/2.0/mlflow/registered-models/alias?name={quote(model)}&alias={alias}"
        status, body = self._request(where)
        return str(body["model_version"]["version"]) if status == 200 else None

    def history(self, recipe: str) -> list[dict[str, Any]]:
        """All moves of the champion."""
        told = self.nvr("history", "--recipe", recipe, "--json")
        return [json.loads(line) for line in told.splitlines() if line.startswith("{")]

    def decision(self, uri: str) -> dict[str, Any]:
        """decision.json."""
        found: dict[str, Any] = json.loads(self.report(uri).with_name("decision.json").read_text(encoding="utf-8"))
        return found

    def report(self, uri: str) -> Path:
        """The report of a decision, as a file."""
        return next(Path(unquote(uri.removeprefix("file://"))).rglob("report.html"))

    # ── REST ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        status, answer = self._request(f"{self.airflow_url}{path}", body, method)
        if status == 401 and path != "/auth/token":  # a token lives for a day, or until a restart
            self._log_in()
            status, answer = self._request(f"{self.airflow_url}{path}", body, method)
        expect(status in (200, 201), f"{method or 'GET'} {path}: {status} {answer}")
        return answer

    def _request(self, url: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self.token}"} if self.token else {}),
        }
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310  our own loopback addresses
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for patience in (5, 15, 60, 0):  # a busy machine answers late
            try:
                with opener.open(request, timeout=60) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode(errors="replace")
            except (urllib.error.URLError, TimeoutError) as error:
                if not patience or data is not None:  # a request that may have been heard is not sent twice
                    raise WrongOutcomeError(f"{url} does not answer: {error}") from None
                time.sleep(patience)
        raise AssertionError


def _ports(home: Path) -> tuple[int, int]:
    """The ports of services that run in this folder, else two that are free."""
    kept = home / "run" / "ports.json"
    if kept.exists():
        airflow, mlflow = json.loads(kept.read_text())
        return int(airflow), int(mlflow)
    probes = [socket.socket() for _ in range(2)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports[0], ports[1]


if __name__ == "__main__":
    sys.exit("this is a part of story.py")
