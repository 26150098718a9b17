"""The whole workflow on a real MLflow server: promoted, reused, held, killed, and what consumers get."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nvr_tasks.artifacts import Store

MODEL = "nv-retriever-demo"
PACKAGES = "packages=[joblib,pyarrow,tqdm]"
TINY = (
    f"data.sources.0.origin.{PACKAGES}",
    f"data.benchmark.0.origin.{PACKAGES}",
    "data.dev_queries=8",
    "train.steps=12",
    "train.batch_size=8",
    "train.max_tokens=32",
    "train.learning_rate=0.0005",
    "gate.min_gain_over_base=0.01",
    "gate.min_queries=5",  # the benchmark is tiny, too
    "runtime.checkpoint_every_steps=4",
    "runtime.embed_part_texts=32",
    "runtime.device=cpu",
)


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server on loopback."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)  # noqa: S310 - our own server
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of ours; MLflow leaves some of its own there, too."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("NVR_", "AWS_", "MLFLOW_"))}


@dataclass
class Workplace:
    """A folder with its artefacts, and the server that its runs talk to."""

    folder: Path
    server: str

    @property
    def root(self) -> str:
        return str(self.folder / "artifacts")

    def command(self, *arguments: str, settings: tuple[str, ...] = ()) -> tuple[list[str], dict[str, str]]:
        overrides = [word for setting in (*TINY, *settings) for word in ("--set", setting)]
        command = [sys.executable, "-m", "nvr_tasks", *arguments, "--root", self.root, "--recipe", "demo", *overrides]
        return command, clean_environment() | {"MLFLOW_TRACKING_URI": self.server, "OMP_WAIT_POLICY": "passive"}

    def nvr(self, *arguments: str, settings: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        command, environment = self.command(*arguments, settings=settings)
        return subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=600, check=False
        )

    def run(self, *settings: str) -> str:
        done = self.nvr("run", settings=settings)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def model(self, fingerprint: str = "*") -> tuple[str, str]:
        """Digest of a model's files (the only one's by default) and its training log."""
        [manifest] = Path(self.root, "model").glob(f"{fingerprint}/manifest.json")
        return json.loads(manifest.read_text())["stats"]["digest"], (manifest.parent / "log.jsonl").read_text()

    def digests(self, kind: str) -> dict[str, list[str]]:
        """Per artefact of a kind: digests of its files."""
        manifests = Path(self.root, kind).glob("*/manifest.json")
        return {m.parent.name: [f["sha256"] for f in json.loads(m.read_text())["files"]] for m in manifests}


@pytest.fixture(scope="module")
def client(mlflow_server: str):
    from mlflow import MlflowClient

    return MlflowClient(mlflow_server, mlflow_server)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, mlflow_server: str) -> tuple[Workplace, str]:
    """The first run, undisturbed; the other tests come after it in this order."""
    place = Workplace(tmp_path_factory.mktemp("place"), mlflow_server)
    return place, place.run()


def champion(client) -> str:
    return str(client.get_model_version_by_alias(MODEL, "champion").version)


def test_the_first_run_is_promoted_as_version_1(first: tuple[Workplace, str], client) -> None:
    _, table = first
    assert "version 1 (registered now)" in table
    assert "verdict  promote" in table
    assert re.search(r"✓ gain over the untrained base: .* at least \+0.0100 wanted", table)
    assert champion(client) == "1"


def test_consumers_get_the_vectors_that_training_saved(first: tuple[Workplace, str], mlflow_server: str) -> None:
    """Loaded as a consumer does: by alias, in another process, with nothing of ours."""
    place, _ = first
    [folder] = (p.parent for p in Path(place.root, "model").glob("*/manifest.json"))
    code = f"""
