"""Runs in the Airflow environment: one throw-away Airflow home, configured by tools/local_place.py as `make demo` does."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FAKE_NVR = Path(__file__).with_name("fake_nvr.py")


sys.path.insert(0, str(REPOSITORY / "tools"))

import local_place  # noqa: E402

HOME = Path(tempfile.mkdtemp(prefix="nvr-airflow-tests-"))
PLACE = local_place.Place(HOME, Path(sys.executable).parent, HOME / "task-bin", 8080, 5000)
# Airflow reads its configuration when it is first imported, so this cannot wait for a fixture.
for _name in [name for name in os.environ if name.startswith(("AIRFLOW", "NVR_", "MLFLOW_"))]:
    del os.environ[_name]
os.environ.update(local_place.airflow_environment(PLACE))
os.environ["NVR_BIN"] = str(FAKE_NVR)
os.environ["NVR_RETRIES"] = "0"
sys.path.insert(0, str(REPOSITORY / "dags"))


@pytest.fixture(scope="session", autouse=True)
def _throw_away() -> Iterator[None]:
    yield
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def database() -> None:
    """A migrated Airflow database."""
    local_place.init(PLACE)


@pytest.fixture
def dags() -> Callable[..., Any]:
    """Parse dags/ with further environment variables: returns the DagBag."""
    from airflow.dag_processing.dagbag import DagBag

    def parse(**environ: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            # The package reads nothing at import, but a DAG file must see this environment, not an earlier one.
            return DagBag(dag_folder=str(REPOSITORY / "dags"))

    return parse


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """What the fake `nvr` was called with, in order."""
    file = tmp_path / "calls.jsonl"
    monkeypatch.setenv("NVR_FAKE_CALLS", str(file))

    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    return read


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    """Write an executable Python script: returns its path."""

    def write(body: str) -> str:
        path = tmp_path / "nvr"
        path.write_text(f"#!{sys.executable}\nimport json, os, signal, subprocess, sys, time\n{body}\n")
        path.chmod(0o755)
        return str(path)

    return write
