"""The whole workflow in containers: compose up, the DAG over REST, a stage killed, down and up again. Task environment.

The tests build on each other, in this order: one start of the services pays for all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))

import containers  # noqa: E402
from deployment import LONG, MODEL, SLOW, STAGES, TINY, Deployment, docker, fingerprints, stand_in_image, until  # noqa: E402

PROJECT = f"nvrtest{os.getpid()}"
PORTS = dict.fromkeys(("AIRFLOW_PORT", "MLFLOW_PORT", "S3_PORT"), 0)  # free ones, once the services are to start
pytestmark = pytest.mark.timeout(0)  # every wait below has a limit of its own


@dataclass
class Services(Deployment):
    """The running project."""

    env_file: Path
    settings: dict[str, str] = field(default_factory=dict)

    def tool(self, *words: str) -> subprocess.CompletedProcess[str]:
        """tools/containers.py, as the Makefile calls it."""
        command = [sys.executable, str(REPOSITORY / "tools" / "containers.py")]
        command += [f"--project={PROJECT}", f"--env-file={self.env_file}", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def up(self) -> None:
        started = self.tool("up", "--no-build", f"--timeout={int(300 * SLOW)}")
        if started.returncode:
            logs = {
                name: docker("logs", "--tail=30", f"{PROJECT}-{name}-1", check=False)
                for name in ("postgres", "s3", "mlflow", "airflow-init", "airflow-api-server")
            }
            raise AssertionError(f"{started.stdout}{started.stderr}\n{json.dumps(logs, indent=1)}")
        self.settings = containers.environment_file(self.env_file)
        self.airflow = f"http://127.0.0.1:{PORTS['AIRFLOW_PORT']}"
        self.mlflow_server = f"http://127.0.0.1:{PORTS['MLFLOW_PORT']}"
        self.log_in(self.settings["AIRFLOW_ADMIN_PASSWORD"])


def stage_containers(stage: str, everything: bool = False) -> list[str]:
    """Ids of the containers of a stage, of this project's network only."""
    options = ["--all"] if everything else []
    return docker(
        "ps", "--quiet", *options, "--filter", f"label=nvr.stage={stage}", "--filter", f"network={PROJECT}"
    ).split()


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    made = Services(tmp_path_factory.mktemp("compose") / ".env")
    containers.environment_file(made.env_file)
    with contextlib.ExitStack() as stack:
        for name in PORTS:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            PORTS[name] = probe.getsockname()[1]
    with made.env_file.open("a") as file:
        file.write("".join(f"{name}={port}\n" for name, port in PORTS.items()))
        file.write("NVR_RETRY_DELAY_S=2\nNVR_PULL_POLICY=never\n")
        for name, stand_in in {"NVR_POSTGRES_IMAGE": "postgres", "NVR_S3_IMAGE": "s3"}.items():
            file.write(f"{name}={os.environ.get(name) or stand_in_image(stand_in)}\n")
    try:
        made.up()
        yield made
    finally:
        if os.environ.get("NVR_TEST_KEEP") != "1":
            made.tool("down", "--volumes")
            for left in docker("ps", "--all", "--quiet", "--filter", f"network={PROJECT}").split():
                docker("rm", "--force", "--volumes", left, check=False)


@dataclass
class Ran:
    """A run of the DAG and the containers that the engine started for it."""

    run: str
    started: list[tuple[str, str]]  # stage, container


