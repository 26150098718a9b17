"""What a deployment decides, read from the environment (NVR_*) when a DAG file is parsed: no Variable, no database."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
        kill_grace_s: NVR_KILL_GRACE_S, seconds between SIGTERM and SIGKILL when a task is stopped.
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
    pass_env: tuple[str, ...]

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
