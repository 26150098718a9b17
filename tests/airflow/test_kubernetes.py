"""The kubernetes runner without a cluster: settings, the pods it asks for, what their ends mean. The rest: tests/cluster."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException
from kubernetes.client import models as k8s
from kubernetes.client.exceptions import ApiException
from task_instance import TaskInstance
from test_integrity import DAG_ID, attribute, violations

from nvr_airflow.kubernetes import KubernetesStageOperator, _End
from nvr_airflow.settings import KubernetesSettings, Settings, SettingsError
from nvr_tasks.stages import STAGES, Resources, stage

KUBERNETES = {"NVR_RUNNER": "kubernetes", "NVR_IMAGE": "registry/nvr-tasks@sha256:0", "NVR_RETRIES": "2"}
NO_COMMAND = ("PartsOperator", "ApproveOperator")
RESULT = {"stage": "train", "outputs": {"model": ["m"]}, "figures": {}, "skipped": None}


def operator(wants: Resources | None = None, **environ: str) -> KubernetesStageOperator:
    settings = KubernetesSettings.from_env({**KUBERNETES, **environ})
    return KubernetesStageOperator(
        task_id="train",
        command="train",
        root="/r",
        kubernetes=settings,
        wants=wants or Resources(cpu=2, memory_gb=3, gpu=4),
    )


def pod_of(task: KubernetesStageOperator) -> k8s.V1Pod:
    """What Kubernetes would be asked for, XCom sidecar included."""

    class Hook:
        is_in_cluster = True

        def __getattr__(self, name: str) -> Callable[[], None]:
            return lambda: None

    task.__dict__["hook"] = Hook()
    return task.build_pod_request_obj()


def test_the_same_dag_file_runs_its_stages_in_pods(dags: Callable[..., Any]) -> None:
    bag = dags(**KUBERNETES)
    assert bag.import_errors == {}
    for dag in bag.dags.values():
        for task in dag.tasks:
            assert task.task_type in ("KubernetesStageOperator", *NO_COMMAND)
    assert not violations(bag.dags[DAG_ID])
    train = bag.dags[DAG_ID].task_dict["train"]
    assert (train.image, train.deferrable, train.do_xcom_push) == (KUBERNETES["NVR_IMAGE"], True, True)


def test_resources_come_from_the_table_unless_the_deployment_says_otherwise(dags: Callable[..., Any]) -> None:
    environ = {"NVR_GPU_IMAGE": "gpu:1", "NVR_GPU_POOL": "gpus"}
    dag = dags(**KUBERNETES, **environ).dags[DAG_ID]
    assert dag.task_dict["begin"].options == {"train-gpus": "1"}
    for row in STAGES:
        task = dag.task_dict[row.name]
        wants = attribute(task, "wants")
        assert wants == row.resources
        if not task.is_mapped:
            limits = task.container_resources.limits
            assert limits["memory"] == f"{row.resources.memory_gb * 1024:.0f}Mi"
            assert limits.get("nvidia.com/gpu") == (str(row.resources.gpu) if row.resources.gpu else None)
            assert task.image == ("gpu:1" if row.resources.gpu else KUBERNETES["NVR_IMAGE"])
    resources = '{"default": {"cpu": 0.5, "gpu": 0}, "train": {"gpu": 8, "memory_gb": 200}}'
    dag = dags(**KUBERNETES, **environ, NVR_RESOURCES=resources).dags[DAG_ID]
    assert attribute(dag.task_dict["train"], "wants") == Resources(cpu=0.5, memory_gb=200, gpu=8)
    assert dag.task_dict["train"].container_resources.limits["nvidia.com/gpu"] == "8"
    assert dag.task_dict["train"].pool == "gpus"
    assert dag.task_dict["begin"].options == {"train-gpus": "8"}
    assert attribute(dag.task_dict["embed"], "wants").gpu == 0
    assert dag.task_dict["register"].pool == "default_pool"
    assert attribute(dag.task_dict["download"], "wants") == Resources(
        cpu=0.5, memory_gb=stage("download").resources.memory_gb
    )


def test_a_pod_meets_pod_security_restricted() -> None:
    pod = pod_of(operator(NVR_GPU_IMAGE="gpu:1", NVR_K8S_SHM_GB="2", NVR_K8S_SCRATCH_GB="7"))
    spec = pod.spec
    assert spec.automount_service_account_token is False
    assert (spec.security_context.run_as_non_root, spec.security_context.run_as_user) == (True, 10001)
    assert spec.security_context.seccomp_profile.type == "RuntimeDefault"
    assert not spec.host_network
    assert [c.name for c in spec.containers] == ["base", "airflow-xcom-sidecar"]
    for container in spec.containers:
        context = container.security_context
        assert (context.allow_privilege_escalation, context.read_only_root_filesystem) == (False, True)
        assert context.capabilities.drop == ["ALL"]
        assert container.image == "gpu:1"
        assert container.resources.limits["memory"]
    volumes = {v.name: v.empty_dir for v in spec.volumes}
    assert (volumes["shm"].medium, volumes["shm"].size_limit) == ("Memory", "2048Mi")
    assert volumes["scratch"].size_limit == "7Gi"
    assert spec.containers[0].resources.limits["nvidia.com/gpu"] == "4"


def test_the_pod_template_is_underneath(tmp_path: Path) -> None:
    template = tmp_path / "pod.yaml"
    template.write_text(
        """