@pytest.fixture(scope="module")
def first(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Its training is killed half-way and tried again by Airflow: all that follows must be as if nothing had been."""
    events = tmp_path_factory.mktemp("events") / "started"
    command = [*containers.docker(), "events", "--filter=event=start", "--filter=label=nvr.stage"]
    command.append('--format={{index .Actor.Attributes "nvr.stage"}} {{.ID}} {{index .Actor.Attributes "nvr.run"}}')
    # Listened to from the start: the engine remembers 256 events, and health checks make many.
    with events.open("wb") as out, subprocess.Popen(command, stdout=out) as listening:
        try:
            run = _killed_run(services)
        finally:
            listening.terminate()
    run_id = urllib.parse.unquote(run.rpartition("/")[2])
    lines = [line.split() for line in events.read_text().splitlines()]
    return Ran(run, [(stage, one) for stage, one, of in lines if of == run_id])


def _killed_run(services: Services) -> str:
    run = services.trigger()

    def training() -> str:
        if services.rest(run)[1]["state"] == "failed":
            raise AssertionError(services.failure(run))
        for one in stage_containers("train"):
            # Its log, as Airflow shows it while the stage runs, not after.
            if re.search(r"step \d+|loss", services.log(run, "train")):
                return one
        return ""

    docker("kill", str(until(training, "training shows its progress in Airflow", 600)))
    state = services.wait(run)
    assert state == "success", services.failure(run)
    return run


def test_everything_is_healthy_and_on_loopback(services: Services) -> None:
    for one in docker("ps", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}").split():
        state = json.loads(docker("inspect", one))[0]
        assert state["State"]["Health"]["Status"] == "healthy", state["Name"]
        for bindings in (state["NetworkSettings"]["Ports"] or {}).values():
            assert {b["HostIp"] for b in bindings or []} <= {"127.0.0.1"}


def test_a_run_ends_in_promotion(services: Services, first: Ran) -> None:
    results = services.results(first.run)
    assert results["gate[-1]"]["figures"]["verdict"] == "promote"
    assert services.champion() == "1"


def test_every_stage_has_a_container_of_its_own_and_leaves_none(services: Services, first: Ran) -> None:
    ids = [one for _, one in first.started]
    assert len(ids) == len(set(ids))
    tries = sum(
        t["try_number"]
        for t in services.tasks(first.run)
        if not t["task_id"].endswith(("_blocks", "_tasks", "approve"))
    )  # those run no command
    assert len(ids) == tries
    assert {stage for stage, _ in first.started} == {"begin", "finish", *STAGES}
    assert not [one for stage, _ in first.started for one in stage_containers(stage, everything=True)]


def test_a_killed_container_is_tried_again_and_resumes(services: Services, first: Ran) -> None:
    assert {t["task_id"]: t["try_number"] for t in services.tasks(first.run) if t["try_number"] > 1} == {"train": 2}
    assert "was ended by SIGKILL" in services.log(first.run, "train")
    assert "resuming from the checkpoint" in services.log(first.run, "train", 2)


def test_artefacts_are_those_of_the_process_runner(services: Services, first: Ran, tmp_path: Path) -> None:
    """The same DAG file and recipe with processes, on a folder instead of S3."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "NVR_", "MLFLOW_", "AWS_"))}
    python = REPOSITORY / ".venv-airflow" / "bin" / "python"
    command = [
        str(python),
        str(REPOSITORY / "tools" / "local.py"),
        f"--home={tmp_path}",
        f"--airflow-bin={python.parent}",
    ]
    command += [f"--task-bin={Path(sys.executable).parent}", "demo", "--recipe=demo", *(f"--set={o}" for o in TINY)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [begun] = (tmp_path / "artifacts" / "runs").glob("*/begin.json")
    records = {
        p.stem: json.loads(p.read_text()) for p in begun.parent.glob("*.json") if p.stem.partition("-")[0] in STAGES
    }
    in_containers = services.results(first.run)
    assert fingerprints(in_containers) == fingerprints(records)
    # The killed and resumed training in a container made the very bytes that an undisturbed process makes.
    [model] = records["train"]["outputs"]["model"]
    local = json.loads((tmp_path / "artifacts" / model.split("/artifacts/")[1] / "manifest.json").read_text())
    remote = json.loads(
        s3(services)
        .get_object(Bucket="nvr", Key=_key(in_containers["train[-1]"]["outputs"]["model"][0]) + "/manifest.json")[
            "Body"
        ]
        .read()
    )
    assert remote["stats"]["digest"] == local["stats"]["digest"]
    assert in_containers["evaluate[-1]"]["figures"] == records["evaluate"]["figures"]


def s3(services: Services) -> Any:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{PORTS['S3_PORT']}",
        aws_access_key_id=services.settings["S3_ACCESS_KEY"],
        aws_secret_access_key=services.settings["S3_SECRET_KEY"],
        region_name="us-east-1",
    )


def _key(uri: str) -> str:
    return uri.removeprefix("s3://nvr/")


def test_artefacts_lie_in_the_store_and_it_wants_credentials(services: Services, first: Ran) -> None:
    import boto3
    from botocore.exceptions import ClientError

    client = s3(services)
    for result in services.results(first.run).values():
        for uris in result["outputs"].values():
            for uri in uris:
                assert client.head_object(Bucket="nvr", Key=f"{_key(uri)}/manifest.json")["ContentLength"] > 0
    assert client.list_objects_v2(Bucket="mlflow")["KeyCount"] > 0, "MLflow keeps its files there, too"
    stranger = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{PORTS['S3_PORT']}",
        aws_access_key_id="x",
        aws_secret_access_key="y",
        region_name="us-east-1",
    )
    with pytest.raises(ClientError):
        stranger.list_objects_v2(Bucket="nvr")


def test_mlflow_and_airflow_keep_their_records_in_postgresql(services: Services, first: Ran) -> None:
    def rows(database: str, query: str) -> str:
        return docker(
            "exec",
            f"{PROJECT}-postgres-1",
            "psql",
            "--username=postgres",
            "--tuples-only",
            "--no-align",
            database,
            f"--command={query}",
        )

    assert rows("mlflow", "select name, version from model_versions") == f"{MODEL}|1"
    assert rows("airflow", "select state from dag_run") == "success"


