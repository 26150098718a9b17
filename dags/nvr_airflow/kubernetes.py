"""The `kubernetes` runner: a stage is a pod of its own, watched by the triggerer, so that no worker waits for it.

KubernetesPodOperator gives deferral, reattachment and the XCom sidecar. What it does not offer is done here: pods that
meet Pod Security "restricted", one meaning for exit statuses whoever runs a stage, and errors that say what to mend.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.utils.pod_manager import PodNotFoundException
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
# Of these states of a container, waiting cures none (the kubelet may try again, but with the same image and settings).
FOR_PEOPLE = frozenset({"InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError", "CreateContainerError"})


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
    """Runs `nvr` in a pod; its output is the task's log, every few seconds while it runs.

    Args:
        kubernetes: the deployment's settings.
        wants: of the stage. CPUs are requested, memory and GPUs requested and limited.
        kill_grace_s: between the request to stop and SIGKILL.
    """

    template_fields: Sequence[str] = (*StageOperator.template_fields, "image")
    where_nvr_is_from = "NVR_IMAGE"
    result_on_stdout = False  # the sidecar hands over what `nvr` wrote for it

    def __init__(
        self, *, kubernetes: KubernetesSettings, wants: Resources, kill_grace_s: float = 20, **kwargs: Any
    ) -> None:
        on_gpu = bool(wants.gpu and kubernetes.gpu_image)
        self.gpus = wants.gpu if on_gpu else 0
        allowed: datetime.timedelta | None = kwargs.get("execution_timeout")
        super().__init__(
            image=kubernetes.gpu_image if on_gpu else kubernetes.image,
            image_pull_policy=kubernetes.pull_policy,
            namespace=kubernetes.namespace or None,
            name=f"nvr-{kwargs['command']}",
            kubernetes_conn_id=kubernetes.connection or None,
            labels={"app.kubernetes.io/name": "nvr", "app.kubernetes.io/component": f"stage-{kwargs['command']}"},
            env_vars={"PYTHONUNBUFFERED": "1"},
            env_from=[_source(name) for name in kubernetes.env_from],
            pod_template_file=(kubernetes.gpu_pod_template if on_gpu else "") or kubernetes.pod_template or None,
            service_account_name=kubernetes.service_account or None,
            automount_service_account_token=False,
            container_resources=_resources(wants, kubernetes.gpu_resource if on_gpu else None),
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

    def execute(self, context: Any) -> Any:
        """Start the pod, or find the one that an interrupted try has started, and wait for it in the triggerer."""
        self._find_cluster()
        self.arguments = self.command_line(context)
        self.log.info("$ nvr %s", " ".join(self.arguments))
        try:
            return super().execute(context)
        except ApiException as error:
            raise self._refused(error) from None
        except HTTPError as error:
            raise AirflowException(f"cannot reach the Kubernetes API server: {error}") from None
        except FileNotFoundError as error:
            raise AirflowFailException(
                f"{error.filename} does not exist: correct NVR_K8S_POD_TEMPLATE or NVR_K8S_GPU_POD_TEMPLATE"
            ) from None

    def trigger_reentry(self, context: Any, event: dict[str, Any]) -> Any:
        """The triggerer has seen the pod end, or give up."""
        self._find_cluster()
        try:
            super().trigger_reentry(context, event)
        except PodNotFoundException:
            raise AirflowException(f"pod {event['name']} is gone: {_gone(self.command)}") from None
        except AirflowException:
            if self._end is None:
                raise
        if self._end is None:  # a pod that had ended well and was deleted before it could be asked
            raise AirflowException(f"pod {event['name']} is gone, and its result with it: {_gone(self.command)}")
        return self._tell(self._end, str(event.get("message") or ""), context)

    def _find_cluster(self) -> None:
        """Say outright that it is the cluster around us, if it is: the trigger does not look by itself."""
        if not (self.kubernetes_conn_id or self.config_file or os.environ.get("KUBECONFIG")):
            self.in_cluster = IN_CLUSTER.exists() or None

    def build_pod_request_obj(self, context: Any = None, **kwargs: Any) -> k8s.V1Pod:
        """The pod; its sidecar is the image that the node has anyway, as unprivileged as the stage."""
        pod = super().build_pod_request_obj(context, **kwargs)
        for container in pod.spec.containers:
            if container.name != CONTAINER:
                container.image, container.image_pull_policy = self.image, self.image_pull_policy
                container.security_context = _unprivileged()
                container.resources.limits = container.resources.limits or {"cpu": "100m", "memory": "64Mi"}
        return pod

    def extract_xcom(self, pod: k8s.V1Pod, **kwargs: Any) -> Any:
        """What the stage wrote for the sidecar; None where there is no sidecar to ask any more."""
        try:
            if pod.status.phase == "Running" and _End.of(pod, None).status is not None:
                # A stage that has nothing to do may end before its sidecar has begun.
                self.pod_manager.await_xcom_sidecar_container_start(pod, timeout=SIDECAR_S)
            return super().extract_xcom(pod, **kwargs)
        except (AirflowException, ApiException, HTTPError, ValueError) as error:
            self.log.debug("no result of pod %s: %s", pod.metadata.name, error)
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
        if end.reason in FOR_PEOPLE:
            return AirflowFailException(f"the pod of nvr {self.command} cannot start ({why})")
        return AirflowException(
            f"nvr {self.command} did not come to its end: {why or event or 'its pod was taken away'}"
        )

    def _refused(self, error: ApiException) -> AirflowException:
        """What the API server's refusal means. All but a busy or failing server is for people to mend."""
        where = f"namespace {self.namespace or 'of Airflow'}"
        why = _explanation(error)
        if error.status == 403:
            return AirflowFailException(
                f"Airflow may not start pods in {where}: {why}. Bind its service account to a role that may (the chart does, "
                "for tasks.namespace), correct NVR_K8S_NAMESPACE, or raise the namespace's quota"
            )
        if error.status in (404, 422, 400):
            return AirflowFailException(f"Kubernetes refused the pod of nvr {self.command} in {where}: {why}")
        return AirflowException(f"Kubernetes would not start nvr {self.command} in {where}: {why}")


def _gone(command: str) -> str:
    return f"it was deleted, or lost with its node, while nvr {command} ran; a retry takes up what is stored"


def _resources(wants: Resources, gpu: str | None) -> k8s.V1ResourceRequirements:
    memory = f"{wants.memory_gb * 1024:.0f}Mi"
    limits = {"memory": memory} | ({gpu: str(wants.gpu)} if gpu else {})
    return k8s.V1ResourceRequirements(requests={"cpu": f"{wants.cpu:g}", "memory": memory}, limits=limits)


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


def _explanation(error: ApiException) -> str:
    try:
        told: Mapping[str, Any] = json.loads(error.body or "")
        return str(told["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason or error)
