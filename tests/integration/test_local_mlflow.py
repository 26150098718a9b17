"""One MLflow database, used with the server of `make up` and without it, in both orders. Task environment."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nvr_tasks.tracking import Tracking

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/local_services.py as a module."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    return importlib.import_module("local_services")


@pytest.fixture(autouse=True)
def _no_uri_left_behind() -> Iterator[None]:
    import mlflow

    yield
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)


@contextmanager
def serving(local: ModuleType, home: Path) -> Iterator[str]:
    """The very server that `make up` starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = local.Place(home, Path("/absent"), Path(sys.executable).parent, 1, port)
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    (home / "run").mkdir()
    (home / "logs").mkdir()
    pid = local._start(place, "mlflow", local.services(place, env)["mlflow"], env)
    try:
        deadline = time.monotonic() + 120
        while local._fetch(f"{place.mlflow_url}/health") is None:
            assert time.monotonic() < deadline, (home / "logs" / "mlflow.log").read_text()
            assert local.alive(place, "mlflow") == pid, (home / "logs" / "mlflow.log").read_text()
            time.sleep(0.2)
        yield place.mlflow_url
    finally:
        local._stop(place, {"mlflow": pid})


def use(uri: str, experiment: str, scratch: Path) -> Any:
    """What stages do: one run, an artefact of it, a registered model with an alias, read back as consumers do."""
    import mlflow
    from mlflow.pyfunc import PythonModel

    class Doubler(PythonModel):  # type: ignore[misc]
        def predict(self, model_input: list[str]) -> list[str]:
            return [text * 2 for text in model_input]

    tracking = Tracking(experiment, uri)
    run = tracking.run("the same pipeline run")
    tracking.log(run, metrics={"x": 1.0})
    tracking.client.log_dict(run.info.run_id, {"by": uri}, f"from-{uri.partition(':')[0]}.json")
    with mlflow.start_run(run_id=run.info.run_id, log_system_metrics=False):
        info = mlflow.pyfunc.log_model(name="model", python_model=Doubler(), pip_requirements=[])
    if tracking.alias(experiment, "champion") is None:
        tracking.client.create_registered_model(experiment)
    version = tracking.client.create_model_version(
        experiment, source=f"models:/{info.model_id}", run_id=run.info.run_id, model_id=info.model_id
    )
    tracking.point(experiment, "champion", version.version)
    for number in range(1, int(version.version) + 1):  # those of the other client too
        folder = scratch / f"{experiment}-{number}-{uri.partition(':')[0]}"
        mlflow.artifacts.download_artifacts(f"models:/{experiment}/{number}", dst_path=str(folder))
        assert (folder / "MLmodel").is_file()
    assert mlflow.pyfunc.load_model(f"models:/{experiment}@champion").predict(["ab"]) == ["abab"]
    return tracking


def test_with_the_server_and_without_in_both_orders(local: ModuleType, tmp_path: Path) -> None:
    home = tmp_path / "a b"  # clones lie in folders with spaces, too
    home.mkdir()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    bare = f"sqlite:///{home / 'mlflow.db'}"
    use(bare, "bare-first", scratch)
    with serving(local, home) as server:
        served = use(server, "served-first", scratch)
        tracking = use(server, "bare-first", scratch)
        run = tracking.run("the same pipeline run").info
        # The page in the browser reads through the server.
        address = f"{server}/get-artifact?path=from-sqlite.json&run_uuid={run.run_id}"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address) as answer:
            assert b"sqlite" in answer.read()
        assert served.client.get_experiment_by_name("served-first").artifact_location.startswith("file:")
    tracking = use(bare, "served-first", scratch)
    for experiment in ("bare-first", "served-first"):
        other = Tracking(experiment, bare)
        files = {f.path for f in other.client.list_artifacts(other.run("the same pipeline run").info.run_id)}
        assert files == {"from-sqlite.json", "from-http.json"}
        assert len(other.client.search_model_versions(f"name = '{experiment}'")) == 2
    made = {path.name for path in (home / "mlartifacts").rglob("from-*.json")}
    assert made == {"from-sqlite.json", "from-http.json"}


FIRST_USE = """
import sys
from nvr_tasks.tracking import Tracking
sys.stdin.readline()
print(Tracking("first", sys.argv[1]).experiment_id())
"""


def test_processes_that_meet_a_new_database_at_once_make_its_tables_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_USE, uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=300) for process in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], b"\n".join(errors for _, errors in ended).decode()
    assert len({out for out, _ in ended}) == 1
