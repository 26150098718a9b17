"""The chart on a real cluster: install, the DAG in pods, a pod deleted, upgrade, rollback, uninstall. Task environment.

The tests build on each other, in this order. Images lie on the node (or NVR_TEST_PULL=IfNotPresent and values that name a
registry, in the file NVR_TEST_VALUES). Where the cluster has no default storage class, volumes are folders of the node;
where it has no DNS, names are told by hostAliases.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from deployment import LONG, SLOW, STAGES, Deployment, docker, stand_in_image, until
from kubectl import KUBECTL, PULL, apply, get, kubectl

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "helm" / "nvr"
HELM = os.environ.get("HELM") or shutil.which("helm") or "helm"
NAMESPACE = f"nvr-chart-{os.getpid()}"
RELEASE = "nvr"
SERVICES = ("airflow-api-server", "mlflow", "postgresql", "s3")
CLAIMS = {"data-nvr-postgresql-0", "data-nvr-s3-0", "nvr-logs"}  # what README says is left behind
pytestmark = pytest.mark.timeout(0)  # every wait below has a limit of its own


def helm(*words: str, timeout_s: float = 600) -> str:
    command = [HELM, *words, f"--namespace={NAMESPACE}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s * SLOW)
    assert done.returncode == 0, f"helm {' '.join(words)}: {done.stdout}{done.stderr}\n{trouble()}"
    return done.stdout


def trouble() -> str:
    """What pods that are not ready say."""
    told = [kubectl("get", "pods,pvc", f"--namespace={NAMESPACE}", "--output=wide", check=False)]
    for pod in get("pods", f"--namespace={NAMESPACE}").get("items", []):
        statuses = [*pod["status"].get("initContainerStatuses", []), *pod["status"].get("containerStatuses", [])]
        for one in statuses:
            if not one["ready"] and "completed" not in json.dumps(one["state"]).lower():
                name = pod["metadata"]["name"]
                told.append(f"{name}/{one['name']}: {one['state']}")
                log = ["logs", name, f"--container={one['name']}", f"--namespace={NAMESPACE}", "--tail=25"]
                told.append(kubectl(*log, check=False))
    return "\n".join(told)


class Release(Deployment):
    """The installed chart."""

    def __init__(self, values: Path) -> None:
        self.values = values
        self.forwards: list[subprocess.Popen[bytes]] = []

    def change(self, verb: str, *more: str) -> None:
        """`helm install` or `helm upgrade`, until all is ready."""
        values = [f"--values={CHART / 'examples' / 'trial.yaml'}", f"--values={self.values}"]
        extra = os.environ.get("NVR_TEST_VALUES")
        values += [f"--values={extra}"] if extra else []
        words = [verb, RELEASE, str(CHART), *values, *more, "--wait", f"--timeout={int(420 * SLOW)}s"]
        # The cluster may be older than what server-side apply wants.
        helm(*words, "--server-side=false", timeout_s=500)

    def connect(self) -> None:
        """Ports on loopback for both servers, and a session."""
        self.disconnect()
        self.airflow = self._forward("airflow-api-server", 8080)
        self.mlflow_server = self._forward("mlflow", 5000)
        secret = get("secret", "nvr-airflow", f"--namespace={NAMESPACE}")["data"]["admin-password"]
        until(lambda: self._answers(base64.b64decode(secret).decode()), "Airflow answers", 60)

    def _answers(self, password: str) -> bool:
        try:
            self.log_in(password)
        except (OSError, AssertionError):
            return False
        return True

    def _forward(self, service: str, port: int) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            free = probe.getsockname()[1]
        command = [
            KUBECTL,
            "port-forward",
            f"service/{RELEASE}-{service}",
            f"{free}:{port}",
            f"--namespace={NAMESPACE}",
        ]
        self.forwards.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

        def open_port() -> bool:
            with socket.socket() as one:
                return one.connect_ex(("127.0.0.1", free)) == 0

        until(open_port, f"port of {service}", 30)
        return f"http://127.0.0.1:{free}"

    def disconnect(self) -> None:
        for forward in self.forwards:
            forward.terminate()
            forward.wait()
        self.forwards = []


def stage_pods(stage: str) -> list[dict[str, Any]]:
    selector = f"--selector=app.kubernetes.io/component=stage-{stage}"
    found = get("pods", f"--namespace={NAMESPACE}", selector).get("items", [])
    return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]


def volumes(folder: Path) -> list[dict[str, Any]]:
    """A folder of the node for each claim, where the cluster makes none by itself."""
    made = []
    for claim in sorted(CLAIMS):
        path = folder / claim
        path.mkdir()
        path.chmod(0o777)
        made.append(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"{NAMESPACE}-{claim}"},
                "spec": {
                    "capacity": {"storage": "20Gi"},
                    "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
                    "persistentVolumeReclaimPolicy": "Retain",
                    "claimRef": {"namespace": NAMESPACE, "name": claim},
                    "hostPath": {"path": str(path)},
                },
            }
        )
    return made


def addresses() -> dict[str, str]:
    """Free cluster addresses for the services, found by asking for some."""
    found = {}
    for service in SERVICES:
        kubectl("create", "service", "clusterip", f"probe-{service}", "--tcp=1", f"--namespace={NAMESPACE}")
        found[service] = get("service", f"probe-{service}", f"--namespace={NAMESPACE}")["spec"]["clusterIP"]
    for service in SERVICES:
        kubectl("delete", "service", f"probe-{service}", f"--namespace={NAMESPACE}")
    return found


def values(folder: Path) -> Path:
    """What this cluster needs on top of examples/trial.yaml."""
    made: dict[str, Any] = {"image": {"pullPolicy": PULL}, "dags": {"retryDelayS": 2}, "tasks": {"logIntervalS": 2}}
    for name in ("airflow", "mlflow", "tasks"):
        made.setdefault(name, {})["image"] = {"tag": os.environ.get("NVR_TEST_TAG", "dev")}
    if "NVR_TEST_VALUES" not in os.environ:
        for name, key in (("postgresql", "postgres"), ("s3", "s3")):
            repository, _, tag = stand_in_image(key).partition(":")
            made[name] = {"image": {"registry": "", "repository": repository, "tag": tag}}
        user = docker("run", "--rm", "--user=0", "--entrypoint=id", stand_in_image("postgres"), "-u", "postgres")
        group = docker("run", "--rm", "--user=0", "--entrypoint=id", stand_in_image("postgres"), "-g", "postgres")
        made["postgresql"] |= {"runAsUser": int(user), "runAsGroup": int(group)}
    if not get("service", "kube-dns", "--namespace=kube-system"):
        fixed = addresses()
        made["hostAliases"] = [{"ip": ip, "hostnames": [f"{RELEASE}-{name}"]} for name, ip in fixed.items()]
        for name, ip in fixed.items():
            if name == "airflow-api-server":
                made["airflow"]["apiServer"] = {"service": {"clusterIP": ip}}
            else:
                made.setdefault(name, {})["service"] = {"clusterIP": ip}
    file = folder / "values.json"
    file.write_text(json.dumps(made, indent=1))
    return file


OURS = "nvr-test"


def api_for_pods() -> subprocess.Popen[bytes] | None:
    """A way from pods to the API server, where it listens on loopback alone and its Service has nothing behind it."""
    found = get("endpoints", "kubernetes", "--namespace=default")
    if found.get("subsets") and OURS not in found["metadata"].get("labels", {}):  # ours is of a run that was killed
        return None
    [config] = json.loads(kubectl("config", "view", "--raw", "--minify", "--output=json"))["clusters"]
    server = urllib.parse.urlsplit(config["cluster"]["server"])
    [node, *_] = [a["address"] for a in get("nodes")["items"][0]["status"]["addresses"] if a["type"] == "InternalIP"]
    with socket.socket() as probe:
        probe.bind((node, 0))
        port = probe.getsockname()[1]
    listen = f"TCP-LISTEN:{port},bind={node},fork,reuseaddr"
    forward = subprocess.Popen(["socat", listen, f"TCP:{server.hostname}:{server.port}"])
    subset = {"addresses": [{"ip": node}], "ports": [{"name": "https", "port": port, "protocol": "TCP"}]}
    about = {"name": "kubernetes", "namespace": "default", "labels": {OURS: "forward"}}
    apply({"apiVersion": "v1", "kind": "Endpoints", "metadata": about, "subsets": [subset]})
    return forward


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    folder = tmp_path_factory.mktemp("chart")
    folder.chmod(0o755)
    kubectl("create", "namespace", NAMESPACE)
    classes = get("storageclass").get("items", [])
    default = "storageclass.kubernetes.io/is-default-class"
    made = [] if any(default in c["metadata"].get("annotations", {}) for c in classes) else volumes(folder)
    api = api_for_pods()
    try:
        if made:
            apply(*made)
        installed = Release(values(folder))
        installed.change("install")
        installed.connect()
        yield installed
    finally:
        if os.environ.get("NVR_TEST_KEEP") != "1":
            with suppress(Exception):
                installed.disconnect()
            kubectl("delete", "namespace", NAMESPACE, "--timeout=120s", check=False)
            if api:
                kubectl("delete", "endpoints", "kubernetes", "--namespace=default", check=False)
                api.terminate()
            for volume in made:
                kubectl("delete", "persistentvolume", volume["metadata"]["name"], "--wait=false", check=False)


@pytest.fixture(scope="module")
def watched() -> dict[str, dict[str, Any]]:
    """Every stage's pod that was ever seen, by name."""
    return {}


