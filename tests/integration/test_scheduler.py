"""Real services as `make up` starts them, the DAG triggered over REST, the real `nvr` behind it. Airflow environment.

The tests build on each other, in this order: one start of the services pays for all of them.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from deployment import DAG, MODEL, TINY, Deployment

REPOSITORY = Path(__file__).resolve().parents[2]
TASK_BIN = Path(os.environ.get("TEST_TASK_BIN") or REPOSITORY / ".venv" / "bin")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (TASK_BIN / "nvr").exists(), reason="no .venv: make setup")]


class Services(Deployment):
    """A running installation of `make up`."""

    def __init__(self, home: Path, airflow_port: int, mlflow_port: int) -> None:
        self.home, self.airflow_port, self.mlflow_port = home, airflow_port, mlflow_port
        self.airflow, self.mlflow_server = (f"http://127.0.0.1:{port}" for port in (airflow_port, mlflow_port))

    def local(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run tools/local.py as the Makefile does."""
        return subprocess.run(
            [
                sys.executable,
                str(REPOSITORY / "tools" / "local.py"),
                f"--home={self.home}",
                f"--airflow-bin={Path(sys.executable).parent}",
                f"--task-bin={TASK_BIN}",
                f"--airflow-port={self.airflow_port}",
                f"--mlflow-port={self.mlflow_port}",
                *arguments,
            ],
            env={k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "NVR_", "MLFLOW_"))}
            | {"NVR_RETRY_DELAY_S": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    def versions(self) -> list[str]:
        """All registered versions of the model."""
        query = urllib.parse.urlencode({"filter": f"name='{MODEL}'"})
        return sorted(v["version"] for v in self.mlflow(f"model-versions/search?{query}").get("model_versions", []))

    def mlflow_runs(self, run: str) -> list[dict[str, Any]]:
        """The MLflow runs of a DAG run."""
        experiment = self.mlflow("experiments/get-by-name?experiment_name=nv-retriever")["experiment"]
        run_id = urllib.parse.unquote(run.rpartition("/")[2])
        body = {
            "experiment_ids": [experiment["experiment_id"]],
            "filter": f"tags.`nvr.pipeline_run` = '{run_id}'",
        }
        return list(self.mlflow("runs/search", body).get("runs", []))

    def answer(self, run: str, option: str, reason: str, timeout_s: float = 400) -> dict[str, Any]:
        """Wait for the question of task `approve` and answer it, again if it is asked again; returns the question.

        Airflow 3.3 forgets an answer that comes before its scheduler has seen that the task waits: within a second or two,
        as no person does. The task is then tried again, and asks again.
        """
        where, deadline = f"{run}/taskInstances/approve", time.monotonic() + timeout_s
        body = {"chosen_options": [option], "params_input": {"reason": reason}}
        question: dict[str, Any] = {}
        while (state := self.rest(where)[1]["state"]) not in ("success", "failed", "skipped", "upstream_failed"):
            assert time.monotonic() < deadline, f"approve is {state}"
            if state == "awaiting_input":
                time.sleep(3)
                question = self.rest(f"{where}/-1/hitlDetails")[1]
                self.rest(f"{where}/-1/hitlDetails", body, method="PATCH")
            time.sleep(0.5)
        assert state == "success", f"approve is {state}"
        return question

    def history(self) -> list[dict[str, Any]]:
        """What `nvr history` tells."""
        settings = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.mlflow_port}", "NVR_ROOT": f"{self.home}/artifacts"}
        command = [str(TASK_BIN / "nvr"), "history", "--recipe", "demo", "--json"]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def kill_training(self, timeout_s: float = 400) -> None:
        """SIGKILL to `nvr train` as soon as it has a checkpoint."""
        deadline = time.monotonic() + timeout_s
        while not list((self.home / "artifacts").glob("checkpoints/*/*/done.json")):
            assert time.monotonic() < deadline, "training never came to a checkpoint"
            time.sleep(0.02)
        trainers = [p for p in processes_of(self.home) if "train" in p.cmdline() and os.getpgid(p.pid) == p.pid]
        assert len(trainers) == 1, "training ended before it could be killed"
        trainers[0].kill()


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def processes_of(home: Path) -> list[psutil.Process]:
    """Everything that was started for an installation: its environment, command line or folder names it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            named = [
                *process.cmdline(),
                process.cwd(),  # Airflow's workers write their title over their environment
                process.environ().get("AIRFLOW_HOME", ""),
                process.environ().get("NVR_ROOT", ""),
            ]
        except psutil.Error:
            continue
        if any(str(home) in text for text in named):
            found.append(process)
    return found


def title(process: psutil.Process) -> str:
    """What a process calls itself; nothing once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    made = Services(tmp_path_factory.mktemp("services"), *free_ports(2))
    up = made.local("up")
    assert up.returncode == 0, up.stderr
    assert f"http://127.0.0.1:{made.airflow_port}" in up.stdout
    assert f"http://127.0.0.1:{made.mlflow_port}" in up.stdout
    password = json.loads((made.home / "airflow-passwords.json").read_text())["admin"]
    assert password in up.stdout
    made.log_in(password)
    try:
        yield made
    finally:
        made.local("down")
        for process in processes_of(made.home):
            process.kill()


