"""One installation on this machine: where it lives, its secrets, its configuration and its database. Standard library only.

Airflow is configured by environment variables alone, and `airflow_environment` is the one place that knows them.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import process_tree

REPOSITORY = Path(__file__).resolve().parents[1]
USER = "admin"
LOOPBACK = ("127.0.0.1", "localhost")
GPU_POOL, PROMOTION_POOL = "nvr_gpu", "nvr_promotion"


class LocalError(Exception):
    """Something a user can mend, said in one message."""


@dataclass(frozen=True)
class Place:
    """Where one installation lives.

    Attributes:
        home: folder of all state (databases, artefacts, logs, secrets).
        airflow_bin: folder of the Airflow environment's commands.
        task_bin: folder of the task environment's commands.
        airflow_port: of the api-server.
        mlflow_port: of the MLflow server.
    """

    home: Path
    airflow_bin: Path
    task_bin: Path
    airflow_port: int
    mlflow_port: int

    @property
    def airflow_url(self) -> str:
        """Where people and REST clients reach Airflow."""
        return f"http://127.0.0.1:{self.airflow_port}"

    @property
    def mlflow_url(self) -> str:
        """Where people and stages reach MLflow."""
        return f"http://127.0.0.1:{self.mlflow_port}"


# ── configuration ────────────────────────────────────────────────────────────────────────────────────────────────


def airflow_environment(place: Place) -> dict[str, str]:
    """The whole configuration of Airflow and of the DAG, from nothing but the place; NVR_* of the caller win."""
    home = place.home
    secret = _secrets(home)
    server = _running_mlflow(place)
    tracking = server or f"sqlite:///{home / 'mlflow.db'}"
    defaults = {
        "NVR_ROOT": str(home / "artifacts"),
        "NVR_BIN": str(place.task_bin / "nvr"),
        "NVR_WORKDIR": str(REPOSITORY),
        "NVR_GPU_POOL": GPU_POOL,
        "NVR_PROMOTION_POOL": PROMOTION_POOL,
        "NVR_MLFLOW_UI": server or place.mlflow_url,
        "MLFLOW_TRACKING_URI": tracking,
    }
    fixed = {
        "AIRFLOW_HOME": str(home / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__FERNET_KEY": secret["fernet_key"],
        "AIRFLOW__CORE__AUTH_MANAGER": "airflow.api_fastapi.auth.managers.simple.simple_auth_manager.SimpleAuthManager",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / "airflow-passwords.json"),
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{place.airflow_url}/execution/",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow' / 'airflow.db'}",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(place.airflow_port),
        "AIRFLOW__API__BASE_URL": place.airflow_url,
        "AIRFLOW__API__SECRET_KEY": secret["api_secret_key"],
        "AIRFLOW__API_AUTH__JWT_SECRET": secret["jwt_secret"],
        "AIRFLOW__LOGGING__COLORED_CONSOLE_LOG": "False",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "SCARF_ANALYTICS": "false",
        "PYTHONWARNINGS": "ignore",
    }
    # A configuration of the caller's other Airflow must not leak into this one, nor may its PYTHONPATH.
    mine = {
        k: v for k, v in os.environ.items() if not k.startswith("AIRFLOW") and k not in {"PYTHONPATH", "PYTHONHOME"}
    }
    return {**mine, **{k: v for k, v in defaults.items() if not mine.get(k)}, **fixed, **_no_proxy(mine)}


def _running_mlflow(place: Place) -> str:
    """Address of this installation's MLflow server, which may be on another port than today's default; empty: none runs."""
    if not alive(place, "mlflow"):
        return ""
    try:
        _, port = json.loads((place.home / "run" / "ports.json").read_text())
    except (OSError, ValueError):  # started before ports were kept
        return place.mlflow_url
    return f"http://127.0.0.1:{port}"


def _no_proxy(environ: dict[str, str]) -> dict[str, str]:
    """Both spellings, with loopback added: services and stages talk to each other there, never through a proxy."""
    made = {}
    for name, other in (("NO_PROXY", "no_proxy"), ("no_proxy", "NO_PROXY")):
        given = environ.get(name) or environ.get(other) or ""
        have = [part.strip() for part in given.split(",") if part.strip()]
        # A star stands for all hosts only when it stands alone.
        made[name] = given if "*" in have else ",".join([*have, *(host for host in LOOPBACK if host not in have)])
    return made


def _secrets(home: Path) -> dict[str, str]:
    """The generated keys, made on first use, readable by their owner only."""
    keys = home / "secrets.json"
    if not keys.exists():
        made = {
            "fernet_key": base64.urlsafe_b64encode(os.urandom(32)).decode(),
            "jwt_secret": secrets.token_urlsafe(48),
            "api_secret_key": secrets.token_urlsafe(48),
        }
        write_private(keys, json.dumps(made))
    passwords = home / "airflow-passwords.json"
    if not passwords.exists():
        write_private(passwords, json.dumps({USER: secrets.token_urlsafe(12)}))
    found: dict[str, str] = json.loads(keys.read_text())
    return found


def write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    try:
        os.link(draft, path)  # the first of two racers wins, the other one reads what it wrote
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def init(place: Place) -> dict[str, str]:
    """Create or migrate Airflow's database and the pools, once per Airflow version; returns the environment."""
    for folder in ("airflow", "run", "logs", "artifacts"):
        (place.home / folder).mkdir(parents=True, exist_ok=True)
    env = airflow_environment(place)
    stamp = place.home / "airflow" / "initialised"
    wanted = f"{_airflow_version(place)} {GPU_POOL} {PROMOTION_POOL}"  # a pool that is not there would stop its tasks
    if stamp.exists() and stamp.read_text() == wanted and (place.home / "airflow" / "airflow.db").exists():
        return env
    say("preparing Airflow's database")
    log = place.home / "logs" / "init.log"
    airflow = str(place.airflow_bin / "airflow")
    slots = str(max(1, _gpus()))
    for arguments in (
        ["db", "migrate"],
        ["pools", "set", GPU_POOL, slots, "NVR stages that want a GPU: one at a time per GPU"],
        ["pools", "set", PROMOTION_POOL, "1", "NVR tasks that move a champion: one at a time"],
    ):
        with log.open("ab") as file:
            if subprocess.run([airflow, *arguments], env=env, stdout=file, stderr=file, check=False).returncode:
                raise LocalError(f"`airflow {' '.join(arguments[:2])}` failed:\n{tail(log)}\nfull log: {log}")
    stamp.write_text(wanted)
    return env


