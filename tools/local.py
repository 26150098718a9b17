"""Airflow and MLflow on one machine: `init`, `demo`, `up`, `down`, `env`. Standard library only; `make` calls it.

Everything it makes lies under one folder (`.nvr`), every port is on loopback, every secret is generated there.
Airflow is configured by environment variables alone, and `airflow_environment` is the one place that knows them.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import process_tree

REPOSITORY = Path(__file__).resolve().parents[1]
DAG_ID = "nv_retriever_retrain"
USER = "admin"
LOOPBACK = ("127.0.0.1", "localhost")
GPU_POOL, PROMOTION_POOL = "nvr_gpu", "nvr_promotion"
SERVERS = ("api-server", "mlflow")  # what tasks and their stages talk to
ORPHANS_GRACE_S = 3.0
# What a stage says, without what Airflow writes before it (its own time) and after it (the logger's name).
STORY = re.compile(r"\d\d:\d\d:\d\d \[[a-z]+\] .*?(?=\s+\[airflow\.task\.|$)")


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
    if not _alive(place, "mlflow"):
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
        _write_private(keys, json.dumps(made))
    passwords = home / "airflow-passwords.json"
    if not passwords.exists():
        _write_private(passwords, json.dumps({USER: secrets.token_urlsafe(12)}))
    found: dict[str, str] = json.loads(keys.read_text())
    return found


def _write_private(path: Path, text: str) -> None:
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
    _say("preparing Airflow's database")
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
                raise LocalError(f"`airflow {' '.join(arguments[:2])}` failed:\n{_tail(log)}\nfull log: {log}")
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


# ── demo ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def demo(place: Place, recipe: str, overrides: list[str]) -> int:
    """One run of the DAG in this terminal, without services; the full log goes to a file."""
    env = init(place)
    env["PYTHONUNBUFFERED"] = "1"  # lines as they come, not by the page
    check = [str(place.task_bin / "nvr"), "config", f"--recipe={recipe}", *(f"--set={o}" for o in overrides)]
    checked = subprocess.run(check, env=env, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if checked.returncode:
        _complain(checked.stderr.strip())
        return 1
    env.setdefault("NVR_RETRIES", "0")  # a person is watching: show the first failure, don't wait and try again
    conf = json.dumps({"recipe": recipe, "overrides": overrides})
    log = place.home / "demo.log"
    _say(
        f"running the DAG {DAG_ID} with recipe {recipe} {' '.join(overrides)}".rstrip() + f" (full log: {_short(log)})"
    )
    command = [str(place.airflow_bin / "airflow"), "dags", "test", DAG_ID, "--conf", conf]
    with (
        log.open("w", encoding="utf-8", buffering=1) as file,
        subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None  # noqa: S101  asked for as a pipe
        try:
            for line in process.stdout:
                file.write(line)
                if told := STORY.search(line):
                    _tell(told.group())
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGTERM)
            _complain(f"interrupted; finished artefacts are kept, run it again to go on (log: {_short(log)})")
            return 130
    if process.returncode:
        wrong = _mistakes(log.read_text(encoding="utf-8")) or [_tail(log)]
        _complain("\n".join(["", "the DAG run failed:", *wrong, f"full log: {log}"]))
        return 1
    return subprocess.run(
        [str(place.task_bin / "nvr"), "show", "runs/latest", "--root", env["NVR_ROOT"]],
        env=env,
        cwd=REPOSITORY,
        check=False,
    ).returncode


def _mistakes(log: str) -> list[str]:
    """The last error messages in a log, each once: what `nvr` said, and exceptions by name."""
    found = re.findall(r"nvr: .*?(?=\s+\[airflow\.task\.|$)|^[\w.]+(?:Error|Exception): .*", log, re.MULTILINE)
    return list(dict.fromkeys(found))[-8:]


# ── services ─────────────────────────────────────────────────────────────────────────────────────────────────────


def services(place: Place, env: dict[str, str]) -> dict[str, list[str]]:
    """Command lines of the services, in the order in which they start."""
    airflow, home = str(place.airflow_bin / "airflow"), place.home
    store = env["NVR_MLFLOW_BACKEND"] if env.get("NVR_MLFLOW_BACKEND") else f"sqlite:///{home / 'mlflow.db'}"
    artifacts = (home / "mlartifacts").as_uri()
    mlflow = [
        str(place.task_bin / "mlflow"),
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(place.mlflow_port),
        "--workers",
        "1",
    ]
    return {
        # A file location, since clients of the bare database (a demo without services) cannot use mlflow-artifacts:/.
        "mlflow": [
            *mlflow,
            "--backend-store-uri",
            store,
            "--default-artifact-root",
            artifacts,
            "--artifacts-destination",
            artifacts,
        ],
        "api-server": [
            airflow,
            "api-server",
            "--host",
            "127.0.0.1",
            "--port",
            str(place.airflow_port),
            "--workers",
            "1",
        ],
        "scheduler": [airflow, "scheduler", "--skip-serve-logs"],
        "dag-processor": [airflow, "dag-processor"],
        "triggerer": [airflow, "triggerer", "--skip-serve-logs"],
    }


def up(place: Place, timeout_s: float) -> None:
    """Start what is not running yet, wait until all of it is healthy, say where it is."""
    _refuse_other_ports(place)
    env = init(place)
    # Stages that Airflow starts log to the server, which has the same database as a demo without services.
    if env["MLFLOW_TRACKING_URI"].startswith("sqlite:"):
        env["MLFLOW_TRACKING_URI"] = place.mlflow_url
    commands = services(place, env)
    _end_orphans(place)
    for name, port in (("mlflow", place.mlflow_port), ("api-server", place.airflow_port)):
        if not _alive(place, name) and _taken(port):
            variable = "MLFLOW_PORT" if name == "mlflow" else "AIRFLOW_PORT"
            raise LocalError(f"port {port} for {name} is taken by another program: stop it, or `make up {variable}=…`")
    running: dict[str, int] = {}
    started = []
    try:
        for name, command in commands.items():
            running[name] = _alive(place, name)
            if not running[name]:
                running[name] = _start(place, name, command, env)
                started.append(name)
        _say(f"starting {', '.join(started)}" if started else "everything is running already")
        _wait(place, list(commands), time.monotonic() + timeout_s, datetime.now(UTC) if started else None)
    except BaseException:  # an interrupt too; what ran before goes on
        _stop(place, {name: running[name] for name in started})
        raise
    password = json.loads((place.home / "airflow-passwords.json").read_text())[USER]
    _tell(f"Airflow  {place.airflow_url}   user {USER}   password {password}")
    _tell(f"MLflow   {place.mlflow_url}")
    _tell(f"logs     {_short(place.home / 'logs')}   stop with `make down`")


def _refuse_other_ports(place: Place) -> None:
    """Raise LocalError if services run already on other ports; else keep the ports of those that will."""
    file, wanted = place.home / "run" / "ports.json", [place.airflow_port, place.mlflow_port]
    if file.exists() and any(_alive(place, name) for name in ("mlflow", "api-server")):
        airflow, mlflow = json.loads(file.read_text())
        if [airflow, mlflow] != wanted:
            raise LocalError(
                f"Airflow runs on port {airflow} and MLflow on {mlflow} already: `make down` first to move them"
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted))


def _webhooks(place: Place, env: dict[str, str]) -> dict[str, str]:
    """What the MLflow server alone gets: without its key, webhooks' secrets could not be read after a restart."""
    key = place.home / "webhook-key"
    if not key.exists():
        _write_private(key, base64.urlsafe_b64encode(os.urandom(32)).decode())
    return {"MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": key.read_text(), "MLFLOW_WEBHOOK_REQUEST_MAX_RETRIES": "8", **env}