import mlflow, numpy as np
from sentence_transformers import SentenceTransformer
mlflow.set_tracking_uri({mlflow_server!r})
model = mlflow.sentence_transformers.load_model("models:/{MODEL}@champion")
texts = ["hello world", "parallel loops over many files", "a" * 3000]
ours = SentenceTransformer({str(folder)!r}).encode(texts)
assert np.array_equal(model.encode(texts), ours), np.abs(model.encode(texts) - ours).max()
assert model.max_seq_length == 128
served = mlflow.pyfunc.load_model("models:/{MODEL}@champion")
assert np.array_equal(served.predict(texts, params={{"kind": "passage"}}), ours)
print("equal")
"""
    program = [sys.executable, "-c", code]
    done = subprocess.run(
        program, env=clean_environment(), capture_output=True, text=True, timeout=300, check=False, cwd=place.folder
    )
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_a_copied_root_tells_of_its_runs(first: tuple[Workplace, str], tmp_path: Path) -> None:
    place, _ = first
    shutil.copytree(place.root, tmp_path / "copy")
    command = [sys.executable, "-m", "nvr_tasks", "show", "runs/latest", f"--root={tmp_path / 'copy'}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert f"report     {(tmp_path / 'copy').as_uri()}/decision/" in shown.stdout


def test_the_version_carries_its_lineage(first: tuple[Workplace, str], client) -> None:
    place, _ = first
    version = client.get_model_version(MODEL, "1")
    [model] = (p.parent.name for p in Path(place.root, "model").glob("*/manifest.json"))
    assert version.tags["nvr.model_artifact"] == model
    assert version.tags["nvr.recipe"] == "demo"
    mining = json.loads(version.tags["nvr.mining"])
    assert (mining["threshold"], mining["duplicate_similarity"], mining["depth"]) == (0.95, 0.98, 50)
    assert json.loads(version.tags["nvr.teacher"])["dtype"] == "float32"
    assert (Path(place.root) / "dataset" / version.tags["nvr.dataset"]).is_dir()
    files = [f.path for f in client.list_artifacts(version.run_id, "decision")]
    assert files == ["decision/decision.json", "decision/report.html"]


def test_a_second_run_reuses_every_stage_and_registers_nothing(first: tuple[Workplace, str], client) -> None:
    place, _ = first
    table = place.run()
    for stage in ("download", "embed", "mine", "train", "register", "evaluate"):
        assert re.search(rf"^{stage} .* reused ", table, re.MULTILINE), table
    assert "registered before; nothing new was registered" in table
    assert "verdict  hold" in table
    assert "this version is the champion already" in table
    assert len(client.search_model_versions(f"name='{MODEL}'")) == 1
    assert champion(client) == "1"


def test_one_finished_mlflow_run_per_pipeline_run(first: tuple[Workplace, str], client) -> None:
    place, _ = first
    experiment = client.get_experiment_by_name("nv-retriever")
    runs = client.search_runs([experiment.experiment_id])
    pipeline_runs = {p.name for p in Path(place.root, "runs").iterdir() if p.is_dir()}
    assert {r.data.tags["nvr.pipeline_run"] for r in runs} == pipeline_runs
    assert len(runs) == len(pipeline_runs)
    assert {r.info.status for r in runs} == {"FINISHED"}
    for run in runs:  # a run that reused the negatives shows their report as well
        assert [f.path for f in client.list_artifacts(run.info.run_id, "mining")] == ["mining/report.html"]


def test_another_threshold_needs_no_new_search(first: tuple[Workplace, str]) -> None:
    place, _ = first
    before = place.digests("candidates")
    done = place.nvr("mine", settings=("mine.threshold=0.9",))
    assert done.returncode == 0, done.stderr
    assert place.digests("candidates") == before
    assert len(place.digests("negatives")) == 2


def test_a_ruined_model_is_held_and_the_champion_stays(first: tuple[Workplace, str], client) -> None:
    place, _ = first
    # On ten queries a ruined model, whose scores tie, may beat another by luck; by that much it cannot.
    table = place.run("train.learning_rate=1", "gate.min_gain_over_champion=0.3")
    assert "verdict  hold" in table
    assert re.search(r"✗ gain over the champion: ", table)
    assert champion(client) == "1"
    assert str(client.get_model_version_by_alias(MODEL, "challenger").version) == "2"


def test_a_dry_run_moves_nothing(first: tuple[Workplace, str], client) -> None:
    place, _ = first
    table = place.run("gate.promote=false", "gate.min_gain_over_champion=-1", "gate.max_loss_per_task=1", "seed=18")
    assert "verdict  promote" in table
    assert "not promoted: dry run" in table
    assert champion(client) == "1"


def test_a_champion_that_moved_meanwhile_is_compared_with_first(first: tuple[Workplace, str], client) -> None:
    place, _ = first
    settings = ("seed=18", "gate.min_gain_over_champion=-1", "gate.max_loss_per_task=1")  # wins against any champion
    decided = place.nvr("gate", "--decide-only", settings=settings)
    assert decided.returncode == 0, decided.stderr
    decision = re.search(r"decision: (\S+)", decided.stdout)
    assert decision is not None
    client.set_registered_model_alias(MODEL, "champion", "2")
    try:
        done = place.nvr("promote", "--input", f"decision={decision[1]}", settings=settings)
        assert done.returncode == 0, done.stderr
        assert "the champion is version 2 now, the decision compared with version 1: comparing again" in done.stderr
        assert champion(client) == "3"
        history = place.nvr("history")
        assert re.search(r"found +1 → 2 +unknown", history.stdout), history.stdout
        back = place.nvr("rollback", "--to", "1", "--reason", "only a test")
        assert back.returncode == 0, back.stderr
        assert champion(client) == "1"
        assert re.search(r"rollback +3 → 1 .*\n +only a test", place.nvr("history").stdout)
    finally:
        client.set_registered_model_alias(MODEL, "champion", "1")


@pytest.mark.parametrize(
    ("makes", "sign"),
    [
        ("embeddings", "artifacts/parts/*/*.npy"),
        ("negatives", None),  # too quick to be met half-way from outside
        ("model", "artifacts/checkpoints/*/*/done.json"),
    ],
)
def test_a_killed_run_is_taken_up_and_ends_as_if_undisturbed(
    makes: str, sign: str | None, first: tuple[Workplace, str], tmp_path: Path, client
) -> None:
    place, _ = first
    other = Workplace(tmp_path, place.server)
    if sign is None:
        kill_in(other, "from nvr_tasks.mined import selecting as owner", "write_selection")
    else:
        kill_when(other, lambda: any(tmp_path.glob(sign)))
    assert not any(Path(other.root, makes).glob("*/manifest.json")), "killed too late to show anything"
    table = other.run()
    assert "registered before; nothing new was registered" in table, "the same model is the same version"
    for kind in ("dataset", "embeddings", "candidates", "negatives"):
        theirs, ours = other.digests(kind), place.digests(kind)
        assert theirs == {fingerprint: ours.get(fingerprint) for fingerprint in theirs}, kind
    assert other.model() == place.model(other.digests("model").popitem()[0]), "weights or log of the resumed run differ"
    assert running(client) == [], "the killed run left an MLflow run behind"
    assert not list(Path(other.root, "tmp").glob("work-*")), "scratch of the killed process is still there"
    assert Store(other.root).storage.list("checkpoints") == []


def running(client) -> list[str]:
    experiment = client.get_experiment_by_name("nv-retriever")
    return [r.info.run_name for r in client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'")]


def test_killed_between_the_move_and_its_record_the_run_still_ends_as_promoted(
    first: tuple[Workplace, str], client
) -> None:
    """The alias has moved, `promote` has not reported: taking the run up again must not call that a hold."""
    place, _ = first
    settings = ("seed=19", "register.model_name=other")
    tracking = "from nvr_tasks.tracking import Tracking as owner"
    kill_in(place, tracking, "point", when="arguments[-2] == 'champion'", settings=settings)
    assert client.get_model_version_by_alias("other", "champion").tags["nvr.decision"]
    table = place.run(*settings)
    assert "verdict  promote" in table
    assert re.search(r"^promote .* ran ", table, re.MULTILINE)
    assert "challenger" not in client.get_registered_model("other").aliases
    assert running(client) == []


def test_promoting_one_version_leaves_another_run_s_challenger(first: tuple[Workplace, str], client) -> None:
    place, _ = first
    settings = ("gate.min_gain_over_champion=-1", "gate.max_loss_per_task=1", "seed=20", "register.model_name=other")
    table = place.run(*settings, "gate.promote=false")
    assert "other version 2 (registered now)" in table
    decided = place.nvr("gate", "--decide-only", settings=settings)
    decision = re.search(r"decision: (\S+)", decided.stdout)
    assert decision is not None, decided.stderr
    source = client.get_model_version("other", "1").source
    waiting = client.create_model_version("other", source=source, model_id=source.removeprefix("models:/"))
    client.set_registered_model_alias("other", "challenger", waiting.version)
    done = place.nvr("promote", "--input", f"decision={decision[1]}", settings=settings)
    assert done.returncode == 0, done.stderr
    aliases = client.get_registered_model("other").aliases
    assert {name: str(version) for name, version in aliases.items()} == {
        "champion": "2",
        "previous": "1",
        "challenger": str(waiting.version),
    }


def test_a_registration_of_another_registry_promotes_nothing_here(first: tuple[Workplace, str], client) -> None:
    """Version 2, the ruined model, is another one here than the registration says."""
    place, _ = first
    digest = client.get_model_version(MODEL, "2").tags["nvr.model_digest"]
    client.set_model_version_tag(MODEL, "2", "nvr.model_digest", "another model")
    try:
        done = place.nvr("gate", "--decide-only", settings=("train.learning_rate=1",))
        assert done.returncode == 1
        assert "is not the model that was scored" in done.stderr
    finally:
        client.set_model_version_tag(MODEL, "2", "nvr.model_digest", digest)


def test_on_s3_the_same_run_makes_the_same_artefacts(first: tuple[Workplace, str], tmp_path: Path, s3_server) -> None:
    """Everything through a real S3 server: checkpoints, records and artefacts; fingerprints and bytes as on a disk."""
    import boto3

    place, _ = first
    bucket = "workflow"
    settings = s3_server.environment()
    s3 = boto3.client(
        "s3",
        endpoint_url=s3_server.endpoint,
        aws_access_key_id=s3_server.key,
        aws_secret_access_key=s3_server.secret,
        region_name="us-east-1",
    )
    s3.create_bucket(Bucket=bucket)
    command, environment = Workplace(tmp_path, place.server).command("run")
    command[command.index("--root") + 1] = f"s3://{bucket}/nvr"
    environment |= {**settings, "NVR_SCRATCH": str(tmp_path / "scratch")}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    keys = [o["Key"] for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket) for o in page["Contents"]]
    for kind in ("dataset", "benchmark", "embeddings", "candidates", "negatives"):
        manifests = [k for k in keys if k.startswith(f"nvr/{kind}/") and k.endswith("/manifest.json")]
        assert manifests, kind
        for key in manifests:
            manifest = json.loads(s3.get_object(Bucket=bucket, Key=key)["Body"].read())
            assert place.digests(kind)[manifest["fingerprint"]] == [f["sha256"] for f in manifest["files"]], kind
    assert not [k for k in keys if "/checkpoints/" in k]
    assert s3_server.secret not in done.stderr + done.stdout


def kill_when(place: Workplace, ready: Callable[[], bool]) -> None:
    """Start a run and SIGKILL it as soon as `ready`."""
    command, environment = place.command("run")
    story = place.folder / "killed.log"
    with story.open("w") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=place.folder, start_new_session=True, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 300
        while not ready():
            assert process.poll() is None, f"the run ended before it could be killed: {story.read_text()[-2000:]}"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def kill_in(place: Workplace, owner: str, function: str, when: str = "True", settings: tuple[str, ...] = ()) -> None:
    """Run with a SIGKILL at the end of a function of ours, reached through the import statement `owner`."""
    code = f"""
import os, signal, sys
from nvr_tasks.cli import main
{owner}
original = owner.{function}
def fatal(*arguments):
    original(*arguments)
    if {when}:
        os.kill(os.getpid(), signal.SIGKILL)
owner.{function} = fatal
sys.exit(main(sys.argv[1:]))
"""
    command, environment = place.command("run", settings=settings)
    program = [sys.executable, "-c", code, *command[3:]]
    done = subprocess.run(
        program, env=environment, cwd=place.folder, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_an_unreachable_mlflow_is_named(tmp_path: Path) -> None:
    place = Workplace(tmp_path, "http://127.0.0.1:9")
    command, environment = place.command("begin")
    done = subprocess.run(
        command,
        env=environment | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "cannot use MLflow at http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr
