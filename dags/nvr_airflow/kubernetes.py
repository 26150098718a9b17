"""The `kubernetes` runner: a stage is a pod of its own, watched by the triggerer, so that no worker waits for a long one.

KubernetesPodOperator gives deferral, reattachment and the XCom sidecar. What it does not offer is done here: pods that
meet Pod Security "restricted", one meaning for exit statuses whoever runs a stage, and errors that say what to mend.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.utils.pod_manager import PodNotFoundException
from airflow.providers.cncf.kubernetes.utils.xcom_sidecar import PodDefaults
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubernetes.client import models as k8s
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from nvr_airflow.operator import StageOperator
from nvr_airflow.settings import KubernetesSettings
from nvr_airflow.story import own_words
from nvr_tasks.stages import RESULT_MARK, Resources

CONTAINER, SCRATCH = "base", "/scratch"
IN_CLUSTER = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
USER = 10001  # of our images
UNWATCHED_S = 300
SIDECAR_S = 120
SIGNALLED = 128  # a status above it tells the signal that ended the process
FOR_PEOPLE = frozenset({"InvalidImageName", "ErrImageNeverPull"})  # states of a container that waiting does not cure
SIDECAR = PodDefaults.SIDECAR_CONTAINER_NAME
# The provider's sidecar waits for ever. This one lets go of its node (and GPUs) an hour after a result that nobody came for.
SIDECAR_COMMAND = """trap "exit 0" INT
n=0
while [ $n -lt 3600 ]; do sleep 1; if [ -s /airflow/xcom/return.json ]; then n=$((n+1)); fi; done"""


@dataclass(frozen=True)
class _End:
    """What became of a pod."""

    status: int | None  # exit status of the stage; negative: a signal; None: its container never ran or never ended
    reason: str  # of Kubernetes: Evicted, OOMKilled, ErrImageNeverPull, Unschedulable …
    message: str
    result: Any

    @classmethod
    def of(cls, pod: k8s.V1Pod, result: Any) -> _End:
        """Read a pod's status."""
        whole = pod.status
        [state] = [s.state for s in whole.container_statuses or [] if s.name == CONTAINER] or [None]
        done, waiting = (state.terminated, state.waiting) if state else (None, None)
        if done:
            status = SIGNALLED - done.exit_code if done.exit_code > SIGNALLED else done.exit_code
            return cls(status, whole.reason or done.reason or "", done.message or whole.message or "", result)
        if waiting and not whole.reason:
            return cls(None, waiting.reason or "", waiting.message or "", result)
        unmet = next((c for c in whole.conditions or [] if c.type == "PodScheduled" and c.status == "False"), None)
        told = unmet or whole
        return cls(None, told.reason or "", told.message or "", result)


