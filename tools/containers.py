"""Images and the services of docker/compose.yaml: `images`, `image-gpu`, `up`, `down`. Standard library; `make` calls it.

Secrets are generated once into docker/.env, readable by its owner only, and never printed but for Airflow's password.
"""

from __future__ import annotations

import argparse
import base64
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCKER = REPOSITORY / "docker"
BUILD_SETTINGS = (  # of the caller's environment, which a build may need to reach its packages
    "BASE", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_STRATEGY",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
TAG = "dev"
IMAGES = {"tasks": "nvr-tasks", "airflow": "nvr-airflow", "mlflow": "nvr-mlflow"}


class ContainersError(Exception):
    """Something a user can mend, said in one message."""


def docker() -> list[str]:
    """The docker client: $DOCKER, else the first one found whose engine answers and that can build with BuildKit.

    Raises:
        ContainersError: there is none.
    """
    if os.environ.get("DOCKER"):
        return shlex.split(os.environ["DOCKER"])
    found = [Path(folder) / "docker" for folder in os.environ.get("PATH", "").split(os.pathsep)]
    candidates = [str(path) for path in found if os.access(path, os.X_OK) and path.is_file()]
    if not candidates:
        raise ContainersError("there is no `docker` here: install Docker Engine, or set DOCKER to its client")
    for client in candidates:
        if not _works([client, "version"]):
            raise ContainersError(
                "the Docker engine does not answer: start it, join the group `docker`, or set DOCKER_HOST"
            )
        # Clients from 23 on build with the plugin buildx, and not every package brings it; older ones need none.
        if _works([client, "buildx", "version"]) or _major(client) < 23:
            return [client]
    raise ContainersError(f"{candidates[0]} cannot build with BuildKit: install its plugin buildx, or set DOCKER")


def compose() -> list[str]:
    """Docker Compose: $COMPOSE, the client's plugin, or the one in the task environment."""
    if os.environ.get("COMPOSE"):
        return shlex.split(os.environ["COMPOSE"])
    if _works([*docker(), "compose", "version"]):
        return [*docker(), "compose"]
    beside = REPOSITORY / ".venv" / "bin" / "docker-compose"
    standalone = str(beside) if beside.exists() else shutil.which("docker-compose")
    if standalone is None:
        raise ContainersError("there is no Docker Compose here: install its plugin, or run `make setup`")
    return [standalone]


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> int:
    try:
        return subprocess.run(command, env=environment, check=False).returncode
    except OSError as error:
        raise ContainersError(f"cannot run {command[0]} ({error.strerror}): correct DOCKER or COMPOSE") from None


def _works(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _major(client: str) -> int:
    asked = [client, "version", "--format", "{{.Client.Version}}"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    return int(said.partition(".")[0]) if said.partition(".")[0].isdigit() else 0


def base() -> str:
    """The image that all of ours are made from."""
    return os.environ.get("BASE") or "python:3.11-slim-bookworm"


def version() -> str:
    """Of the package."""
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["version"])


def commit() -> str:
    """Of the checkout, with `-dirty` behind it when files differ; `unknown` outside of one."""
    asked = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def build(name: str, tag: str, flavour: str = "cpu", extras: str = "") -> str:
    """Build one image; returns its reference."""
    image = f"{IMAGES[name]}{'-gpu' if flavour == 'gpu' else ''}:{tag}"
    if name == "tasks" and flavour == "cpu":
        fetch_cpu_torch()
    command = [*docker(), "build", "--file", str(DOCKER / f"{name}.Dockerfile"), "--tag", image]
    given = {"VERSION": version(), "COMMIT": commit()}
    if name == "tasks":
        given |= {"FLAVOUR": flavour} | ({"EXTRAS": extras} if extras else {})
    command += [f"--build-arg={key}={value}" for key, value in given.items()]
    command += [f"--build-arg={key}" for key in BUILD_SETTINGS if os.environ.get(key)]  # values by environment
    print(f"» building {image}", flush=True)
    if _run([*command, str(REPOSITORY)], {**os.environ, "DOCKER_BUILDKIT": "1"}):
        raise ContainersError(f"building {image} failed; the reason is above")
    return image


def fetch_cpu_torch() -> None:
    """Put torch's CPU build beside the Dockerfile if pip here knows where to get one: then nobody asks pytorch.org for it."""
    wheels = DOCKER / "wheels" / "cpu"
    if list(wheels.glob("torch-*.whl")):
        return
    [pin] = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    asked = [*docker(), "version", "--format", "{{.Server.Arch}}"]
    arch = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    platform = f"manylinux_2_28_{ {'amd64': 'x86_64', 'arm64': 'aarch64'}.get(arch, arch) }"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version=3.11",
    ]
    command += [f"--platform={platform}", f"--dest={wheels}", f"{pin}+cpu"]
    subprocess.run(command, capture_output=True, check=False)  # none: the Dockerfile knows another way


def environment_file(path: Path) -> dict[str, str]:
    """The settings of the services; secrets that are not there yet are made and added."""
    text = path.read_text() if path.exists() else ""
    found, fresh = _settings(text), _fresh()
    given = {key: os.environ[key] for key in fresh if key in os.environ}  # which Compose lets win
    if missing := {key: value for key, value in fresh.items() if key not in found | given}:
        head = "# Secrets and settings of docker/compose.yaml; that file names all that can be set here.\n"
        before = ("" if text.endswith("\n") else "\n") if text else head
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as file:
            file.write(before + "".join(f"{key}={value}\n" for key, value in missing.items()))
        path.chmod(0o600)
    return found | missing | given


def _settings(text: str) -> dict[str, str]:
    lines = [line.strip().removeprefix("export ").partition("=") for line in text.splitlines()]
    return {key.strip(): value.strip() for key, equals, value in lines if equals and not key.startswith("#")}


def _fresh() -> dict[str, str]:
    return {
        "POSTGRES_PASSWORD": secrets.token_hex(16),
        "AIRFLOW_DB_PASSWORD": secrets.token_hex(16),
        "MLFLOW_DB_PASSWORD": secrets.token_hex(16),
        "S3_ACCESS_KEY": f"nvr{secrets.token_hex(8)}",
        "S3_SECRET_KEY": secrets.token_hex(24),
        "AIRFLOW_ADMIN_PASSWORD": secrets.token_hex(8),
        "AIRFLOW_FERNET_KEY": base64.urlsafe_b64encode(os.urandom(32)).decode(),
        "AIRFLOW_JWT_SECRET": secrets.token_hex(32),
        "AIRFLOW_API_SECRET_KEY": secrets.token_hex(32),
        "DOCKER_GID": str(_socket_group()),
    }


def _socket_group() -> int:
    """Group that may open the engine's socket on this machine."""
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    try:
        return Path(host.removeprefix("unix://")).stat().st_gid
    except OSError:
        return 0


def run_compose(arguments: argparse.Namespace, *words: str) -> None:
    """One command of Compose on this project. Raises ContainersError."""
    command = [*compose(), "--project-name", arguments.project, "--env-file", str(arguments.env_file)]
    tagged = {f"NVR_{name.upper()}_IMAGE": f"{image}:{arguments.tag}" for name, image in IMAGES.items()}
    tagged["NVR_IMAGE"] = tagged.pop("NVR_TASKS_IMAGE")
    chosen = os.environ | (tagged if arguments.tag != TAG else {})
    if _run([*command, "--file", str(DOCKER / "compose.yaml"), *words], chosen):
        raise ContainersError(f"`docker compose {words[0]}` failed; the reason is above")


def up(arguments: argparse.Namespace) -> None:
    """Make what is missing, start everything, wait until it is healthy, say where it is."""
    if not arguments.no_build:
        for name in IMAGES:
            build(name, arguments.tag)
    settings = environment_file(arguments.env_file)
    run_compose(arguments, "up", "--detach", "--wait", "--wait-timeout", str(arguments.timeout))
    ports = {key: os.environ.get(key) or settings.get(key) for key in ("AIRFLOW_PORT", "MLFLOW_PORT", "S3_PORT")}
    print(
        f"Airflow  http://127.0.0.1:{ports['AIRFLOW_PORT'] or 8080}   user admin   password {settings['AIRFLOW_ADMIN_PASSWORD']}"
    )
    print(f"MLflow   http://127.0.0.1:{ports['MLFLOW_PORT'] or 5000}")
    print(f"S3       http://127.0.0.1:{ports['S3_PORT'] or 8333}   keys in {arguments.env_file}")


def down(arguments: argparse.Namespace) -> None:
    """Stop everything; data stays in its volumes unless asked otherwise."""
    if not arguments.env_file.exists():
        return
    run_compose(arguments, "down", "--remove-orphans", *(["--volumes"] if arguments.volumes else []))
    if arguments.volumes:  # made by the first stage, so Compose does not know it
        _run([*docker(), "volume", "rm", "--force", f"{arguments.project}-scratch"])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tag", default=TAG, help="of images that are built, and, unless it is the default, of those started"
    )
    parser.add_argument("--project", default="nvr", help="of Compose; volumes and network bear its name")
    parser.add_argument("--env-file", type=Path, default=DOCKER / ".env")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("images")
    commands.add_parser("image-gpu")
    start = commands.add_parser("up")
    start.add_argument("--no-build", action="store_true")
    start.add_argument("--timeout", type=int, default=600, help="seconds")
    stop = commands.add_parser("down")
    stop.add_argument("--volumes", action="store_true", help="and delete all data")
    arguments = parser.parse_args()
    try:
        if arguments.command == "images":
            for name in IMAGES:
                build(name, arguments.tag)
        elif arguments.command == "image-gpu":
            build("tasks", arguments.tag, "gpu", os.environ.get("EXTRAS", "tasks"))
        elif arguments.command == "up":
            up(arguments)
        else:
            down(arguments)
    except ContainersError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
