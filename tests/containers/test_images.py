"""What the images are: whose they run as, what is in them and what must not be. Built by `make test-docker` before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))

import containers  # noqa: E402

IMAGES = [f"{name}:dev" for name in containers.IMAGES.values()]
# Paths, as `find` patterns, that no image of ours may hold; those of the base image are not ours to judge.
# Names that no package has, of files that are there.
OUR_TESTS = [
    next((REPOSITORY / "tests").rglob(name)).name for name in ("fake_nvr.py", "mine_world.py", "storage_contract.py")
]
FORBIDDEN = {
    "package caches": ["*/.cache/*", "*/pip-cache/*", "/build/*", "/wheels/*", "*.whl"],
    "build tools": [
        "/opt/*/bin/uv",
        "/usr/bin/gcc*",
        "/usr/bin/cc",
        "/usr/bin/make",
        "/usr/bin/git",
        "/usr/local/bin/uv",
    ],
    "secrets": ["*/.env", "*/.netrc", "*/.aws/*", "*/.pypirc", "*/id_rsa*", "/root/.config/*", "*/secrets.json"],
    "files of the repository's tests": [f"*/{name}" for name in OUR_TESTS],
}


def docker(*words: str) -> str:
    done = subprocess.run([*containers.docker(), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def inside(image: str, *command: str, user: str = "0", options: tuple[str, ...] = ()) -> str:
    """Output of a command in a throw-away container without a network."""
    words = ["run", "--rm", "--network=none", f"--user={user}", f"--entrypoint={command[0]}", *options, image]
    return docker(*words, *command[1:])


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def config(image: str) -> dict[str, Any]:
    return dict(json.loads(docker("image", "inspect", image))[0]["Config"])


def test_nobody_is_root_and_the_commit_is_told(image: str) -> None:
    made = config(image)
    assert made["User"] == "10001:10001"
    labels = made["Labels"]
    assert labels["org.opencontainers.image.version"] == containers.version()
    assert labels["org.opencontainers.image.revision"] == containers.commit()
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert inside(image, "id", "-u", user="10001:10001").strip() == "10001"


def test_entrypoints_and_health_checks(image: str) -> None:
    made = config(image)
    serves = "tasks" not in image
    assert made["Entrypoint"] == [{"tasks": "nvr"}.get(image[4:9], image[4:].partition(":")[0])]
    assert bool(made.get("Healthcheck")) == serves


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_is_in_an_image_that_must_not_be(image: str, what: str) -> None:
    tests = " -o ".join(f"-path '{pattern}'" for pattern in FORBIDDEN[what])
    found = inside(
        image, "sh", "-c", f"find / -xdev \\( -path /proc -o -path /sys \\) -prune -o -type f \\( {tests} \\) -print"
    )
    base = inside(
        containers.base(),
        "sh",
        "-c",
        f"find / -xdev \\( -path /proc -o -path /sys \\) -prune -o -type f \\( {tests} \\) -print",
    )
    assert set(found.split()) - set(base.split()) == set()


def test_no_secret_and_no_index_is_in_the_history(image: str) -> None:
    told = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image) + json.dumps(config(image)["Env"])
    for word in ("PASSWORD=", "SECRET", "TOKEN=", "INDEX_URL=", "://"):
        assert word not in told.replace("http://127.0.0.1", ""), word


def test_only_the_place_for_work_can_be_written(image: str) -> None:
    """Nothing that runs is owned by who runs it."""
    mine = inside(
        image, "sh", "-c", "find / -xdev \\( -path /proc -o -path /sys -o -path /tmp \\) -prune -o -user 10001 -print"
    )
    allowed = {"nvr-tasks": {"/scratch"}, "nvr-airflow": {"/opt/airflow", "/opt/airflow/logs", "/opt/airflow/state"}}
    assert set(mine.split()) == allowed.get(image.partition(":")[0], set())


def test_a_stage_starts_on_a_read_only_root() -> None:
    options = ("--read-only", "--tmpfs=/scratch:uid=10001", "--cap-drop=ALL", "--security-opt=no-new-privileges")
    said = inside("nvr-tasks:dev", "nvr", "config", "--recipe=demo", user="10001:10001", options=options)
    assert "name: demo" in said
    code = "import torch, sentence_transformers, mteb, mlflow, numba, datasets, boto3; print(torch.__version__)"
    inside("nvr-tasks:dev", "python", "-c", code, user="10001:10001", options=options)


def test_the_airflow_image_holds_the_dags_and_no_torch() -> None:
    assert "nv_retriever_retrain.py" in inside("nvr-airflow:dev", "ls", "/opt/nvr-dags")
    listed = inside(
        "nvr-airflow:dev",
        "python",
        "-c",
        "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('airflow.providers.docker') is not None)",
    )
    assert listed.split() == ["None", "True"]


def test_mining_compiles_nothing_in_a_container() -> None:
    """It took four seconds in each; on a processor without AVX2, it does."""
    options = ("--read-only", "--tmpfs=/scratch:uid=10001", "--cap-drop=ALL")
    code = (
        "import numpy as np, torch; from nvr_tasks.mining import MiningSpec, kernels, mine; x = np.eye(8, 40, dtype=np.float32); "
        "mine(x, x, [[i] for i in range(8)], [MiningSpec(method='naive')], screen='float32'); "
        "print(sum(kernels.absorb.stats.cache_misses.values()), torch.backends.cpu.get_cpu_capability()[:3])"
    )
    said = inside("nvr-tasks:dev", "python", "-c", code, user="10001:10001", options=options).split()
    assert said == ["0", "AVX"] or said[1] != "AVX"
