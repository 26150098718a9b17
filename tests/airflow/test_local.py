"""tools/local*.py: the configuration that demo, services and tests share, and the services."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import local
import local_place
import local_services
import process_tree
import pytest


def place(home: Path, port: int = 8080) -> local_place.Place:
    return local_place.Place(home, Path("/a/bin"), Path("/t/bin"), port, 5000)


def test_the_callers_airflow_does_not_leak_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTOR", "CeleryExecutor")
    monkeypatch.setenv("PYTHONPATH", "/x")
    monkeypatch.setenv("NVR_ROOT", "s3://bucket/x")
    monkeypatch.delenv("NVR_BIN", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    env = local_place.airflow_environment(place(tmp_path))
    assert env["AIRFLOW__CORE__EXECUTOR"] == "LocalExecutor"
    assert "PYTHONPATH" not in env
    assert env["NVR_ROOT"] == "s3://bucket/x"  # a person's own setting wins
    assert env["NVR_BIN"] == "/t/bin/nvr"
    assert env["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"


def test_secrets_are_made_once_and_private(tmp_path: Path) -> None:
    first = local_place.airflow_environment(place(tmp_path))
    again = local_place.airflow_environment(place(tmp_path))
    other = local_place.airflow_environment(place(tmp_path / "other"))
    key = "AIRFLOW__API_AUTH__JWT_SECRET"
    assert first[key] == again[key] != other[key]
    for name in ("secrets.json", "airflow-passwords.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert set(json.loads((tmp_path / "airflow-passwords.json").read_text())) == {"admin"}


def test_everything_listens_on_loopback_only(tmp_path: Path) -> None:
    for command in local_services.services(place(tmp_path), {}).values():
        assert "--host" not in command or command[command.index("--host") + 1] == "127.0.0.1"
        assert "--host" in command or "--skip-serve-logs" in command or command[1] == "dag-processor"


def test_a_taken_port_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_services, "init", local_place.airflow_environment)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(local_place.LocalError, match=rf"port {port} for mlflow is taken .*MLFLOW_PORT="):
            local_services.up(local_place.Place(tmp_path, Path("/a/bin"), Path("/t/bin"), port + 1, port), 1)


def test_the_story_is_cut_out_of_airflows_lines() -> None:
    line = "2026-11-23T21:47:40Z [info     ] 12:00:00 [begin] begin: start  [airflow.task.x.Y] loc=process.py:145"
    assert local.STORY.search(line).group() == "12:00:00 [begin] begin: start"
    assert local.STORY.search("2026-11-23T21:47:40Z [info     ] Task started [x]") is None


def test_down_with_nothing_running_is_fine(tmp_path: Path) -> None:
    local_services.down(place(tmp_path))


def test_a_failure_is_told_without_airflows_envelope() -> None:
    log = """2026-11-23T22:16:22Z [info     ] nvr: disk full: free some [airflow.task.x.Y] loc=process.py:145
2026-11-23T22:16:22Z [error    ] Task failed with exception     [task] loc=task_runner.py:1651
Traceback (most recent call last):
airflow.sdk.exceptions.AirflowException: nvr train failed with exit status 1: nvr: disk full: free some
"""
    assert local._mistakes(log) == [
        "nvr: disk full: free some",
        "airflow.sdk.exceptions.AirflowException: nvr train failed with exit status 1: nvr: disk full: free some",
    ]


# ── proxies ──────────────────────────────────────────────────────────────────────────────────────────────────────

PROXY_NAMES = ("HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"no_proxy": "example.org"}, "example.org,127.0.0.1,localhost"),
        ({"NO_PROXY": "example.org, localhost"}, "example.org,localhost,127.0.0.1"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_loopback_never_goes_through_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], wanted: str
) -> None:
    from nvr_airflow.environment import task_environment

    for name in PROXY_NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HTTP_PROXY": "http://127.0.0.1:9", **given}.items():
        monkeypatch.setenv(name, value)
    services = local_place.airflow_environment(place(tmp_path))
    for env in (services, task_environment(services)):
        assert (env["NO_PROXY"], env["no_proxy"]) == (wanted, wanted)
        assert env["HTTP_PROXY"] == "http://127.0.0.1:9"


def test_make_keeps_loopback_from_the_proxy(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text('include Makefile\nshow: ; @echo "$$NO_PROXY $$no_proxy"\n')
    plain = {k: v for k, v in os.environ.items() if k not in PROXY_NAMES}
    for given, wanted in (
        ({}, "127.0.0.1,localhost"),
        ({"no_proxy": "x.org"}, "x.org,127.0.0.1,localhost"),
        ({"NO_PROXY": "*"}, "*"),
    ):
        done = subprocess.run(
            ["make", "-s", "-f", str(tmp_path / "Makefile"), "show"],
            env={**plain, "HTTP_PROXY": "http://127.0.0.1:9", **given},
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [wanted, wanted]


# ── services ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def service(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that passes for the MLflow server of the place, and for nothing of Airflow's."""
    process = subprocess.Popen(["mlflow", "600"], executable=shutil.which("sleep"), start_new_session=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mlflow.pid").write_text(f"{process.pid}\n")
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_service_is_seen_without_ps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: subprocess.Popen[bytes]
) -> None:
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("no /proc here")
    monkeypatch.setenv("PATH", str(tmp_path))
    here = place(tmp_path)
    assert local_place.alive(here, "mlflow") == service.pid
    (tmp_path / "run" / "scheduler.pid").write_text(f"{service.pid}\n")
    assert local_place.alive(here, "scheduler") == 0, "another program has its pid now"
    service.send_signal(signal.SIGKILL)
    service.wait()
    assert local_place.alive(here, "mlflow") == 0