def _start(place: Place, name: str, command: list[str], env: dict[str, str]) -> int:
    log = place.home / "logs" / f"{name}.log"
    try:
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                env=_webhooks(place, env) if name == "mlflow" else env,
                cwd=place.home,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
    except OSError as error:
        raise LocalError(f"cannot start {name}: {error}; run `make setup` first") from None
    (place.home / "run" / f"{name}.pid").write_text(f"{process.pid}\n")
    return process.pid


def _wait(place: Place, names: list[str], deadline: float, since: datetime | None) -> None:
    """Until MLflow answers, each Airflow component has reported a heartbeat since then, and the DAG is parsed."""
    missing: list[str] = []
    while time.monotonic() < deadline:
        for name in names:
            if not _alive(place, name):
                log = place.home / "logs" / f"{name}.log"
                raise LocalError(f"{name} ended while starting:\n{_tail(log)}\nfull log: {log}")
        missing = _unhealthy(place, since)
        if not missing:
            return
        time.sleep(0.5)
    raise LocalError(f"not healthy in time: {', '.join(missing)}; see {place.home / 'logs'}")


def _unhealthy(place: Place, since: datetime | None) -> list[str]:
    missing = [] if _fetch(f"{place.mlflow_url}/health") is not None else ["mlflow"]
    health = _fetch(f"{place.airflow_url}/api/v2/monitor/health")
    if not isinstance(health, dict):
        return [*missing, "api-server"]
    parts = ("scheduler", "dag_processor", "triggerer")
    missing += [part for part in parts if not _beats(part, health.get(part) or {}, since)]
    if missing:
        return missing
    password = json.loads((place.home / "airflow-passwords.json").read_text())[USER]
    token = _fetch(f"{place.airflow_url}/auth/token", {"username": USER, "password": password})
    if not isinstance(token, dict):
        return ["login"]
    errors = _fetch(f"{place.airflow_url}/api/v2/importErrors", token=token["access_token"])
    if isinstance(errors, dict) and errors.get("import_errors"):
        raise LocalError("a DAG file cannot be imported:\n" + str(errors["import_errors"][0].get("stack_trace", "")))
    found = _fetch(f"{place.airflow_url}/api/v2/dags/{DAG_ID}", token=token["access_token"])
    if not isinstance(found, dict) or found.get("is_stale"):
        return [f"DAG {DAG_ID}"]
    return []


def _beats(part: str, report: dict[str, Any], since: datetime | None) -> bool:
    """Whether a component is healthy by a heartbeat of its own: one that was killed counts as healthy for a while."""
    beat = report.get(f"latest_{part}_heartbeat")
    fresh = since is None or (beat is not None and datetime.fromisoformat(beat) >= since)
    return report.get("status") == "healthy" and fresh


def _fetch(url: str, body: dict[str, Any] | None = None, token: str | None = None) -> Any:
    """JSON (or text) that a service answers; None when it does not answer well."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, headers)  # noqa: S310  our own loopback addresses
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy
    try:
        with opener.open(request, timeout=5) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, OSError, TimeoutError):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def down(place: Place) -> None:
    """Stop all services."""
    _stop(place, {name: _alive(place, name) for name in services(place, dict(os.environ))})
    _end_orphans(place)


def _end_orphans(place: Place) -> None:
    """End what a killed service has left: processes of Airflow in our folder that no living service started (Linux)."""
    running = {pid for name in services(place, dict(os.environ)) if (pid := _alive(place, name))}
    ours = process_tree.descendants(running, process_tree.parents())
    orphans = []
    for cwd in process_tree.PROC.glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            pid = int(cwd.parent.name)
            if (
                cwd.readlink() == place.home
                and pid not in ours
                and process_tree.command_line(pid).startswith("airflow")
            ):
                orphans.append(pid)
    if orphans:
        process_tree.end(orphans, -1, ORPHANS_GRACE_S)
        _say(f"ended {len(orphans)} processes that a killed service had left")


def _stop(place: Place, pids: dict[str, int], grace_s: float = 30) -> None:
    """Stop services, those that run tasks first: a task that is cut off still tells the api-server, and is retried."""
    running = {name: pid for name, pid in reversed(pids.items()) if pid}
    servers = [pid for name, pid in running.items() if name in SERVERS]
    process_tree.end(
        [pid for name, pid in running.items() if name not in SERVERS], running.get("scheduler", -1), grace_s
    )
    process_tree.end(servers, -1, grace_s)
    for name in pids:
        (place.home / "run" / f"{name}.pid").unlink(missing_ok=True)
    _say(f"stopped {', '.join(running)}" if running else "nothing was running")


def _alive(place: Place, name: str) -> int:
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


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────


def _tell(text: str) -> None:
    print(text, flush=True)  # noqa: T201  the one place that prints


def _say(text: str) -> None:
    _tell(f"» {text}")


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201  the other one


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=REPOSITORY / ".nvr", help="folder of all state")
    parser.add_argument("--airflow-bin", type=Path, default=REPOSITORY / ".venv-airflow" / "bin")
    parser.add_argument("--task-bin", type=Path, default=REPOSITORY / ".venv" / "bin")
    parser.add_argument("--airflow-port", type=int, default=8080)
    parser.add_argument("--mlflow-port", type=int, default=5000)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init", help="secrets, database, pool")
    commands.add_parser("env", help="print the configuration as `export NAME=value` lines (contains secrets)")
    sub = commands.add_parser("demo", help="one run of the DAG in the terminal")
    sub.add_argument("--recipe", default="demo")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    sub = commands.add_parser("up", help="start the services")
    sub.add_argument("--timeout-s", type=float, default=600, help="how long to wait for the services to be healthy")
    commands.add_parser("down", help="stop the services")
    given = parser.parse_args(argv)
    place = Place(
        given.home.absolute(),
        given.airflow_bin.absolute(),
        given.task_bin.absolute(),
        given.airflow_port,
        given.mlflow_port,
    )
    try:
        if given.command == "init":
            init(place)
        elif given.command == "env":
            for name, value in sorted(airflow_environment(place).items()):
                if name.startswith(("AIRFLOW", "NVR_", "MLFLOW_")):
                    _tell(f"export {name}={shlex.quote(value)}")
        elif given.command == "demo":
            return demo(place, given.recipe, given.set)
        elif given.command == "up":
            up(place, given.timeout_s)
        elif given.command == "down":
            down(place)
    except KeyboardInterrupt:
        _complain("interrupted; run it again to go on")
        return 130
    except (LocalError, process_tree.ProcessError) as failure:
        _complain(f"error: {failure}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