def test_no_secret_is_shown(services: Services, first: Ran) -> None:
    secrets = [value for key, value in services.settings.items() if key.endswith(("_KEY", "_PASSWORD", "_SECRET"))]
    shown = [
        services.log(first.run, t["task_id"], n, t["map_index"])
        for t in services.tasks(first.run)
        for n in range(1, t["try_number"] + 1)
    ]
    shown += [json.dumps(t) for t in services.tasks(first.run)] + [json.dumps(services.results(first.run))]
    client = s3(services)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="nvr"):
        for item in page["Contents"]:
            if item["Key"].endswith((".json", ".yaml", ".html")):
                shown.append(client.get_object(Bucket="nvr", Key=item["Key"])["Body"].read().decode("utf-8", "replace"))
    for secret in secrets:
        assert not any(secret in text for text in shown)


def test_a_stopped_task_stops_its_container(services: Services, first: Ran) -> None:
    run = services.trigger(*LONG)
    until(lambda: stage_containers("train"), "training starts", 400)
    until(lambda: "start" in services.log(run, "train"), "training has begun")
    status, body = services.rest(f"{run}/taskInstances/train", {"new_state": "failed"}, method="PATCH")
    assert status == 200, body
    until(lambda: not stage_containers("train", everything=True), "the container of a stopped task is gone", 90)
    services.wait(run, 300)


def test_a_hold_skips_the_promotion(services: Services, first: Ran) -> None:
    run = services.trigger("gate.min_gain_over_base=0.99", "seed=19")
    assert services.wait(run) == "success", services.failure(run)
    assert {t["task_id"]: t["state"] for t in services.tasks(run)}["promote"] == "skipped"
    assert services.champion() == "1"


def test_mlflow_away_for_half_a_minute_is_waited_for(services: Services, first: Ran) -> None:
    """Killed when a run begins, started again half a minute later: the run succeeds, by patience or by a retry."""
    docker("stop", "--time=5", f"{PROJECT}-mlflow-1")
    run = services.trigger()
    until(lambda: stage_containers("begin"), "begin starts", 200)
    time.sleep(30)
    docker("start", f"{PROJECT}-mlflow-1")
    assert services.wait(run) == "success", services.failure(run)
    assert services.champion() == "1"


def test_a_store_out_of_reach_is_said(services: Services, first: Ran) -> None:
    docker("stop", "--time=5", f"{PROJECT}-s3-1")
    try:
        run = services.trigger()
        told = until(
            lambda: (text := services.log(run, "begin")) and "S3" in text and text, "begin says what is wrong", 300
        )
        assert re.search(
            r"nvr: (cannot reach the S3 endpoint http://s3:8333 .*is it up|S3 at http://s3:8333 failed)", told
        ), told
    finally:
        docker("start", f"{PROJECT}-s3-1")
    assert services.wait(run) == "success", services.failure(run)  # tried again


def test_a_full_scratch_disk_is_said(services: Services) -> None:
    """A stage with a scratch volume of 200 KiB, started as the runner starts it."""
    volume = f"{PROJECT}-small"
    docker("volume", "create", "--opt=type=tmpfs", "--opt=device=tmpfs", "--opt=o=size=200k,mode=1777", volume)
    try:
        done = subprocess.run(
            [*containers.docker(), "run", "--rm", "--read-only", "--tmpfs=/tmp", f"--network={PROJECT}", f"--volume={volume}:/scratch",
             "--env=AWS_ENDPOINT_URL=http://s3:8333", f"--env=AWS_ACCESS_KEY_ID={services.settings['S3_ACCESS_KEY']}",
             f"--env=AWS_SECRET_ACCESS_KEY={services.settings['S3_SECRET_KEY']}", "--env=AWS_DEFAULT_REGION=us-east-1",
             "nvr-tasks:dev", "download", "--root=s3://nvr/other", "--recipe=demo"],
            capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 1
        assert "nvr: no disk space left" in done.stderr, done.stderr
        assert "NVR_SCRATCH" in done.stderr
    finally:
        docker("volume", "rm", volume)


def test_down_and_up_again_keeps_champion_and_history(services: Services, first: Ran) -> None:
    down = services.tool("down")
    assert down.returncode == 0, down.stderr
    assert docker("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}") == ""
    services.up()
    assert services.champion() == "1"
    assert services.rest(first.run)[1]["state"] == "success"
    assert "resuming from the checkpoint" in services.log(first.run, "train", 2), "logs are kept, too"
    run = services.trigger()
    assert services.wait(run) == "success", services.failure(run)
    again = services.results(run)
    assert all(
        again[f"{name}[{index}]"]["reused"]
        for name, index in (("download", -1), ("embed", 0), ("mine", -1), ("train", -1))
    )