@pytest.fixture(scope="module")
def first(release: Release, watched: dict[str, dict[str, Any]]) -> str:
    """A run whose training pod is deleted half-way: all that follows must be as if nothing had been."""
    run = release.trigger()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            for pod in get("pods", f"--namespace={NAMESPACE}", "--selector=kubernetes_pod_operator=True").get(
                "items", []
            ):
                watched[pod["metadata"]["name"]] = pod

    watching = threading.Thread(target=watch)
    watching.start()
    try:

        def training() -> str:
            assert release.rest(run)[1]["state"] != "failed", release.failure(run)
            for pod in stage_pods("train"):
                # Its log, as Airflow shows it while the stage runs, not after.
                if re.search(r"step \d+|loss", release.log(run, "train")):
                    return str(pod["metadata"]["name"])
            return ""

        pod = str(until(training, "training shows its progress in Airflow", 900))
        kubectl("delete", "pod", pod, f"--namespace={NAMESPACE}", "--grace-period=0", "--force")
        state = release.wait(run, 900)
        assert state == "success", release.failure(run)
    finally:
        over.set()
        watching.join()
    return run


def test_all_pods_are_ready_and_unprivileged(release: Release) -> None:
    for pod in get("pods", f"--namespace={NAMESPACE}")["items"]:
        assert all(c["ready"] for c in pod["status"]["containerStatuses"]), pod["metadata"]["name"]
        unprivileged(pod)