def _airflow_version(place: Place) -> str:
    found = sorted(place.airflow_bin.parent.glob("lib/python*/site-packages/apache_airflow_core-*.dist-info"))
    if not found:
        raise LocalError(f"no Airflow in {place.airflow_bin.parent}: run `make setup` first")
    return found[-1].name


def _gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def alive(place: Place, name: str) -> int:
    """Pid of a service that we started and that still runs, else 0."""
    try:
        pid = int((place.home / "run" / f"{name}.pid").read_text())
        os.waitpid(pid, os.WNOHANG)  # a child of ours that ended would stay a zombie
    except ChildProcessError:
        pass
    except (OSError, ValueError):
        return 0
    # Pids are reused after a reboot: the process must be the service. Airflow's own titles name it, MLflow's path does.
    shown = process_tree.command_line(pid)
    return pid if ("mlflow" if name == "mlflow" else "airflow") in shown and "<defunct>" not in shown else 0


# ── the terminal ─────────────────────────────────────────────────────────────────────────────────────────────────


def tell(text: str) -> None:
    """A line of the result."""
    print(text, flush=True)  # noqa: T201  the one place that prints


def say(text: str) -> None:
    """What is being done now."""
    tell(f"» {text}")


def complain(text: str) -> None:
    """What went wrong, on stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201  the other one


def short(path: Path) -> Path:
    """A path as a person here would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
