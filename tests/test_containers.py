"""What can be said about images and services without an engine: Dockerfiles are linted, compose.yaml is resolved."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DOCKER = REPOSITORY / "docker"
DOCKERFILES = sorted([*DOCKER.glob("*.Dockerfile"), *(REPOSITORY / "tests" / "containers").rglob("*.Dockerfile")])
OURS = ("airflow", "mlflow")  # services that run from images made here


def tool(name: str) -> str:
    """A command of the task environment or of the machine; the test is skipped, aloud, where there is none."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: make setup")
    return found


@pytest.fixture(scope="module")
def containers() -> ModuleType:
    """tools/containers.py."""
    spec = importlib.util.spec_from_file_location("nvr_containers", REPOSITORY / "tools" / "containers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def composed(containers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """compose.yaml, resolved with a fresh .env."""
    file = tmp_path_factory.mktemp("compose") / ".env"
    containers.environment_file(file)
    assert file.stat().st_mode & 0o777 == 0o600
    command = [tool("docker-compose"), "--project-name", "nvr-static", "--env-file", str(file)]
    done = subprocess.run(
        [*command, "--file", str(DOCKER / "compose.yaml"), "config", "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_dockerfiles_pass_the_linter() -> None:
    command = [tool("hadolint"), "--no-color", "--failure-threshold=warning", *map(str, DOCKERFILES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("dockerfile", sorted(DOCKER.glob("*.Dockerfile")), ids=lambda path: path.name)
def test_images_keep_to_the_house(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    assert "# syntax=" not in text, "no frontend from a registry: an engine without one could not build"
    assert "<<" not in text, "heredocs need a newer BuildKit than Docker 20.10 has"
    assert text.startswith("#")
    for wanted in (
        "ARG BASE=",
        "AS packages",
        "\nUSER 10001:10001\n",
        "ENTRYPOINT [",
        "image.version=",
        "image.revision=",
    ):
        assert wanted in text, wanted
    final = text.rpartition("\nFROM ")[2]
    assert "pip install" not in final
    assert text.index("COPY constraints.txt") < text.index("uv pip install"), "pins come before code"
    assert ":latest" not in text


def test_the_build_context_is_an_allow_list() -> None:
    rules = [r for r in (REPOSITORY / ".dockerignore").read_text().splitlines() if r and not r.startswith("#")]
    assert rules[0] == "*"
    assert {r for r in rules if r.startswith("!")} == {
        "!pyproject.toml", "!constraints.txt", "!README.md", "!LICENSE", "!nvr_tasks", "!dags", "!docker/wheels",
    }  # fmt: skip


def test_only_loopback_ports_are_opened(composed: dict[str, Any]) -> None:
    ports = [port for service in composed["services"].values() for port in service.get("ports", [])]
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}
    assert sorted(port["target"] for port in ports) == [5000, 8080, 8333]


def test_services_are_pinned_checked_and_without_privileges(composed: dict[str, Any]) -> None:
    for name, service in composed["services"].items():
        tag = service["image"].rpartition(":")[2]
        assert tag not in ("", "latest", service["image"]), f"{name} has an image without a version"
        assert not service.get("privileged"), name
        assert "healthcheck" in service or name in ("airflow-init", "airflow-api-server", "mlflow"), (
            f"{name} has no health check, neither here nor in its image"
        )
        if name.startswith(OURS):
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name


def test_only_the_scheduler_may_start_containers_and_knows_what_stages_need(composed: dict[str, Any]) -> None:
    with_socket, with_keys = set(), set()
    for name, service in composed["services"].items():
        if any("docker.sock" in str(volume) for volume in service.get("volumes", [])):
            with_socket.add(name)
        if name.startswith("airflow") and any(key.startswith("AWS_") for key in service["environment"]):
            with_keys.add(name)
    assert with_socket == with_keys == {"airflow-scheduler"}


def test_data_lies_in_named_volumes(composed: dict[str, Any]) -> None:
    for service, target in {"postgres": "/var/lib/postgresql/data", "s3": "/data"}.items():
        [volume] = [v for v in composed["services"][service]["volumes"] if v["target"] == target]
        assert volume["type"] == "volume"
        assert volume["source"] in composed["volumes"]


def test_settings_of_ones_own_get_the_secrets_beside_them(
    containers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / ".env"
    own.write_text("# mine\nAIRFLOW_PORT=18080\nexport POSTGRES_PASSWORD=old\nS3_ACCESS_KEY = mine")
    monkeypatch.setenv("S3_SECRET_KEY", "of the shell")
    first = containers.environment_file(own)
    assert (first["AIRFLOW_PORT"], first["S3_ACCESS_KEY"], first["POSTGRES_PASSWORD"]) == ("18080", "mine", "old")
    assert first["S3_SECRET_KEY"] == "of the shell"
    assert [own.read_text().count(f"{key}") for key in ("S3_ACCESS_KEY", "POSTGRES_PASSWORD", "S3_SECRET_KEY")] == [
        1,
        1,
        0,
    ]
    assert first.keys() == containers.environment_file(tmp_path / "fresh").keys() | {"AIRFLOW_PORT"}
    assert containers.environment_file(own) == first
    assert own.stat().st_mode & 0o777 == 0o600


def test_services_start_from_the_tag_that_was_asked_for(tmp_path: Path) -> None:
    """And data goes with its services, the stages' scratch, too; a wrong COMPOSE is said in a line."""
    fake = tmp_path / "docker"
    fake.write_text('#!/bin/sh\necho "$NVR_IMAGE $NVR_AIRFLOW_IMAGE $NVR_MLFLOW_IMAGE" "$@"\n')
    fake.chmod(0o755)
    (tmp_path / ".env").touch()
    command = [sys.executable, str(REPOSITORY / "tools" / "containers.py"), "--env-file", str(tmp_path / ".env")]
    command += ["--project", "p"]

    def run(*more: str, compose: Path = fake) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "", "DOCKER": str(fake), "COMPOSE": str(compose)}
        return subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=False)

    started = run("--tag", "1.2", "up", "--no-build").stdout
    assert started.startswith("nvr-tasks:1.2 nvr-airflow:1.2 nvr-mlflow:1.2 --project-name p ")
    assert run("up", "--no-build").stdout.startswith("   --project-name p "), "or whatever .env says"
    stopped = run("down", "--volumes").stdout
    assert " down --remove-orphans --volumes\n" in stopped
    assert stopped.endswith(" volume rm --force p-scratch\n")
    assert "volume rm" not in run("down").stdout
    wrong = run("down", compose=tmp_path / "none")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert "correct DOCKER or COMPOSE" in wrong.stderr


def test_secrets_are_made_once_and_never_by_rule(containers: ModuleType, tmp_path: Path) -> None:
    first = containers.environment_file(tmp_path / "a")
    assert containers.environment_file(tmp_path / "a") == first
    other = containers.environment_file(tmp_path / "b")
    secret = [key for key in first if key != "DOCKER_GID"]
    assert all(first[key] != other[key] and len(first[key]) >= 16 for key in secret)
    defaults = (DOCKER / "compose.yaml").read_text()
    for key in secret:
        assert f"${{{key}:-" not in defaults, f"{key} has a default in compose.yaml"