class KubernetesStageOperator(StageOperator, KubernetesPodOperator):
    """Runs `nvr` in a pod; its output is the task's log: of a short stage at its end, else every few seconds while it runs.

    Args:
        kubernetes: the deployment's settings.
        wants: of the stage. CPUs are requested, memory and GPUs requested and limited.
        kill_grace_s: between the request to stop and SIGKILL.
    """

    template_fields: Sequence[str] = (*StageOperator.template_fields, "image")
    where_nvr_is_from = "NVR_IMAGE"
    result_on_stdout = False  # the sidecar hands over what `nvr` wrote for it
    short_s = 20.0  # the worker waits so long itself

    def __init__(
        self, *, kubernetes: KubernetesSettings, wants: Resources, kill_grace_s: float = 20, **kwargs: Any
    ) -> None:
        on_gpu = bool(wants.gpu and kubernetes.gpu_image)
        self.gpus = wants.gpu if on_gpu else 0
        allowed: datetime.timedelta | None = kwargs.pop("execution_timeout", None)
        starting = datetime.timedelta(seconds=2 * kubernetes.start_timeout_s)
        super().__init__(
            image=kubernetes.gpu_image if on_gpu else kubernetes.image,
            image_pull_policy=kubernetes.pull_policy,
            namespace=kubernetes.namespace or None,
            name=f"nvr-{kwargs['command']}",
            kubernetes_conn_id=kubernetes.connection or None,
            # What an interrupted try has started is found by its labels: those of another deployment must differ.
            labels={
                "app.kubernetes.io/name": "nvr",
                "app.kubernetes.io/component": f"stage-{kwargs['command']}",
                "nvr.deployment": _deployment(kwargs["root"], kubernetes),
            },
            env_vars={"PYTHONUNBUFFERED": "1"},
            env_from=[_source(name) for name in kubernetes.env_from],
            pod_template_file=(kubernetes.gpu_pod_template if on_gpu else "") or kubernetes.pod_template or None,
            service_account_name=kubernetes.service_account or None,
            automount_service_account_token=False,
            container_resources=_resources(wants, kubernetes.scratch_gb, kubernetes.gpu_resource if on_gpu else None),
            volumes=[
                _empty("scratch", f"{kubernetes.scratch_gb:g}Gi"),
                _empty("tmp", "256Mi"),
                _empty("shm", f"{kubernetes.shm_gb * 1024:.0f}Mi", medium="Memory"),
            ],
            volume_mounts=[
                k8s.V1VolumeMount(name="scratch", mount_path=SCRATCH),
                k8s.V1VolumeMount(name="tmp", mount_path="/tmp"),  # noqa: S108  of the container, and its own
                k8s.V1VolumeMount(name="shm", mount_path="/dev/shm"),  # noqa: S108
            ],
            security_context=k8s.V1PodSecurityContext(
                run_as_non_root=True,
                run_as_user=USER,
                run_as_group=USER,
                fs_group=USER,
                seccomp_profile=k8s.V1SeccompProfile(type="RuntimeDefault"),
            ),
            container_security_context=_unprivileged(),
            termination_grace_period=int(kill_grace_s),
            # Airflow's own timeout comes first; this ends a pod that nobody watches any more.
            active_deadline_seconds=int(allowed.total_seconds()) + UNWATCHED_S if allowed else None,
            execution_timeout=allowed + starting if allowed else None,  # a node may have to be found, an image fetched
            termination_message_policy="FallbackToLogsOnError",
            startup_timeout_seconds=int(kubernetes.start_timeout_s),
            startup_check_interval_seconds=2,
            schedule_timeout_seconds=int(kubernetes.start_timeout_s),
            base_container_name=CONTAINER,
            deferrable=True,
            logging_interval=int(kubernetes.log_interval_s) or None,
            do_xcom_push=True,
            on_finish_action="delete_pod",
            log_pod_spec_on_failure=False,  # the reason is told in a line instead
            log_events_on_failure=True,
            **kwargs,
        )
        self.wants = wants
        self._end: _End | None = None
        self._value: Any = None
        self._not_fetched = ""

    def execute(self, context: Any) -> Any:
        """Start the pod, or find the one that an interrupted try has started, and wait for it in the triggerer."""
        self._find_cluster()
        self.arguments = self.command_line(context)
        self.log.info("$ nvr %s", " ".join(self.arguments))
        try:
            super().execute(context)
            return self._value  # of a pod that had ended before it was found again: there was nothing to wait for
        except ApiException as error:
            raise self._refused(error) from None
        except HTTPError as error:
            raise AirflowException(f"cannot reach the Kubernetes API server: {error}") from None
        except FileNotFoundError as error:
            raise AirflowFailException(
                f"{error.filename} does not exist: correct NVR_K8S_POD_TEMPLATE or NVR_K8S_GPU_POD_TEMPLATE"
            ) from None

    def invoke_defer_method(self, last_log_time: Any = None, context: Any = None) -> None:
        """See a short stage to its end without the triggerer.

        A trigger that fires before the scheduler has heard that the worker is done makes it take the task for one that
        was killed: its state is `queued` again by then, the event log says "state mismatch", and a try is lost.
        """
        until = time.monotonic() + self.short_s
        while self.pod and not self._has_ended(self.pod) and time.monotonic() < until:
            time.sleep(1)
        super().invoke_defer_method(last_log_time, context)

    def _has_ended(self, pod: k8s.V1Pod) -> bool:
        try:
            self.pod = pod = self.hook.get_pod(pod.metadata.name, pod.metadata.namespace)
        except (ApiException, HTTPError) as error:  # what it means, the trigger finds words for
            return getattr(error, "status", None) == 404
        return _End.of(pod, None).status is not None or pod.status.phase in ("Succeeded", "Failed")

    def trigger_reentry(self, context: Any, event: dict[str, Any]) -> Any:
        """The triggerer has seen the pod end, or give up."""
        self._find_cluster()
        name = event["name"]
        try:
            super().trigger_reentry(context, event)
        except PodNotFoundException:
            raise AirflowException(f"pod {name} is gone: {_gone(self.command)}") from None
        except (ApiException, HTTPError) as error:  # the next try finds the pod again, and its result
            raise AirflowException(f"cannot ask what became of pod {name}: {_explanation(error)}") from None
        except AirflowException:
            if self._end is None and self._value is None:
                raise
        if (
            self._value is not None
        ):  # the provider was to wait on, saw that there was no need, and called this method itself
            return self._value
        if self._end is None:  # a pod that had ended well and was deleted before it could be asked
            raise AirflowException(f"pod {name} is gone, and its result with it: {_gone(self.command)}")
        self._value = self._tell(self._end, str(event.get("message") or ""), context)
        return self._value

    def find_pod(self, namespace: str, context: Any, *, exclude_checked: bool = True) -> k8s.V1Pod | None:
        """The pod that an interrupted try of this very command has left at work; others of the task are taken down."""
        labels = self._build_find_pod_label_selector(context, exclude_checked=exclude_checked)
        found = self.client.list_namespaced_pod(namespace=namespace, label_selector=labels).items
        for pod in found:
            if not self._is_mine(pod):
                self.log.warning("taking down pod %s of an earlier try", pod.metadata.name)
                self.process_pod_deletion(pod, reraise=False)
        return max(filter(self._is_mine, found), key=lambda pod: pod.metadata.creation_timestamp, default=None)

    def _get_pod_from_task_state_store(self, context: Any) -> k8s.V1Pod | None:
        pod = super()._get_pod_from_task_state_store(context)
        return pod if pod is not None and self._is_mine(pod) else None

    def _is_mine(self, pod: k8s.V1Pod) -> bool:
        """Neither on its way out (a task that was cleared) nor with other arguments (a DAG that was changed)."""
        [base] = [container for container in pod.spec.containers if container.name == CONTAINER] or [None]
        return pod.metadata.deletion_timestamp is None and base is not None and list(base.args or []) == self.arguments

    def _find_cluster(self) -> None:
        """Say outright that it is the cluster around us, if it is: the trigger does not look by itself."""
        if not (self.kubernetes_conn_id or self.config_file or os.environ.get("KUBECONFIG")):
            self.in_cluster = IN_CLUSTER.exists() or None

    def build_pod_request_obj(self, context: Any = None, **kwargs: Any) -> k8s.V1Pod:
        """The pod; its sidecar is the image that the node has anyway, as unprivileged as the stage.

        Raises:
            AirflowFailException: the pod template asks for what Pod Security "restricted" forbids.
        """
        pod = super().build_pod_request_obj(context, **kwargs)
        for container in [*(pod.spec.init_containers or []), *pod.spec.containers]:
            if container.name == SIDECAR:
                container.image, container.image_pull_policy = self.image, self.image_pull_policy
                container.command = ["sh", "-c", SIDECAR_COMMAND]
                container.security_context = _unprivileged()
                container.resources.limits = {"cpu": "100m", "memory": "64Mi"}
            elif container.security_context is None:
                container.security_context = _unprivileged()
        if asked := _privileges(pod.spec):
            raise AirflowFailException(
                f'the pod template asks for {", ".join(asked)}, which Pod Security "restricted" forbids: correct it '
                "(NVR_K8S_POD_TEMPLATE, NVR_K8S_GPU_POD_TEMPLATE)"
            )
        return pod

    def extract_xcom(self, pod: k8s.V1Pod, **kwargs: Any) -> Any:
        """What the stage wrote for the sidecar; None where there is no sidecar to ask any more."""
        try:
            if pod.status.phase == "Running" and _End.of(pod, None).status is not None:
                # A stage that has nothing to do may end before its sidecar has begun.
                self.pod_manager.await_xcom_sidecar_container_start(pod, timeout=SIDECAR_S)
            return super().extract_xcom(pod, **kwargs)
        except (AirflowException, ApiException, HTTPError, ValueError) as error:
            self.log.warning("no result of pod %s: %s", pod.metadata.name, error)
            self._not_fetched = str(error)
            return None

    def cleanup(self, pod: k8s.V1Pod, remote_pod: k8s.V1Pod, xcom_result: Any = None, context: Any = None) -> None:  # noqa: ARG002
        """Take down the pod and remember what became of it: `trigger_reentry` says what that means."""
        if self._killed or not remote_pod:
            return
        self._end = _End.of(remote_pod, xcom_result)
        self.patch_already_checked(remote_pod, reraise=False)
        if self._end.status is None or self._end.status < 0:
            self._read_pod_events(remote_pod, reraise=False)
        self.process_pod_deletion(remote_pod, reraise=False)

    def _tell(self, end: _End, event: str, context: Any) -> Any:
        words = own_words(end.message.splitlines())
        if end.reason == "Evicted":
            raise AirflowException(f"pod of nvr {self.command} was evicted from its node: {end.message}")
        if end.status is None:
            raise self._not_run(end, event)
        if end.reason == "OOMKilled":
            words = f"{words}\nnvr: the stage went over its {self.wants.memory_gb:g} GiB of memory (NVR_RESOURCES)"
        if end.status == 0 and end.result is None and self._not_fetched:
            raise AirflowException(
                f"nvr {self.command} ended well, but its result could not be fetched: {self._not_fetched}"
            )
        line = None if end.result is None else f"{RESULT_MARK}{json.dumps(end.result)}"
        return self.conclude(end.status, line, words, context)

    def _not_run(self, end: _End, event: str) -> AirflowException:
        """The stage's container never started, or the deadline came first."""
        why = f"{end.reason}: {end.message}" if end.message else end.reason
        if "image" in end.reason.lower() or "pull" in end.reason.lower():
            kind = AirflowFailException if end.reason in FOR_PEOPLE else AirflowException
            return kind(
                f"the node cannot have image {self.image} ({why}): check NVR_IMAGE, NVR_K8S_PULL_POLICY "
                f"({self.image_pull_policy or 'the default'}), and the registry's login (imagePullSecrets of the pod template)"
            )
        if end.reason == "Unschedulable":
            gpus = f", {self.gpus} GPU" if self.gpus else ""
            return AirflowException(
                f"no node can take nvr {self.command} ({self.wants.cpu:g} CPU, {self.wants.memory_gb:g} GiB{gpus}): {end.message} "
                "Add such a node, ask for less (NVR_RESOURCES), correct node selector and tolerations in the pod template, "
                "or unset NVR_GPU_IMAGE to run on the CPU"
            )
        return AirflowException(
            f"nvr {self.command} did not come to its end: {why or event or 'its pod was taken away'}"
        )

    def _refused(self, error: ApiException) -> AirflowException:
        """What the API server's refusal means. All but a busy or failing server is for people to mend."""
        where = f"namespace {self.namespace or 'of Airflow'}"
        why = _explanation(error)
        if error.status == 403 and "exceeded quota" in why:  # until others have ended
            return AirflowException(f"the quota of {where} has no room for nvr {self.command} now: {why}")
        if error.status == 403 and "cannot " in why:
            return AirflowFailException(
                f"Airflow may not start pods in {where}: {why}. Bind its service account to a role that may (the chart does, "
                "for tasks.namespace), or correct NVR_K8S_NAMESPACE"
            )
        if error.status == 403:
            return AirflowFailException(
                f"a policy of the cluster refused the pod of nvr {self.command} in {where}: {why}"
            )
        if error.status in (404, 422, 400):
            return AirflowFailException(f"Kubernetes refused the pod of nvr {self.command} in {where}: {why}")
        return AirflowException(f"Kubernetes would not start nvr {self.command} in {where}: {why}")


