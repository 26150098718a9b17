"""The chart's values: closed, documented, and the same in schema, README and files that are shared."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml
from chart_rendering import CHART, EXAMPLES, template

REPOSITORY = CHART.parents[1]
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)
# Maps whose keys are the user's or Kubernetes'.
OPEN = {"strings", "variables", "anything", "objects", "quantities", "env"}


@pytest.fixture(scope="module")
def chart_docs() -> ModuleType:
    """tools/chart_docs.py."""
    spec = importlib.util.spec_from_file_location("nvr_chart_docs", REPOSITORY / "tools" / "chart_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def resolved(schema: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A schema behind a reference, and the reference's name."""
    name = schema.get("$ref", "").removeprefix("#/definitions/")
    return name, SCHEMA["definitions"][name] if name else schema


def maps(values: dict[str, Any], schema: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all maps that are closed; asserts that schema and values.yaml have the same keys in them."""
    yield path
    assert schema["additionalProperties"] is False, path
    where = ".".join(path) or "values.yaml"
    assert path[-1:] == ("resources",) or set(schema["properties"]) == set(values), where
    for key, below in schema["properties"].items():
        name, below_schema = resolved(below)
        if isinstance(values.get(key), dict) and "properties" in below_schema:
            yield from maps(values[key], below_schema, (*path, key))
        elif below_schema.get("type") == "object":
            assert name in OPEN or (where, key) in {("values.yaml", "recipes"), ("tasks", "resources")}, (
                f"{where}.{key} is open"
            )


def changed(path: tuple[str, ...], key: str, value: object) -> dict[str, Any]:
    values = copy.deepcopy(VALUES)
    at = values
    for part in path:
        at = at[part]
    at[key] = value
    return values


def test_the_schema_knows_every_value_and_no_other() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    closed = list(maps(VALUES, SCHEMA))
    assert len(closed) > 40
    for path in closed:
        assert not VALIDATOR.is_valid(changed(path, "unheardOf", "x")), f"{'.'.join(path)} takes any key"


def test_the_schema_refuses_every_wrong_type() -> None:
    VALIDATOR.validate(VALUES)
    for path in maps(VALUES, SCHEMA):
        at: Any = VALUES
        for part in path:
            at = at[part]
        for key, value in at.items():
            wrong: object = 7.5 if not isinstance(value, int | float) or isinstance(value, bool) else "many"
            assert not VALIDATOR.is_valid(changed(path, key, wrong)), f"{'.'.join((*path, key))} takes {wrong!r}"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("airflow.sheduler.replicas=2", "'sheduler' not allowed"),
        ("mlflow.replicas=two", "/mlflow/replicas"),
        ("tasks.image.tag=latest", "/tasks/image/tag"),
        ("airflow.image.digest=sha256:12", "/airflow/image/digest"),
        ("image.pullPolicy=Sometimes", "/image/pullPolicy"),
        ("image.registry=https://registry.example.com", "/image/registry"),
        ("tasks.root=/data", "/tasks/root"),
        ("postgresql.runAsUser=0", "/postgresql/runAsUser"),
        ("recipes.mine.name=mine", "/recipes/mine"),
        ("tasks.resources.train.gpus=8", "'gpus' not allowed"),
    ],
)
def test_helm_says_which_value_is_wrong(setting: str, said: str) -> None:
    done = template("--set", setting)
    assert done.returncode != 0
    assert said in done.stderr


def test_the_table_of_values_is_generated(chart_docs: ModuleType) -> None:
    source, readme = (CHART / "values.yaml").read_text(), (CHART / "README.md").read_text()
    assert chart_docs.documented(readme, source) == readme, "run make chart-docs"
    assert len(chart_docs.values(source)) > 150
    for example in EXAMPLES:
        assert f"examples/{example}.yaml" in readme
    with pytest.raises(chart_docs.ChartDocsError, match=r"a\.b \(line 3"):
        chart_docs.values("a:\n  # a comment of another kind\n  b: 1\n")


def test_a_database_that_never_answers_is_given_up(tmp_path: Path) -> None:
    def wait(uri: str) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, str(CHART / "files" / "wait_for_database.py"), "0"]
        settings = {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": uri}
        return subprocess.run(script, env=settings, capture_output=True, text=True, check=False)

    assert wait(f"sqlite:///{tmp_path}/there.db").returncode == 0
    done = wait(f"sqlite:///{tmp_path}/no/such/folder.db")
    assert done.returncode == 1
    assert "the database does not answer: unable to open database file" in done.stderr
    assert "Traceback" not in done.stderr


class _Services(BaseHTTPRequestHandler):
    """Airflow's and MLflow's answers, with the faults that a test chose."""

    faults: frozenset[str] = frozenset()

    def _answer(self, body: object, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self) -> None:
        if self.path == "/api/v2/monitor/health":
            names = ("metadatabase", "scheduler", "dag_processor", "triggerer")
            self._answer({n: {"status": "unhealthy" if n in self.faults else "healthy"} for n in names})
        elif self.path == "/health":
            self._answer("OK", 503 if "mlflow" in self.faults else 200)
        elif self.headers["Authorization"] != "Bearer t":
            self._answer({}, 401)
        elif self.path == "/api/v2/importErrors":
            errors = (
                [{"filename": "nv_retriever_retrain.py", "stack_trace": "SettingsError"}]
                if "import" in self.faults
                else []
            )
            self._answer({"import_errors": errors})
        else:
            self._answer({}, 404 if "dag" in self.faults or self.path != "/api/v2/dags/nv_retriever_retrain" else 200)

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer({"access_token": "t"}, 201 if sent == {"username": "admin", "password": "right"} else 401)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("", "are healthy, nv_retriever_retrain is there"),
        ("triggerer", "Airflow's triggerer is unhealthy"),
        ("mlflow", "/health: <HTTPError 503"),
        ("import", "nv_retriever_retrain.py cannot be imported: SettingsError"),
        ("dag", "Airflow has no DAG nv_retriever_retrain"),
        ("password", "/auth/token: <HTTPError 401"),
    ],
)
def test_helm_test_tells_what_is_wrong(fault: str, said: str) -> None:
    handler = type("Handler", (_Services,), {"faults": frozenset({fault})})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        environment = {
            "AIRFLOW_URL": url, "MLFLOW_URL": url, "TIMEOUT_S": "0",
            "AIRFLOW_ADMIN_PASSWORD": "wrong" if fault == "password" else "right",
        }  # fmt: skip
        asked = [sys.executable, str(CHART / "files" / "health.py")]
        done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
        server.shutdown()
    assert done.returncode == (1 if fault else 0), done.stderr
    assert said in done.stdout
