"""tools/local.py: the configuration that demo, services and tests share."""

from __future__ import annotations

import json
import socket
import stat
from pathlib import Path
from types import ModuleType

import pytest


def place(local: ModuleType, home: Path, port: int = 8080) -> object:
    return local.Place(home, Path("/a/bin"), Path("/t/bin"), port, 5000)


def test_the_callers_airflow_does_not_leak_in(
    local: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTOR", "CeleryExecutor")
    monkeypatch.setenv("PYTHONPATH", "/x")
    monkeypatch.setenv("NVR_ROOT", "s3://bucket/x")
    monkeypatch.delenv("NVR_BIN", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    env = local.airflow_environment(place(local, tmp_path))
    assert env["AIRFLOW__CORE__EXECUTOR"] == "LocalExecutor"
    assert "PYTHONPATH" not in env
    assert env["NVR_ROOT"] == "s3://bucket/x"  # a person's own setting wins
    assert env["NVR_BIN"] == "/t/bin/nvr"
    assert env["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"


def test_secrets_are_made_once_and_private(local: ModuleType, tmp_path: Path) -> None:
    first = local.airflow_environment(place(local, tmp_path))
    again = local.airflow_environment(place(local, tmp_path))
    other = local.airflow_environment(place(local, tmp_path / "other"))
    key = "AIRFLOW__API_AUTH__JWT_SECRET"
    assert first[key] == again[key] != other[key]
    for name in ("secrets.json", "airflow-passwords.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert set(json.loads((tmp_path / "airflow-passwords.json").read_text())) == {"admin"}


def test_everything_listens_on_loopback_only(local: ModuleType, tmp_path: Path) -> None:
    for command in local.services(place(local, tmp_path), {}).values():
        assert "--host" not in command or command[command.index("--host") + 1] == "127.0.0.1"
        assert "--host" in command or "--skip-serve-logs" in command or command[1] == "dag-processor"


def test_a_taken_port_is_a_clear_error(local: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "init", local.airflow_environment)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(local.LocalError, match=rf"port {port} for mlflow is taken .*MLFLOW_PORT="):
            local.up(local.Place(tmp_path, Path("/a/bin"), Path("/t/bin"), port + 1, port), 1)


def test_the_story_is_cut_out_of_airflows_lines(local: ModuleType) -> None:
    line = "2026-11-23T21:47:40Z [info     ] 12:00:00 [begin] begin: start  [airflow.task.x.Y] loc=process.py:145"
    assert local.STORY.search(line).group() == "12:00:00 [begin] begin: start"
    assert local.STORY.search("2026-11-23T21:47:40Z [info     ] Task started [x]") is None


def test_down_with_nothing_running_is_fine(local: ModuleType, tmp_path: Path) -> None:
    local.down(place(local, tmp_path))


def test_a_failure_is_told_without_airflows_envelope(local: ModuleType) -> None:
    log = """2026-11-23T22:16:22Z [info     ] nvr: disk full: free some [airflow.task.x.Y] loc=process.py:145
2026-11-23T22:16:22Z [error    ] Task failed with exception     [task] loc=task_runner.py:1651
Traceback (most recent call last):
airflow.sdk.exceptions.AirflowException: nvr train failed with exit status 1: nvr: disk full: free some
"""
    assert local._mistakes(log) == [
        "nvr: disk full: free some",
        "airflow.sdk.exceptions.AirflowException: nvr train failed with exit status 1: nvr: disk full: free some",
    ]
