"""The kubernetes runner on a real cluster: results, logs, stops, leftovers and faults. Airflow environment.

The triggerer's part is played by the trigger itself, run here to its first event.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "dags"), str(HERE.parents[1] / "tools")]

import containers  # noqa: E402
from airflow.sdk.bases.operator import ExecutorSafeguard  # noqa: E402
from airflow.sdk.exceptions import (  # noqa: E402
    AirflowException,
    AirflowFailException,
    AirflowSkipException,
    TaskDeferred,
)
from kubectl import PULL, apply, get, kubectl  # noqa: E402
from task_instance import TaskInstance  # noqa: E402

from nvr_airflow.kubernetes import KubernetesStageOperator  # noqa: E402
from nvr_airflow.settings import KubernetesSettings  # noqa: E402
from nvr_tasks.stages import Resources  # noqa: E402

IMAGE = os.environ.get("NVR_TEST_STAGE_IMAGE", "nvr-test-stage:dev")
SMALL = Resources(cpu=0.1, memory_gb=0.25)
PATIENCE = float(os.environ.get("NVR_TEST_PATIENCE", "1"))


@pytest.fixture(scope="module", autouse=True)
def image() -> None:
    """Built on this machine's engine, which the node shares, unless an image that the cluster can pull is named."""
    if "NVR_TEST_STAGE_IMAGE" not in os.environ:
        folder = HERE.parent / "containers"
        command = [
            *containers.docker(),
            "build",
            "--quiet",
            f"--file={folder / 'nvr.Dockerfile'}",
            f"--tag={IMAGE}",
            str(folder),
        ]
        subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """One for these tests; Pod Security "restricted" is enforced where the cluster knows it."""
    name = f"nvr-runner-{uuid.uuid4().hex[:6]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    _until(lambda: get("serviceaccount", "default", f"--namespace={name}"))
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


class Tried(TaskInstance):
    """A task instance that knows its DAG and its try."""

    dag_id, task_id = "nv_retriever_retrain", "download"

    def __init__(self, try_number: int = 1) -> None:
        super().__init__()
        self.try_number = try_number
        self.start_date = datetime.datetime.now(tz=datetime.UTC)


class Stage:
    """A task whose `nvr` does what a test tells it to, and its pods."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.run = f"test__{uuid.uuid4().hex[:8]}"
        self.body = f"body-{uuid.uuid4().hex[:8]}"
        self.settings: dict[str, str] = {}
        self.more: dict[str, Any] = {}
        self.wants = SMALL

    def operator(self) -> KubernetesStageOperator:
        environ = {
            "NVR_IMAGE": IMAGE,
            "NVR_K8S_PULL_POLICY": PULL,
            "NVR_K8S_NAMESPACE": self.namespace,
            "NVR_K8S_SCRATCH_GB": "0.1",
            "NVR_K8S_SHM_GB": "0.01",
            "NVR_K8S_LOG_INTERVAL_S": "1",
            "NVR_K8S_START_TIMEOUT_S": "60",
            "NVR_K8S_ENV_FROM": f"configmap/{self.body}",
            **self.settings,
        }
        settings = KubernetesSettings.from_env(environ)
        return KubernetesStageOperator(
            task_id="download",
            command="download",
            root="/r",
            kubernetes=settings,
            wants=self.wants,
            kill_grace_s=2,
            **self.more,
        )

    def start(self, body: str, ti: Tried | None = None) -> tuple[Any, dict[str, Any]]:
        """Ask for the pod; returns the trigger that watches it, and the context."""
        context = self.context_of(body, ti)
        task = self.operator()
        task.short_s = 0
        try:
            self.begin(task, context)
        except TaskDeferred as deferred:
            return deferred.trigger, context
        raise AssertionError("the task did not wait for its pod")

    def context_of(self, body: str, ti: Tried | None) -> dict[str, Any]:
        about = {"name": self.body, "namespace": self.namespace}
        apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": {"NVR_TEST_BODY": body}})
        return {"run_id": self.run, "params": {}, "ti": ti or Tried(), "outlet_events": {}, "dag": None}

    def begin(self, task: KubernetesStageOperator, context: dict[str, Any]) -> Any:
        return task.execute(context, **{f"{type(task).__name__}__sentinel": ExecutorSafeguard.sentinel_value})

    def end(self, trigger: Any, context: dict[str, Any]) -> Any:
        """What the task makes of the trigger's event, in a process that has forgotten the first part."""

        async def first() -> Any:
            async for event in trigger.run():
                return event.payload
            raise AssertionError("no event")

        return self.operator().trigger_reentry(context, asyncio.run(first()))

    def execute(self, body: str, ti: Tried | None = None) -> Any:
        context = self.context_of(body, ti)
        try:
            return self.begin(self.operator(), context)
        except TaskDeferred as deferred:
            return self.end(deferred.trigger, context)

    def pods(self) -> list[dict[str, Any]]:
        return list(get("pods", f"--namespace={self.namespace}", f"--selector=run_id={self.run}").get("items", []))

    def running(self) -> dict[str, Any]:
        """Its pod, once the stage is at work."""
        return dict(_until(lambda: [p for p in self.pods() if p["status"]["phase"] == "Running"])[0])