apiVersion: v1
kind: Pod
metadata: {annotations: {team: search}}
spec:
  nodeSelector: {pool: gpu}
  tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
  imagePullSecrets: [{name: login}]
  hostAliases: [{ip: 10.96.0.9, hostnames: [nvr-mlflow]}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
  containers: [{name: base, volumeMounts: [{name: data, mountPath: /data, readOnly: true}]}]
"""
    )
    pod = pod_of(operator(NVR_K8S_POD_TEMPLATE=str(template)))
    assert pod.spec.node_selector == {"pool": "gpu"}
    assert pod.spec.tolerations[0].key == "nvidia.com/gpu"
    assert pod.spec.image_pull_secrets[0].name == "login"
    assert pod.spec.host_aliases[0].hostnames == ["nvr-mlflow"]
    assert pod.metadata.annotations["team"] == "search"
    mounts = {m.mount_path for m in pod.spec.containers[0].volume_mounts}
    assert {"/data", "/scratch", "/tmp", "/dev/shm", "/airflow/xcom"} <= mounts  # noqa: S108
    assert pod.spec.containers[0].security_context.read_only_root_filesystem


def test_the_environment_comes_by_reference(monkeypatch: pytest.MonkeyPatch, dags: Callable[..., Any]) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-show-me")
    pod = pod_of(operator(NVR_K8S_ENV_FROM="configmap/nvr-tasks, secret/nvr-s3"))
    base = pod.spec.containers[0]
    assert [(e.secret_ref or e.config_map_ref).name for e in base.env_from] == ["nvr-tasks", "nvr-s3"]
    assert [e.name for e in base.env] == ["PYTHONUNBUFFERED"]
    assert "do-not-show-me" not in str(pod)
    from airflow.serialization.serialized_objects import DagSerialization

    assert "do-not-show-me" not in str(DagSerialization.to_dict(dags(**KUBERNETES).dags[DAG_ID]))


def test_the_trigger_is_told_where_the_cluster_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pod of Airflow's the service account says so; the trigger takes no such hint by itself."""
    monkeypatch.delenv("KUBECONFIG", raising=False)
    token = tmp_path / "token"
    monkeypatch.setattr("nvr_airflow.kubernetes.IN_CLUSTER", token)
    for exists, wanted in ((False, None), (True, True)):
        if exists:
            token.touch()
        task = operator()
        task._find_cluster()
        assert task.in_cluster is wanted
    monkeypatch.setenv("KUBECONFIG", "/elsewhere")
    task = operator()
    task._find_cluster()
    assert task.in_cluster is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NVR_IMAGE": ""}, "NVR_IMAGE is not set"),
        ({"NVR_K8S_PULL_POLICY": "never"}, "NVR_K8S_PULL_POLICY is 'never': expected IfNotPresent"),
        ({"NVR_K8S_ENV_FROM": "nvr-s3"}, "NVR_K8S_ENV_FROM has 'nvr-s3': expected secret/NAME"),
        ({"NVR_K8S_SCRATCH_GB": "0"}, "NVR_K8S_SCRATCH_GB is '0': expected a number, above 0"),
    ],
)
def test_a_wrong_setting_is_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        KubernetesSettings.from_env({**KUBERNETES, **environ})