def unprivileged(pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert not container["image"].endswith(":latest")


def test_helm_test_passes(release: Release) -> None:
    assert "Succeeded" in helm("test", RELEASE, f"--timeout={int(240 * SLOW)}s")


def test_a_run_ends_in_promotion(release: Release, first: str) -> None:
    results = release.results(first)
    assert results["gate[-1]"]["figures"]["verdict"] == "promote"
    assert release.champion() == "1"


def test_every_stage_was_a_pod_of_its_own(release: Release, first: str, watched: dict[str, dict[str, Any]]) -> None:
    of_run = [pod for pod in watched.values() if pod["metadata"]["labels"]["dag_id"] == "nv_retriever_retrain"]
    seen = {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in of_run}
    assert {f"stage-{name}" for name in STAGES} <= seen
    for pod in of_run:
        unprivileged(pod)
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["serviceAccountName"] == "nvr-stages"
    until(
        lambda: not get("pods", f"--namespace={NAMESPACE}", "--selector=kubernetes_pod_operator=True").get("items"),
        "no pod is left",
        60,
    )


def test_a_deleted_pod_is_tried_again_and_resumes(release: Release, first: str) -> None:
    again = {t["task_id"] for t in release.tasks(first) if t["try_number"] > 1}
    # A pod that ends in the second of its task's deferral costs a try in Airflow 3.3.
    events = release.rest(f"/api/v2/eventLogs?event=state%20mismatch&run_id={first.rpartition('/')[2]}")[1]
    raced = {e["task_id"] for e in events["event_logs"]}
    assert again - raced <= {"train"} <= again, [release.log(first, task, 1)[-4000:] for task in again - {"train"}]
    assert "resuming from the checkpoint" in release.log(first, "train", 2)


def test_no_secret_is_shown(release: Release, first: str, watched: dict[str, dict[str, Any]]) -> None:
    secrets = [
        base64.b64decode(value).decode()
        for name in ("nvr-airflow", "nvr-mlflow", "nvr-postgresql", "nvr-s3")
        for value in get("secret", name, f"--namespace={NAMESPACE}")["data"].values()
    ]
    shown = [json.dumps(watched), kubectl("get", "configmap,pods", f"--namespace={NAMESPACE}", "--output=json")]
    shown += [
        release.log(first, t["task_id"], n, t["map_index"])
        for t in release.tasks(first)
        for n in range(1, t["try_number"] + 1)
    ]
    shown += [json.dumps(release.results(first))]
    for secret in secrets:
        assert not any(secret in text for text in shown)


def test_airflow_may_manage_pods_in_its_namespace_and_nothing_else(release: Release) -> None:
    as_airflow = f"--as=system:serviceaccount:{NAMESPACE}:nvr-airflow"

    def can(*words: str, namespace: str = NAMESPACE) -> bool:
        return kubectl("auth", "can-i", *words, f"--namespace={namespace}", as_airflow, check=False) == "yes"

    assert can("create", "pods")
    assert can("get", "pods", "--subresource=log")
    assert can("create", "pods", "--subresource=exec")
    assert not can("create", "pods", namespace="default")
    for kind in (
        "secrets",
        "configmaps",
        "deployments.apps",
        "rolebindings.rbac.authorization.k8s.io",
        "persistentvolumeclaims",
    ):
        assert not can("get", kind), kind
    as_stage = f"--as=system:serviceaccount:{NAMESPACE}:nvr-stages"
    assert kubectl("auth", "can-i", "list", "pods", f"--namespace={NAMESPACE}", as_stage, check=False) == "no"


def test_a_scheduler_that_is_lost_loses_no_run(release: Release, first: str) -> None:
    run = release.trigger(*LONG)
    until(lambda: stage_pods("train"), "training starts", 600)
    until(lambda: "start" in release.log(run, "train"), "training has begun", 200)
    [before] = [p["metadata"]["uid"] for p in stage_pods("train")]
    for lost in ("scheduler", "triggerer"):
        kubectl(
            "delete",
            "pods",
            f"--namespace={NAMESPACE}",
            f"--selector=app.kubernetes.io/component=airflow-{lost}",
            "--wait=false",
        )
    kubectl(
        "rollout",
        "status",
        "deployment/nvr-airflow-scheduler",
        f"--namespace={NAMESPACE}",
        f"--timeout={int(240 * SLOW)}s",
    )
    time.sleep(20)
    assert [p["metadata"]["uid"] for p in stage_pods("train")] == [before], "the pod goes on, watched again"
    assert release.rest(run)[1]["state"] == "running"
    status, body = release.rest(f"{run}/taskInstances/train", {"new_state": "failed"}, method="PATCH")
    assert status == 200, body
    until(lambda: not stage_pods("train"), "the pod of a stopped task is gone", 120)
    release.wait(run, 300)


def test_upgrade_and_rollback_keep_champion_and_history(release: Release, first: str) -> None:
    release.change("upgrade", "--set=dags.retries=1")
    release.connect()
    assert release.champion() == "1"
    assert release.rest(first)[1]["state"] == "success"
    helm("rollback", RELEASE, "1", "--wait", f"--timeout={int(420 * SLOW)}s", "--server-side=false")
    release.connect()
    assert release.champion() == "1"
    assert "resuming from the checkpoint" in release.log(first, "train", 2), "logs are kept, too"
    run = release.trigger()
    assert release.wait(run, 600) == "success", release.failure(run)
    again = release.results(run)
    kept = (("download", -1), ("embed", 0), ("mine", -1), ("train", -1))
    assert all(again[f"{name}[{index}]"]["reused"] for name, index in kept)


def test_uninstall_leaves_only_claims(release: Release, first: str) -> None:
    release.disconnect()
    helm("uninstall", RELEASE, "--wait")
    kinds = "all,configmap,secret,serviceaccount,role,rolebinding,ingress,networkpolicy,persistentvolumeclaim"

    def left() -> set[str]:
        names = kubectl("get", kinds, f"--namespace={NAMESPACE}", "--output=name").split()
        ours = {n for n in names if not re.search(r"/(default|kube-root-ca\.crt|default-token-\w+)$", n)}
        return {n for n in ours if "-token-" not in n}

    until(
        lambda: left() == {f"persistentvolumeclaim/{name}" for name in CLAIMS},
        f"only claims are left, not {left()}",
        120,
    )