@pytest.fixture
def stage(namespace: str) -> Iterator[Stage]:
    made = Stage(namespace)
    yield made
    left = [p["metadata"]["name"] for p in made.pods() if "deletionTimestamp" not in p["metadata"]]
    assert left == [], "a pod was left behind"


def _until(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s * PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)
    return found


def test_a_result_arrives_by_the_sidecar(stage: Stage) -> None:
    assert stage.execute("result(figures={'n': 3})")["figures"] == {"n": 3}


def test_a_short_stage_needs_no_triggerer(stage: Stage) -> None:
    """Its trigger would fire before the scheduler has heard that the worker is done, which costs a try."""
    context = stage.context_of("time.sleep(3); result(figures={'n': 3})", None)
    assert stage.begin(stage.operator(), context)["figures"] == {"n": 3}


def test_a_log_is_shown_while_the_stage_runs(stage: Stage, capfd: pytest.CaptureFixture[str]) -> None:
    body = "tell('[download] start'); print('noise', flush=True); time.sleep(15); tell('[download] end'); result()"
    stage.end(*stage.start(body))
    told = capfd.readouterr().out.splitlines()
    when = {
        word: datetime.datetime.fromisoformat(line.split()[0])
        for line in told
        for word in ("start", "end", "noise")
        if line.rstrip().endswith(word) or f"[download] {word} " in line or f" {word} " in line
    }
    assert (when["end"] - when["start"]).total_seconds() > 5, "the log came only at the end"
    assert "noise" in when
    assert sum("[download] end" in line for line in told) == 1
    assert not any("NVR_RESULT" in line for line in told)