@pytest.fixture(scope="module")
def first_run(services: Services) -> str:
    """Its training is killed half-way and tried again by Airflow: all that follows must be as if nothing had been.

    A person approves its promotion.
    """
    run = services.start(recipe="demo", overrides=[*TINY, "gate.approval=always"])
    services.kill_training()
    question = services.answer(run, "Approve", "the first one")
    assert question["subject"] == f"Promote {MODEL} version 1?"
    assert question["defaults"] == ["Reject"]
    assert "**gain over the untrained base**" in question["body"]
    assert f"[The whole report](http://127.0.0.1:{services.mlflow_port}/#/experiments/" in question["body"]
    state = services.wait(run, 400)
    assert state == "success", "\n".join(services.log(run, t) for t in ("begin", "download", "mine", "train", "gate"))
    return run


def test_only_loopback_is_listened_on(services: Services) -> None:
    listening = {
        c.laddr.ip
        for p in processes_of(services.home)
        for c in p.net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_up_again_changes_nothing(services: Services) -> None:
    before = {p.pid for p in processes_of(services.home) if p.ppid() == 1}
    again = services.local("up")
    assert again.returncode == 0, again.stderr
    assert "everything is running already" in again.stdout
    assert {p.pid for p in processes_of(services.home) if p.ppid() == 1} == before


def test_rest_wants_a_login(services: Services) -> None:
    stranger = Services(services.home, services.airflow_port, services.mlflow_port)
    assert stranger.rest(f"/api/v2/dags/{DAG}")[0] == 401


@pytest.mark.parametrize(
    ("conf", "told"),
    [
        ({"mining_method": "best"}, "'best' is not one of"),
        ({"mining_threshold": 7}, "7 is greater than the maximum of 1"),
        ({"overrides": ["no equals"]}, "'no equals' does not match"),
        ({"promote": "yes"}, "'yes' is not of type 'boolean'"),
    ],
)
def test_a_bad_param_is_answered_400(services: Services, conf: dict[str, Any], told: str) -> None:
    status, body = services.rest(f"/api/v2/dags/{DAG}/dagRuns", {"logical_date": None, "conf": conf})
    assert status == 400
    assert told in body["detail"]


def test_an_unknown_recipe_key_fails_the_first_task_without_a_retry(services: Services) -> None:
    run = services.start(recipe="demo", overrides=["train.step=3"])
    assert services.wait(run, 120) == "failed"
    begin = services.rest(f"{run}/taskInstances/begin")[1]
    assert (begin["state"], begin["try_number"]) == ("failed", 1)
    assert "Did you mean steps?" in services.log(run, "begin")


def test_a_run_succeeds_and_promotes(services: Services, first_run: str) -> None:
    states = {ti["task_id"]: ti["state"] for ti in services.tasks(first_run)}
    assert set(states.values()) == {"success"}, states
    assert not any(result["reused"] for result in services.results(first_run).values())


def test_a_killed_stage_is_tried_again_and_leaves_one_version_and_one_mlflow_run(
    services: Services, first_run: str
) -> None:
    tries = services.tasks(first_run)
    assert {ti["task_id"]: ti["try_number"] for ti in tries if ti["try_number"] > 1} == {"train": 2}
    assert "was ended by SIGKILL" in services.log(first_run, "train")
    assert "resuming from the checkpoint of step" in services.log(first_run, "train", 2), (
        "the second try did not resume"
    )
    assert services.versions() == ["1"]
    [run] = services.mlflow_runs(first_run)
    assert run["info"]["status"] == "FINISHED"


def test_every_task_links_to_the_mlflow_run(services: Services, first_run: str) -> None:
    for task, suffix in (("begin", ""), ("train", ""), ("embed", "?map_index=1")):
        status, body = services.rest(f"{first_run}/taskInstances/{task}/links{suffix}")
        assert status == 200
        assert body["extra_links"]["MLflow run"].startswith(f"http://127.0.0.1:{services.mlflow_port}/#/experiments/")


def test_mining_and_gate_link_to_their_reports(services: Services, first_run: str) -> None:
    for task, report in (("mine", "mining/report.html"), ("gate", "decision/report.html")):
        links = services.rest(f"{first_run}/taskInstances/{task}/links")[1]["extra_links"]
        assert links["Report"].startswith(f"http://127.0.0.1:{services.mlflow_port}/#/experiments/")
        assert urllib.parse.unquote(links["Report"]).endswith(report)
    assert not services.rest(f"{first_run}/taskInstances/train/links")[1]["extra_links"].get("Report")


def test_the_data_set_and_the_champion_are_asset_events(services: Services, first_run: str) -> None:
    run_id = urllib.parse.unquote(first_run.rpartition("/")[2])
    events = services.rest("/api/v2/assets/events")[1]["asset_events"]
    made = {e["name"]: e["extra"] for e in events if e["source_run_id"] == run_id}
    assert set(made) == {"nv-retriever-dataset", "nv-retriever-champion"}
    assert made["nv-retriever-dataset"]["outputs"]["dataset"][0].startswith(f"file://{services.home}/")


def test_the_same_run_again_reuses_everything(services: Services, first_run: str) -> None:
    from nvr_tasks.stages import STAGES

    run = services.start(recipe="demo", overrides=TINY)
    assert services.wait(run, 400) == "success"
    cached = {s.name for s in STAGES if s.cached}
    before = {
        r["stage"] + r.get("part", ""): r["outputs"]
        for r in services.results(first_run).values()
        if r["stage"] in cached
    }
    again = [r for r in services.results(run).values() if r["stage"] in cached]
    assert {r["stage"] for r in again} == cached
    assert all(r["reused"] for r in again), [(r["stage"], r["reused"]) for r in again]
    for result in again:
        # The first run had no champion to score; in this one it is the challenger itself.
        outputs = {role: uris for role, uris in result["outputs"].items() if role != "evaluation_champion"}
        assert outputs == before[result["stage"] + result.get("part", "")]
    assert services.versions() == ["1"]
    [of_mlflow] = services.mlflow_runs(run)
    assert of_mlflow["info"]["status"] == "FINISHED"


def test_what_was_approved_over_rest_is_on_record_with_who_and_why(services: Services, first_run: str) -> None:
    [move] = services.history()
    assert (move["action"], move["champion"], move["who"], move["why"]) == (
        "promote",
        "1",
        "admin",
        "approved: the first one",
    )


def test_the_rollback_dag_moves_the_champion_and_says_who_and_why(services: Services, first_run: str) -> None:
    source = services.mlflow(f"model-versions/get?name={MODEL}&version=1")["model_version"]["source"]
    services.mlflow(
        "model-versions/create", {"name": MODEL, "source": source, "model_id": source.removeprefix("models:/")}
    )
    # Not to `previous`: that never leads back to what was rolled back from.
    for conf, champion in (
        ({"to": "2", "force": True, "reason": "to have something to go back from"}, "2"),
        ({"to": "1", "reason": "worse on short queries"}, "1"),
    ):
        assert services.wait(services.start("nv_retriever_rollback", recipe="demo", **conf), 400) == "success"
        assert services.champion() == champion
    assert [(m["action"], m["source"], m["champion"], m["who"], m["why"]) for m in services.history()[1:]] == [
        ("rollback", "1", "2", "admin", "to have something to go back from (forced)"),
        ("rollback", "2", "1", "admin", "worse on short queries"),
    ]


def test_what_a_killed_scheduler_leaves_is_ended_and_a_new_one_is_waited_for(services: Services) -> None:
    [scheduler] = [p for p in processes_of(services.home) if p.ppid() == 1 and "scheduler" in title(p)]
    workers = [p for p in scheduler.children(recursive=True) if "worker" in title(p)]
    assert workers
    scheduler.kill()
    scheduler.wait(10)
    killed = datetime.datetime.now(datetime.UTC)
    up = services.local("up")
    assert up.returncode == 0, up.stderr
    assert re.search(r"ended \d+ processes that a killed service had left", up.stdout)
    assert not any("worker" in title(w) for w in workers)
    health = services.rest("/api/v2/monitor/health")[1]["scheduler"]
    assert datetime.datetime.fromisoformat(health["latest_scheduler_heartbeat"]) > killed


def test_down_ends_everything_even_in_the_middle_of_a_run(services: Services, first_run: str) -> None:
    run = services.start(
        recipe="demo", overrides=[*TINY, "seed=18", "train.steps=100000", "runtime.checkpoint_every_steps=1000"]
    )
    deadline = time.monotonic() + 200
    while not any("train" in p.cmdline() for p in processes_of(services.home)):
        assert time.monotonic() < deadline, "training never started"
        time.sleep(0.5)
    down = services.local("down")
    assert down.returncode == 0, down.stderr
    assert "stopped" in down.stdout
    assert [p.cmdline() for p in processes_of(services.home)] == []
    for port in (services.airflow_port, services.mlflow_port):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    # The cut-off task was reported before the api-server went: the run goes on with the next `make up`.
    with contextlib.closing(sqlite3.connect(services.home / "airflow" / "airflow.db")) as database:
        of_run = (urllib.parse.unquote(run.rpartition("/")[2]),)
        [state] = database.execute("SELECT state FROM task_instance WHERE task_id = 'train' AND run_id = ?", of_run)
    assert state == ("up_for_retry",)
