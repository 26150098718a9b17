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

        def text(name: str, default: str) -> str:
            return environ.get(name, "").strip() or default

        return cls(
            runner=text("NVR_RUNNER", "process"),
            schedule=text("NVR_SCHEDULE", "") or None,
            on_new_data=_flag(environ, "NVR_ON_NEW_DATA"),
            sources_schedule=text("NVR_SOURCES_SCHEDULE", "") or None,
            recipe=text("NVR_RECIPE", "demo"),
            root=text("NVR_ROOT", str(REPOSITORY / ".nvr" / "artifacts")),
            nvr_bin=Path(text("NVR_BIN", str(REPOSITORY / ".venv" / "bin" / "nvr"))),
            workdir=Path(text("NVR_WORKDIR", str(REPOSITORY))),
            gpu_pool=text("NVR_GPU_POOL", "default_pool"),
            promotion_pool=text("NVR_PROMOTION_POOL", "default_pool"),
            approval_hours=_number(environ, "NVR_APPROVAL_HOURS", 72, above=1e-6),
            retries=int(_number(environ, "NVR_RETRIES", 2)),
            retry_delay_s=_number(environ, "NVR_RETRY_DELAY_S", 60),
            kill_grace_s=_number(environ, "NVR_KILL_GRACE_S", 20),
            pass_env=tuple(name.strip() for name in text("NVR_PASS_ENV", "").split(",") if name.strip()),
        )


def _flag(environ: Mapping[str, str], name: str) -> bool:
    raw = environ.get(name, "").strip().lower()
    if raw not in ("", "0", "false", "no", "1", "true", "yes"):
        raise SettingsError(f"{name} is {raw!r}: expected 1 or 0")
    return raw in ("1", "true", "yes")


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