def _gone(command: str) -> str:
    return f"it was deleted, or lost with its node, while nvr {command} ran; a retry takes up what is stored"


def _deployment(root: str, kubernetes: KubernetesSettings) -> str:
    """Tells deployments apart whose stages share a namespace, as a label."""
    told = json.dumps([root, kubernetes.service_account, kubernetes.env_from])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _resources(wants: Resources, scratch_gb: float, gpu: str | None) -> k8s.V1ResourceRequirements:
    memory = f"{wants.memory_gb * 1024:.0f}Mi"
    limits = {"memory": memory} | ({gpu: str(wants.gpu)} if gpu else {})
    # Scratch is asked for, too: else a pod lands on a node that has no room for it, and is evicted with others.
    requests = {"cpu": f"{wants.cpu:g}", "memory": memory, "ephemeral-storage": f"{scratch_gb * 1024:.0f}Mi"}
    return k8s.V1ResourceRequirements(requests=requests, limits=limits)


def _privileges(spec: k8s.V1PodSpec) -> list[str]:
    """What a pod asks for that Pod Security "restricted" forbids and a template can bring in."""
    asked = [name for name in ("host_network", "host_pid", "host_ipc") if getattr(spec, name)]
    asked += [f"hostPath volume {v.name}" for v in spec.volumes or [] if v.host_path]
    for container in [*(spec.init_containers or []), *spec.containers]:
        context = container.security_context
        dropped = (context.capabilities.drop or []) if context.capabilities else []
        if context.privileged or context.allow_privilege_escalation is not False or "ALL" not in dropped:
            asked.append(f"privileges in container {container.name}")
    return asked


def _empty(name: str, size: str, medium: str | None = None) -> k8s.V1Volume:
    return k8s.V1Volume(name=name, empty_dir=k8s.V1EmptyDirVolumeSource(medium=medium, size_limit=size))


def _unprivileged() -> k8s.V1SecurityContext:
    return k8s.V1SecurityContext(
        allow_privilege_escalation=False,
        read_only_root_filesystem=True,
        capabilities=k8s.V1Capabilities(drop=["ALL"]),
    )


def _source(name: str) -> k8s.V1EnvFromSource:
    kind, _, of = name.partition("/")
    if kind == "secret":
        return k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name=of))
    return k8s.V1EnvFromSource(config_map_ref=k8s.V1ConfigMapEnvSource(name=of))


def _explanation(error: ApiException | HTTPError) -> str:
    try:
        told: Mapping[str, Any] = json.loads(getattr(error, "body", None) or "")
        return str(told["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return str(getattr(error, "reason", None) or error)