def test_a_stage_has_no_privileges_and_only_its_environment(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of the worker")
    body = """
def fails(path):
    try:
        open(path, "w").close()
    except OSError as error:
        return error.strerror
for path in ("/scratch/fine", "/tmp/fine", "/dev/shm/fine"):
    open(path, "w").close()
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
result(figures={"uid": os.getuid(), "root": fails("/etc/x"), "caps": status["CapBnd"].strip(), "nnp": status["NoNewPrivs"].strip(),
    "token": os.path.exists("/var/run/secrets/kubernetes.io"), "aws": os.environ.get("AWS_SECRET_ACCESS_KEY")})
"""
    figures = stage.execute(body)["figures"]
    assert figures == {
        "uid": 10001,
        "root": "Read-only file system",
        "caps": "0" * 16,
        "nnp": "1",
        "token": False,
        "aws": None,
    }


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("tell('nvr: unknown key'); sys.exit(2)", AirflowFailException, "refused .*: nvr: unknown key"),
        ("tell('x'); tell('nvr: no route'); sys.exit(1)", AirflowException, "exit status 1: nvr: no route"),
        ("print('fine')", AirflowException, "printed no line .* is NVR_IMAGE of this"),
        ("x = bytearray(2 << 30)", AirflowException, "(?s)SIGKILL.* went over its 0.25 GiB of memory"),
    ],
)  # fmt: skip
def test_a_failure_says_what_happened(stage: Stage, body: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        stage.execute(body)
    assert isinstance(caught.value, AirflowFailException) == (error is AirflowFailException)


def test_a_hold_is_a_skip(stage: Stage) -> None:
    ti = Tried()
    with pytest.raises(AirflowSkipException, match=r"verdict: hold"):
        stage.execute("result(skipped='verdict: hold'); sys.exit(99)", ti)
    assert ti.pushed["return_value"]["skipped"] == "verdict: hold"


def test_a_pod_that_is_deleted_is_tried_again(stage: Stage) -> None:
    def delete() -> None:
        kubectl(
            "delete",
            "pod",
            stage.running()["metadata"]["name"],
            f"--namespace={stage.namespace}",
            "--grace-period=0",
            "--force",
        )

    trigger, context = stage.start("tell('up'); time.sleep(600)")
    threading.Thread(target=delete).start()
    with pytest.raises(AirflowException, match=r"(?s)was deleted, or lost with its node|was ended by") as caught:
        stage.end(trigger, context)
    assert not isinstance(caught.value, AirflowFailException)
    assert stage.execute("result()", Tried(2))["outputs"]


def test_a_pod_that_outlives_its_worker_is_found_again(stage: Stage) -> None:
    stage.start("tell('up'); time.sleep(12); result(figures={'pid': os.getpid()})")
    before = stage.running()["metadata"]["uid"]
    trigger, context = stage.start("sys.exit('a second pod')", Tried(2))
    assert [p["metadata"]["uid"] for p in stage.pods()] == [before]
    assert stage.end(trigger, context)["figures"]["pid"]


def test_a_stop_takes_the_pod_down(stage: Stage) -> None:
    trigger, _ = stage.start("tell('up'); time.sleep(600)")
    stage.running()
    asyncio.run(trigger.on_kill())
    _until(lambda: not stage.pods(), 40)


def test_a_timeout_leaves_no_pod(stage: Stage) -> None:
    stage.more = {"execution_timeout": datetime.timedelta(seconds=8)}
    with pytest.raises(AirflowException, match=r"did not come to its end: .*execution_timeout"):
        stage.execute("time.sleep(600)")


def test_scratch_that_is_full_evicts_the_pod(stage: Stage) -> None:
    """Its size is a promise of the node, which looks every few seconds."""
    body = "f = open('/scratch/x', 'wb')\nfor _ in range(300): f.write(bytes(1 << 20))\nf.flush(); time.sleep(300)"
    with pytest.raises(AirflowException, match=r"was evicted from its node: .*scratch"):
        stage.execute(body)


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_image(stage: Stage) -> None:
    stage.settings = {"NVR_IMAGE": "nvr-none:1", "NVR_K8S_PULL_POLICY": "Never"}
    with pytest.raises(AirflowFailException, match=r"the node cannot have image nvr-none:1 .*NVR_IMAGE"):
        stage.execute("")


def test_a_registry_that_refuses(stage: Stage) -> None:
    stage.settings = {"NVR_IMAGE": "127.0.0.1:9/nvr-tasks:1", "NVR_K8S_PULL_POLICY": "Always"}
    with pytest.raises(
        AirflowException, match=r"cannot have image 127.0.0.1:9/nvr-tasks:1 .*imagePullSecrets"
    ) as caught:
        stage.execute("")
    assert not isinstance(caught.value, AirflowFailException)


def test_a_gpu_where_there_is_none(stage: Stage) -> None:
    stage.wants = Resources(cpu=0.1, memory_gb=0.25, gpu=8)
    assert stage.execute("result()"), "without NVR_GPU_IMAGE a stage runs on the CPU"
    stage.run += "gpu"
    stage.settings = {
        "NVR_GPU_IMAGE": IMAGE,
        "NVR_K8S_GPU_RESOURCE": "example.com/none",
        "NVR_K8S_START_TIMEOUT_S": "8",
    }
    with pytest.raises(
        AirflowException,
        match=r"no node can take nvr download .*8 GPU.*Insufficient example.com/none.*unset NVR_GPU_IMAGE",
    ):
        stage.execute("result()")


def test_a_secret_that_is_not_there(stage: Stage) -> None:
    stage.settings = {"NVR_K8S_ENV_FROM": "secret/absent", "NVR_K8S_START_TIMEOUT_S": "15"}
    with pytest.raises(AirflowException, match=r'did not come to its end: .*secret "absent" not found'):
        stage.execute("result()")


def test_a_namespace_that_is_absent(stage: Stage) -> None:
    stage.settings = {"NVR_K8S_NAMESPACE": "nvr-absent"}
    with pytest.raises(AirflowFailException, match=r"Kubernetes refused the pod .*namespace nvr-absent: .*not found"):
        stage.start("result()")


def test_a_namespace_that_is_forbidden(stage: Stage, tmp_path: Path) -> None:
    """As a service account without rights."""
    config = _config()
    config["users"][0]["user"] = {"token": kubectl("create", "token", "default", f"--namespace={stage.namespace}")}
    stage.more = {"config_file": _written(config, tmp_path)}
    with pytest.raises(AirflowFailException, match=r"may not start pods in namespace .*forbidden.*tasks.namespace"):
        stage.start("result()")


def test_an_api_server_that_does_not_answer(stage: Stage, tmp_path: Path) -> None:
    config = _config()
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    stage.more = {"config_file": _written(config, tmp_path)}
    with pytest.raises(AirflowException, match=r"cannot reach the Kubernetes API server"):
        stage.start("result()")


def _config() -> dict[str, Any]:
    return dict(json.loads(kubectl("config", "view", "--raw", "--minify", "--output=json")))


def _written(config: dict[str, Any], folder: Path) -> str:
    file = folder / "config"
    file.write_text(json.dumps(config))
    return str(file)
