"""Which operator runs a stage: the one place that reads NVR_RUNNER. A new runner is one more entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nvr_airflow.operator import StageOperator
from nvr_airflow.settings import DockerSettings, KubernetesSettings, Settings, SettingsError
from nvr_tasks.stages import Resources


def _process(settings: Settings, resources: Resources) -> tuple[type[StageOperator], dict[str, Any]]:  # noqa: ARG001
    """A process takes what the machine has: resources are kept by the pool."""
    from nvr_airflow.process import ProcessStageOperator

    return ProcessStageOperator, {
        "nvr_bin": str(settings.nvr_bin),
        "workdir": str(settings.workdir),
        "kill_grace_s": settings.kill_grace_s,
        "pass_env": settings.pass_env,
    }


def _docker(settings: Settings, resources: Resources) -> tuple[type[StageOperator], dict[str, Any]]:
    """A container of its own per stage, beside Airflow's on the same engine."""
    from nvr_airflow.docker import DockerStageOperator

    return DockerStageOperator, {
        "docker": DockerSettings.from_env(),
        "wants": resources,
        "kill_grace_s": settings.kill_grace_s,
        "pass_env": settings.pass_env,
    }


def _kubernetes(settings: Settings, resources: Resources) -> tuple[type[StageOperator], dict[str, Any]]:
    """A pod of its own per stage."""
    from nvr_airflow.kubernetes import KubernetesStageOperator

    if settings.pass_env:
        raise SettingsError(
            f"NVR_PASS_ENV ({', '.join(settings.pass_env)}) reaches no pod: put the values into a ConfigMap or a Secret and "
            "name it in NVR_K8S_ENV_FROM"
        )
    return KubernetesStageOperator, {
        "kubernetes": KubernetesSettings.from_env(),
        "wants": resources,
        "kill_grace_s": settings.kill_grace_s,
    }


Runner = Callable[[Settings, Resources], tuple[type[StageOperator], dict[str, Any]]]

RUNNERS: Mapping[str, Runner] = {"docker": _docker, "kubernetes": _kubernetes, "process": _process}


def runner(settings: Settings) -> Runner:
    """The deployment's runner: from settings and a stage's resources to an operator class and its own arguments.

    Raises:
        SettingsError: there is none of that name.
    """
    try:
        return RUNNERS[settings.runner]
    except KeyError:
        raise SettingsError(f"NVR_RUNNER is {settings.runner!r}; available: {', '.join(sorted(RUNNERS))}") from None


def gpus_of(settings: Settings, resources: Resources) -> int | None:
    """GPUs that a stage of such resources is given; None where it has those of the worker's machine."""
    _, own = runner(settings)(settings, resources)
    containers = own.get("docker") or own.get("kubernetes")
    if containers is None:
        return None
    return resources.gpu if containers.gpu_image else 0