def test_a_service_is_seen_without_proc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setattr(process_tree, "PROC", tmp_path / "absent")
    tool = tmp_path / "bin" / "ps"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\n[ "$*" = "-o command= -p {service.pid}" ] && echo /t/bin/mlflow server\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    assert local_place.alive(place(tmp_path), "mlflow") == service.pid
    tool.unlink()
    with pytest.raises(process_tree.ProcessError, match=f"cannot see process {service.pid}: `ps` cannot be run"):
        local_place.alive(place(tmp_path), "mlflow")


def serve(home: Path, ports: list[int]) -> subprocess.Popen[bytes]:
    """Something that looks like this installation's MLflow server."""
    (home / "run").mkdir()
    (home / "run" / "ports.json").write_text(json.dumps(ports))
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "mlflow"])
    (home / "run" / "mlflow.pid").write_text(str(process.pid))
    return process


def test_a_server_on_other_ports_is_used_and_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "NVR_MLFLOW_UI"):
        monkeypatch.delenv(name, raising=False)
    server = serve(tmp_path, [8181, 5151])
    try:
        env = local_place.airflow_environment(place(tmp_path))
        assert env["MLFLOW_TRACKING_URI"] == env["NVR_MLFLOW_UI"] == "http://127.0.0.1:5151"
        with pytest.raises(local_place.LocalError, match="Airflow runs on port 8181 and MLflow on 5151 already"):
            local_services.up(place(tmp_path), 1)
        assert local_place.alive(place(tmp_path), "mlflow") == server.pid
    finally:
        server.kill()
        server.wait()


def test_stopping_one_service_leaves_the_others_known(tmp_path: Path) -> None:
    server = serve(tmp_path, [8080, 5000])
    try:
        (tmp_path / "run" / "scheduler.pid").write_text("1")
        local_services._stop(place(tmp_path), {"scheduler": 0})
        assert not (tmp_path / "run" / "scheduler.pid").exists()
        assert local_place.alive(place(tmp_path), "mlflow") == server.pid
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("failure", ["no ps", "interrupt", "no airflow"])
def test_up_that_fails_leaves_nothing_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    mlflow = tmp_path / "bin" / "mlflow"
    mlflow.parent.mkdir()
    mlflow.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "import time; time.sleep(600)" mlflow\n')
    mlflow.chmod(0o755)
    for folder in ("run", "logs"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(local_services, "init", local_place.airflow_environment)
    monkeypatch.setattr(local_services, "_taken", lambda _: False)
    here = local_place.Place(tmp_path, Path("/absent"), mlflow.parent, 1, 1)
    every = local_services.services
    if failure != "no airflow":
        monkeypatch.setattr(local_services, "services", lambda *given: {"mlflow": every(*given)["mlflow"]})
    if failure == "no ps":
        monkeypatch.setattr(process_tree, "PROC", tmp_path / "absent")
        monkeypatch.setenv("PATH", str(tmp_path))
    if failure == "interrupt":
        monkeypatch.setattr(local_services, "_unhealthy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    started: list[int] = []
    start = local_services._start
    monkeypatch.setattr(local_services, "_start", lambda *given: started.append(start(*given)) or started[-1])
    wanted = {"no ps": process_tree.ProcessError, "interrupt": KeyboardInterrupt, "no airflow": local_place.LocalError}
    with pytest.raises(wanted[failure]):
        local_services.up(here, 30)
    [pid] = started
    deadline = time.monotonic() + 10
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        assert time.monotonic() < deadline, "the service still runs"
        time.sleep(0.05)


def test_stop_ends_processes_that_left_the_group_and_ignore_the_request(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    child = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    leader = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", leader], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    family = process_tree.descendants({process.pid}, process_tree.parents())
    assert len(family) == 2
    local_services._stop(place(tmp_path), {"scheduler": process.pid}, grace_s=0.5)
    process.wait(10)
    assert not family & process_tree.parents().keys()
