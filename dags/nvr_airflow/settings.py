"""What a deployment decides, read from the environment (NVR_*) when a DAG file is parsed: no Variable, no database."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nvr_tasks.stages import ON_DEMAND, STAGES, Resources

LARGEST = 1_000_000  # of a number; as hours, a deadline in 114 years, which Airflow's dates still hold
REPOSITORY = Path(__file__).resolve().parents[2]


class SettingsError(ValueError):
    """A setting of the deployment is wrong; Airflow shows the message as the DAG's import error."""


@dataclass(frozen=True)
class Settings:
    """The deployment.

    Attributes:
        runner: NVR_RUNNER, how a stage is started (see `runners`).
        schedule: NVR_SCHEDULE, a cron expression or preset; empty or absent: only on demand.
        on_new_data: NVR_ON_NEW_DATA, `1`: also retrain when `nv_retriever_sources` finds that training data changed.
        sources_schedule: NVR_SOURCES_SCHEDULE, when it looks; empty or absent: only on demand.
        recipe: NVR_RECIPE, the recipe that the form proposes and that scheduled runs use.
        root: NVR_ROOT, where artefacts live.
        nvr_bin: NVR_BIN, the `nvr` command of the task environment.
        workdir: NVR_WORKDIR, the folder in which stages start; relative paths in recipes are read from there.
        gpu_pool: NVR_GPU_POOL, the pool of stages that want a GPU. `default_pool` exists everywhere.
        promotion_pool: NVR_PROMOTION_POOL, the pool of tasks that move the champion; one slot makes them take turns
            across DAGs (without it they still do within a DAG, and the journal keeps them apart in any case).
        approval_hours: NVR_APPROVAL_HOURS, how long a person has to approve a decision that needs it.
        retries: NVR_RETRIES of every stage.
        retry_delay_s: NVR_RETRY_DELAY_S, seconds before the first retry; doubles with each.
        kill_grace_s: NVR_KILL_GRACE_S, seconds between the request to stop and SIGKILL when a task is stopped; at most 3
            where the worker itself has to see to it (process, docker): Airflow ends that worker's task after 5.
        resources: NVR_RESOURCES, what stages ask of the machine where it differs from the table of stages, as JSON by stage
            (`default`: of all others): `{"default": {"cpu": 1}, "train": {"gpu": 8, "memory_gb": 256}}`.
        pass_env: NVR_PASS_ENV, names (comma-separated) that stages inherit besides the usual ones (see `environment`).
    """

    runner: str
    schedule: str | None
    on_new_data: bool
    sources_schedule: str | None
    recipe: str
    root: str
    nvr_bin: Path
    workdir: Path
    gpu_pool: str
    promotion_pool: str
    approval_hours: float
    retries: int
    retry_delay_s: float
    kill_grace_s: float
    resources: Mapping[str, Mapping[str, Any]]
    pass_env: tuple[str, ...]

    def resources_of(self, command: str, table: Resources) -> Resources:
        """What a stage asks for in this deployment; `table`: what the table of stages says."""
        asked = {**self.resources.get("default", {}), **self.resources.get(command, {})}
        if not table.gpu and "gpu" not in self.resources.get(command, {}):
            asked.pop("gpu", None)  # a default number of GPUs is for stages that want any
        return replace(table, **asked)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the settings; an empty value counts as absent."""
        return cls(
            runner=_text(environ, "NVR_RUNNER", "process"),
            schedule=_text(environ, "NVR_SCHEDULE") or None,
            on_new_data=_flag(environ, "NVR_ON_NEW_DATA"),
            sources_schedule=_text(environ, "NVR_SOURCES_SCHEDULE") or None,
            recipe=_text(environ, "NVR_RECIPE", "demo"),
            root=_text(environ, "NVR_ROOT", str(REPOSITORY / ".nvr" / "artifacts")),
            nvr_bin=Path(_text(environ, "NVR_BIN", str(REPOSITORY / ".venv" / "bin" / "nvr"))),
            workdir=Path(_text(environ, "NVR_WORKDIR", str(REPOSITORY))),
            gpu_pool=_text(environ, "NVR_GPU_POOL", "default_pool"),
            promotion_pool=_text(environ, "NVR_PROMOTION_POOL", "default_pool"),
            approval_hours=_number(environ, "NVR_APPROVAL_HOURS", 72, above=1e-6),
            retries=int(_number(environ, "NVR_RETRIES", 2)),
            retry_delay_s=_number(environ, "NVR_RETRY_DELAY_S", 60),
            kill_grace_s=_number(environ, "NVR_KILL_GRACE_S", 20),
            resources=_of_stages(environ, "NVR_RESOURCES"),
            pass_env=_names(environ, "NVR_PASS_ENV"),
        )


def _flag(environ: Mapping[str, str], name: str) -> bool:
    raw = environ.get(name, "").strip().lower()
    if raw not in ("", "0", "false", "no", "1", "true", "yes"):
        raise SettingsError(f"{name} is {raw!r}: expected 1 or 0")
    return raw in ("1", "true", "yes")


@dataclass(frozen=True)
class DockerSettings:
    """What the `docker` runner needs besides.

    Attributes:
        image: NVR_IMAGE, the task image.
        gpu_image: NVR_GPU_IMAGE, the image of stages that want a GPU; they then ask the engine for one. Empty: they
            run on the CPU in `image`.
        pull: NVR_DOCKER_PULL, `missing` (from the registry when the engine does not have it) or `never`.
        network: NVR_DOCKER_NETWORK, the network in which stages find MLflow and the store.
        volumes: NVR_DOCKER_VOLUMES, comma-separated `SOURCE:TARGET[:ro]`; a source is a volume's name or a folder of
            the engine's host. At /scratch stages keep work in progress and fetched copies.
        shm_gb: NVR_DOCKER_SHM_GB, shared memory of a stage, which data loaders with workers need.
        url: DOCKER_HOST, where the engine is.
        connection: NVR_DOCKER_CONNECTION, the Airflow connection with the registry's login, if it wants one.
    """

    image: str
    gpu_image: str
    pull: str
    network: str
    volumes: tuple[str, ...]
    shm_gb: float
    url: str
    connection: str

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> DockerSettings:
        """Read the settings. Raises SettingsError."""
        made = cls(
            image=_text(environ, "NVR_IMAGE"),
            gpu_image=_text(environ, "NVR_GPU_IMAGE"),
            pull=_text(environ, "NVR_DOCKER_PULL", "missing"),
            network=_text(environ, "NVR_DOCKER_NETWORK", "bridge"),
            volumes=_names(environ, "NVR_DOCKER_VOLUMES"),
            shm_gb=_number(environ, "NVR_DOCKER_SHM_GB", 1),
            url=_text(environ, "DOCKER_HOST", "unix:///var/run/docker.sock"),
            connection=_text(environ, "NVR_DOCKER_CONNECTION"),
        )
        if not made.image:
            raise SettingsError(
                "NVR_RUNNER is 'docker', but NVR_IMAGE is not set: name the task image, e.g. nvr-tasks:0.1.0"
            )
        if made.pull not in ("missing", "never"):
            raise SettingsError(f"NVR_DOCKER_PULL is {made.pull!r}: expected missing or never")
        for volume in made.volumes:
            parts = volume.split(":")
            if (
                len(parts) not in (2, 3)
                or not parts[0]
                or not parts[1].startswith("/")
                or parts[2:] not in ([], ["ro"])
            ):
                raise SettingsError(f"NVR_DOCKER_VOLUMES has {volume!r}: expected SOURCE:/TARGET or SOURCE:/TARGET:ro")
        return made


@dataclass(frozen=True)
class KubernetesSettings:
    """What the `kubernetes` runner needs besides.

    Attributes:
        image: NVR_IMAGE, the task image; by digest in production.
        gpu_image: NVR_GPU_IMAGE, the image of stages that want a GPU; they then ask for as many. Empty: they run on the CPU.
        pull_policy: NVR_K8S_PULL_POLICY, IfNotPresent, Always or Never.
        namespace: NVR_K8S_NAMESPACE, where stages run; empty: Airflow's own.
        service_account: NVR_K8S_SERVICE_ACCOUNT of the stages; it needs no rights in Kubernetes, only a cloud's.
        env_from: NVR_K8S_ENV_FROM, comma-separated `secret/NAME` and `configmap/NAME`: all the environment that stages get.
        pod_template: NVR_K8S_POD_TEMPLATE, a YAML file of kind Pod with what a cluster wants besides: node selector,
            tolerations, pull secrets, priority, volumes (its container is called `base`).
        gpu_pod_template: NVR_K8S_GPU_POD_TEMPLATE, the same for stages on a GPU.
        gpu_resource: NVR_K8S_GPU_RESOURCE, how nodes call their GPUs.
        scratch_gb: NVR_K8S_SCRATCH_GB, room for work in progress on the node.
        shm_gb: NVR_K8S_SHM_GB, shared memory, which counts as memory of the stage.
        start_timeout_s: NVR_K8S_START_TIMEOUT_S until a node is found, and once more until the image runs there.
        log_interval_s: NVR_K8S_LOG_INTERVAL_S between looks at a running stage's log; 0: only at its end.
        connection: NVR_K8S_CONNECTION, an Airflow connection to another cluster; empty: the one that Airflow runs in, or KUBECONFIG.
    """

    image: str
    gpu_image: str
    pull_policy: str
    namespace: str
    service_account: str
    env_from: tuple[str, ...]
    pod_template: str
    gpu_pod_template: str
    gpu_resource: str
    scratch_gb: float
    shm_gb: float
    start_timeout_s: float
    log_interval_s: float
    connection: str

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> KubernetesSettings:
        """Read the settings. Raises SettingsError."""
        made = cls(
            image=_text(environ, "NVR_IMAGE"),
            gpu_image=_text(environ, "NVR_GPU_IMAGE"),
            pull_policy=_text(environ, "NVR_K8S_PULL_POLICY", "IfNotPresent"),
            namespace=_text(environ, "NVR_K8S_NAMESPACE"),
            service_account=_text(environ, "NVR_K8S_SERVICE_ACCOUNT"),
            env_from=_names(environ, "NVR_K8S_ENV_FROM"),
            pod_template=_text(environ, "NVR_K8S_POD_TEMPLATE"),
            gpu_pod_template=_text(environ, "NVR_K8S_GPU_POD_TEMPLATE"),
            gpu_resource=_text(environ, "NVR_K8S_GPU_RESOURCE", "nvidia.com/gpu"),
            scratch_gb=_number(environ, "NVR_K8S_SCRATCH_GB", 50, above=0.001),
            shm_gb=_number(environ, "NVR_K8S_SHM_GB", 1, above=0.001),
            start_timeout_s=_number(environ, "NVR_K8S_START_TIMEOUT_S", 900, above=1),
            log_interval_s=_number(environ, "NVR_K8S_LOG_INTERVAL_S", 10),
            connection=_text(environ, "NVR_K8S_CONNECTION"),
        )
        if not made.image:
            raise SettingsError(
                "NVR_RUNNER is 'kubernetes', but NVR_IMAGE is not set: name the task image, e.g. registry/nvr-tasks@sha256:…"
            )
        if made.pull_policy not in ("IfNotPresent", "Always", "Never"):
            raise SettingsError(f"NVR_K8S_PULL_POLICY is {made.pull_policy!r}: expected IfNotPresent, Always or Never")
        for name in made.env_from:
            kind, _, of = name.partition("/")
            if kind not in ("secret", "configmap") or not of:
                raise SettingsError(f"NVR_K8S_ENV_FROM has {name!r}: expected secret/NAME or configmap/NAME")
        return made


def _text(environ: Mapping[str, str], name: str, default: str = "") -> str:
    return environ.get(name, "").strip() or default


def _names(environ: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in environ.get(name, "").split(",") if part.strip())


def _number(environ: Mapping[str, str], name: str, default: float, above: float | None = None) -> float:
    """A number from 0, or above a bound that is 0 for people: Airflow takes a span of no microsecond for none at all."""
    raw = environ.get(name, "").strip()
    if not raw:
        return default
    try:
        value = float(raw)
    except ValueError:
        value = math.nan
    if not (0 if above is None else above) <= value <= LARGEST:  # nor NaN
        wanted = "0 or more" if above is None else "above 0"
        raise SettingsError(f"{name} is {raw!r}: expected a number, {wanted} and at most {LARGEST:,}")
    return value


def _of_stages(environ: Mapping[str, str], name: str) -> dict[str, dict[str, Any]]:
    """Resources by stage, as JSON."""
    raw = environ.get(name, "").strip()
    if not raw:
        return {}
    try:
        given = json.loads(raw)
    except ValueError as error:
        raise SettingsError(f'{name} is no JSON ({error}): expected e.g. {{"train": {{"gpu": 8}}}}') from None
    stages = {"default", "begin", "finish", "rollback", *(row.name for row in (*STAGES, *ON_DEMAND))}
    kinds = {field.name for field in fields(Resources)}
    if not isinstance(given, dict):
        raise SettingsError(f"{name} is {raw!r}: expected an object by stage")
    for stage, asked in given.items():
        if stage not in stages:
            raise SettingsError(f"{name} names {stage!r}; there are: {', '.join(sorted(stages))}")
        if not isinstance(asked, dict) or not set(asked) <= kinds:
            raise SettingsError(f"{name} has {asked!r} for {stage}: expected an object of {', '.join(sorted(kinds))}")
        for kind, value in asked.items():
            least = 0 if kind == "gpu" else 0.001
            if (
                isinstance(value, bool)
                or not isinstance(value, int if kind == "gpu" else (int, float))
                or not least <= value <= LARGEST
            ):
                wanted = "a whole number from 0" if kind == "gpu" else "a number above 0"
                raise SettingsError(f"{name} has {stage}.{kind} {value!r}: expected {wanted}")
    return given