def test_variables_cannot_be_passed_by_value(dags: Callable[..., Any]) -> None:
    [error, *_] = dags(**KUBERNETES, NVR_PASS_ENV="MY_TOKEN").import_errors.values()
    assert "NVR_PASS_ENV (MY_TOKEN) reaches no pod" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu=8", "NVR_RESOURCES is no JSON"),
        ("[1]", "expected an object by stage"),
        ('{"training": {"gpu": 8}}', "names 'training'; there are: .*train"),
        ('{"train": {"ram": 8}}', "for train: expected an object of cpu, gpu, memory_gb"),
        ('{"train": {"gpu": 1.5}}', "has train.gpu 1.5: expected a whole number"),
        ('{"train": {"gpu": true}}', "has train.gpu True"),
        ('{"train": {"memory_gb": 0}}', "has train.memory_gb 0: expected a number above 0"),
    ],
)
def test_wrong_resources_are_named(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.from_env({"NVR_RESOURCES": text})


# ── what the end of a pod means ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def context() -> Iterator[dict[str, Any]]:
    yield {"run_id": "r", "params": {}, "ti": TaskInstance(), "outlet_events": {}}


def pod(
    code: int | None = None,
    reason: str = "",
    message: str = "",
    *,
    waiting: str = "",
    evicted: bool = False,
    unplaced: str = "",
) -> k8s.V1Pod:
    state = k8s.V1ContainerState()
    if code is not None:
        state.terminated = k8s.V1ContainerStateTerminated(exit_code=code, reason=reason, message=message)
    if waiting:
        state.waiting = k8s.V1ContainerStateWaiting(reason=waiting, message=message)
    told = (
        []
        if evicted or unplaced
        else [k8s.V1ContainerStatus(name="base", state=state, image="", image_id="", ready=False, restart_count=0)]
    )
    conditions = (
        [k8s.V1PodCondition(type="PodScheduled", status="False", reason="Unschedulable", message=unplaced)]
        if unplaced
        else []
    )
    status = k8s.V1PodStatus(container_statuses=told, conditions=conditions)
    if evicted:
        status.reason, status.message = "Evicted", message
    return k8s.V1Pod(status=status)


@pytest.mark.parametrize(
    ("ended", "result", "error", "message"),
    [
        (pod(2, message="x\nnvr: unknown key"), None, AirflowFailException, "^nvr train refused .*: nvr: unknown key$"),
        (pod(1, message="nvr: store away"), None, AirflowException, "exit status 1: nvr: store away"),
        (pod(0), None, AirflowException, "printed no line .* is NVR_IMAGE of this"),
        (pod(137), None, AirflowException, "was ended by SIGKILL"),
        (pod(137, "OOMKilled"), None, AirflowException, r"(?s)SIGKILL.*went over its 3 GiB of memory \(NVR_RESOURCES\)"),
        (pod(evicted=True, message="node low on ephemeral-storage"), None, AirflowException, "evicted from its node: node low"),
        (pod(waiting="ErrImageNeverPull", message="not present"), None, AirflowFailException, "cannot have image .*NVR_IMAGE"),
        (pod(waiting="ImagePullBackOff", message="401"), None, AirflowException, "imagePullSecrets"),
        (pod(waiting="CreateContainerConfigError", message='secret "s" not found'), None, AirflowException, 'secret "s" not'),
        (pod(255), None, AirflowException, "failed with exit status 255"),
        (pod(unplaced="0/3 nodes: Insufficient nvidia.com/gpu"), None, AirflowException, "4 GPU.*Insufficient nvidia.com/gpu .*NVR_GPU_IMAGE"),
        (pod(99), RESULT | {"skipped": "verdict: hold"}, AirflowSkipException, "verdict: hold"),
    ],
)  # fmt: skip
def test_an_end_is_told(context: dict[str, Any], ended: k8s.V1Pod, result: Any, error: type, message: str) -> None:
    task = operator(NVR_GPU_IMAGE="gpu:1")
    with pytest.raises(error, match=message) as caught:
        task._tell(_End.of(ended, result), "", context)
    assert isinstance(caught.value, AirflowFailException) == (error is AirflowFailException)
    if error is AirflowSkipException:
        assert context["ti"].pushed["return_value"]["skipped"] == "verdict: hold"


def test_a_result_is_returned(context: dict[str, Any]) -> None:
    assert operator()._tell(_End.of(pod(0), RESULT), "", context)["outputs"] == {"model": ["m"]}


@pytest.mark.parametrize(
    ("status", "why", "for_people", "message"),
    [
        (403, 'pods is forbidden: User "x" cannot create resource "pods"', True, "may not start pods in namespace there: .*tasks.namespace"),
        (403, "exceeded quota: q, requested: cpu=4", False, "quota of namespace there has no room .*: exceeded quota"),
        (403, "violates PodSecurity", True, "a policy of the cluster refused the pod .*: violates PodSecurity"),
        (404, "namespaces there not found", True, "refused"),
        (500, "etcd is away", False, "would not start"),
    ],
)  # fmt: skip
def test_a_refusal_is_told(status: int, why: str, for_people: bool, message: str) -> None:
    error = ApiException(status=status)
    error.body = json.dumps({"message": why})
    told = operator(NVR_K8S_NAMESPACE="there")._refused(error)
    assert isinstance(told, AirflowFailException) == for_people
    with pytest.raises(AirflowException, match=message):
        raise told


# ── whose a pod is ───────────────────────────────────────────────────────────────────────────────────────────────


def left(name: str, args: list[str], dying: bool = False) -> k8s.V1Pod:
    """A pod that an earlier try has started."""
    now = datetime.datetime.now(tz=datetime.UTC)
    about = k8s.V1ObjectMeta(
        name=name, namespace="n", labels={}, creation_timestamp=now, deletion_timestamp=now if dying else None
    )
    spec = k8s.V1PodSpec(containers=[k8s.V1Container(name="base", args=args)])
    return k8s.V1Pod(metadata=about, spec=spec, status=k8s.V1PodStatus(phase="Running"))


class Cluster:
    """Stands in for the API: lists what it is given, remembers what it is asked."""

    def __init__(self, *pods: k8s.V1Pod) -> None:
        self.pods, self.selector, self.deleted = pods, "", []

    def list_namespaced_pod(self, namespace: str, label_selector: str) -> Any:
        assert namespace == "n"
        self.selector = label_selector
        return type("List", (), {"items": list(self.pods)})()

    def delete_pod(self, pod: k8s.V1Pod) -> None:
        self.deleted.append(pod.metadata.name)


@pytest.mark.parametrize(
    ("pods", "found", "deleted"),
    [
        ([left("same", ["train"])], "same", []),
        ([left("dying", ["train"], dying=True)], None, ["dying"]),
        ([left("other", ["train", "--root=/old"])], None, ["other"]),
        ([left("dying", ["train"], dying=True), left("same", ["train"])], "same", ["dying"]),
        ([], None, []),
    ],
)
def test_only_a_pod_that_is_at_the_same_work_is_found_again(
    pods: list[k8s.V1Pod], found: str | None, deleted: list[str], context: dict[str, Any]
) -> None:
    task, cluster = operator(), Cluster(*pods)
    task.arguments = ["train"]
    task.__dict__.update(client=cluster, pod_manager=cluster)
    about = type("Task", (), {"dag_id": "d", "task_id": "t", "map_index": -1, "try_number": 2})()
    again = task.find_pod("n", context | {"ti": about, "dag": None})
    assert (again.metadata.name if again else None) == found
    assert cluster.deleted == deleted
    assert f"nvr.deployment={task.labels['nvr.deployment']}" in cluster.selector


def test_deployments_that_share_a_namespace_do_not_find_each_others_pods() -> None:
    one, other = operator(), operator(NVR_K8S_SERVICE_ACCOUNT="beta-stages")
    assert one.labels["nvr.deployment"] != other.labels["nvr.deployment"]
    assert one.labels == operator().labels


def test_the_result_of_a_pod_that_had_ended_already_is_not_lost(
    context: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider then comes back at once, and would drop what comes of it."""
    task = operator()

    def ended(self: Any, context: Any, event: Any) -> None:
        self._end = _End.of(pod(0), RESULT)

    def execute(self: Any, context: Any) -> None:
        self.trigger_reentry(context, {"name": "p", "status": "success"})

    monkeypatch.setattr("airflow.providers.cncf.kubernetes.operators.pod.KubernetesPodOperator.trigger_reentry", ended)
    monkeypatch.setattr("airflow.providers.cncf.kubernetes.operators.pod.KubernetesPodOperator.execute", execute)
    assert type(task).execute.__wrapped__(task, context)["outputs"] == {"model": ["m"]}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{hostNetwork: true, containers: [{name: base}]}", "host_network"),
        ("{containers: [{name: base}], initContainers: [{name: i, image: x, securityContext: {privileged: true}}]}", "privileges in container i"),
        ("{containers: [{name: base}], volumes: [{name: root, hostPath: {path: /}}]}", "hostPath volume root"),
    ],
)  # fmt: skip
def test_a_template_cannot_ask_for_privileges(tmp_path: Path, template: str, named: str) -> None:
    file = tmp_path / "pod.yaml"
    file.write_text(f"apiVersion: v1\nkind: Pod\nspec: {template}\n")
    with pytest.raises(AirflowFailException, match=f"asks for {named}"):
        pod_of(operator(NVR_K8S_POD_TEMPLATE=str(file)))


def test_containers_of_a_template_keep_their_image(tmp_path: Path) -> None:
    file = tmp_path / "pod.yaml"
    spec = "{containers: [{name: base}, {name: vault, image: 'vault:1.2'}]}"
    file.write_text(f"apiVersion: v1\nkind: Pod\nspec: {spec}\n")
    [vault] = [c for c in pod_of(operator(NVR_K8S_POD_TEMPLATE=str(file))).spec.containers if c.name == "vault"]
    assert vault.image == "vault:1.2"
    assert vault.security_context.capabilities.drop == ["ALL"]
