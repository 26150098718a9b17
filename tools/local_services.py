"""Airflow's and MLflow's services on this machine: started, watched until they are healthy, stopped. Standard library only."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from typing import Any

import process_tree
from local_place import USER, LocalError, Place, alive, init, say, short, tail, tell, write_private

DAG_ID = "nv_retriever_retrain"
SERVERS = ("api-server", "mlflow")  # what tasks and their stages talk to
ORPHANS_GRACE_S = 3.0


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
        if not alive(place, name) and _taken(port):
            variable = "MLFLOW_PORT" if name == "mlflow" else "AIRFLOW_PORT"
            raise LocalError(f"port {port} for {name} is taken by another program: stop it, or `make up {variable}=…`")
    running: dict[str, int] = {}
    started = []
    try:
        for name, command in commands.items():
            running[name] = alive(place, name)
            if not running[name]:
                running[name] = _start(place, name, command, env)
                started.append(name)
        say(f"starting {', '.join(started)}" if started else "everything is running already")
        _wait(place, list(commands), time.monotonic() + timeout_s, datetime.now(UTC) if started else None)
    except BaseException:  # an interrupt too; what ran before goes on
        _stop(place, {name: running[name] for name in started})
        raise
    password = json.loads((place.home / "airflow-passwords.json").read_text())[USER]
    tell(f"Airflow  {place.airflow_url}   user {USER}   password {password}")
    tell(f"MLflow   {place.mlflow_url}")
    tell(f"logs     {short(place.home / 'logs')}   stop with `make down`")


def _refuse_other_ports(place: Place) -> None:
    """Raise LocalError if services run already on other ports; else keep the ports of those that will."""
    file, wanted = place.home / "run" / "ports.json", [place.airflow_port, place.mlflow_port]
    if file.exists() and any(alive(place, name) for name in ("mlflow", "api-server")):
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
        write_private(key, base64.urlsafe_b64encode(os.urandom(32)).decode())
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
            if not alive(place, name):
                log = place.home / "logs" / f"{name}.log"
                raise LocalError(f"{name} ended while starting:\n{tail(log)}\nfull log: {log}")
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
    _stop(place, {name: alive(place, name) for name in services(place, dict(os.environ))})
    _end_orphans(place)


def _end_orphans(place: Place) -> None:
    """End what a killed service has left: processes of Airflow in our folder that no living service started (Linux)."""
    running = {pid for name in services(place, dict(os.environ)) if (pid := alive(place, name))}
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
        say(f"ended {len(orphans)} processes that a killed service had left")


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
    say(f"stopped {', '.join(running)}" if running else "nothing was running")


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
