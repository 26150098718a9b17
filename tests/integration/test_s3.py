"""A real S3 server as artefact root: the contract of storage, refusals, corruption, two publishers at once."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from storage_contract import MULTIPART, StorageContract

from nvr_tasks.artifacts import MANIFEST, Artifact, Identity, Store
from nvr_tasks.config import Recipe
from nvr_tasks.errors import NvrError
from nvr_tasks.pipeline import Context, execute
from nvr_tasks.registry import ChampionChangedError, Registry
from nvr_tasks.stages import stage
from nvr_tasks.storage import Storage, open_storage
from nvr_tasks.tracking import Tracking

if TYPE_CHECKING:
    from conftest import S3Server

pytestmark = pytest.mark.slow

WRONG_SECRET = "not-the-secret-of-this-server"
SHARED = Identity("words", 1, {"shared": True})


class TestSeaweedFS(StorageContract):
    @pytest.fixture
    def storage(self, seaweed_bucket: str) -> Storage:
        return open_storage(f"s3://{seaweed_bucket}/some/prefix")


@pytest.fixture
def remote(seaweed_bucket: str, tmp_path: Path) -> Store:
    return Store(f"s3://{seaweed_bucket}/root", scratch=str(tmp_path / "scratch"))


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["get_bytes", "put_bytes", "list", "delete", "put_file", "get_file"])
def test_a_wrong_secret_is_refused(
    how: str, seaweed_bucket: str, s3_server: S3Server, s3_environment: Callable[..., None], tmp_path: Path
) -> None:
    open_storage(f"s3://{seaweed_bucket}").put_bytes("a/k", b"x")
    s3_environment(s3_server.endpoint, s3_server.key, WRONG_SECRET)
    storage = open_storage(f"s3://{seaweed_bucket}")
    (tmp_path / "f").write_bytes(b"x")
    arguments: dict[str, tuple[Any, ...]] = {
        "put_bytes": ("a/k", b"y"),
        "put_file": (tmp_path / "f", "a/k"),
        "get_file": ("a/k", tmp_path / "back"),
    }
    with pytest.raises(NvrError, match=r"S3 at http.* refused access to s3://.*: check AWS_ACCESS_KEY_ID") as caught:
        getattr(storage, how)(*arguments.get(how, ("a/k",)))
    assert WRONG_SECRET not in str(caught.value)
    s3_environment(s3_server.endpoint, s3_server.key, s3_server.secret)
    assert open_storage(f"s3://{seaweed_bucket}").get_bytes("a/k") == b"x"


def test_a_wrong_secret_through_the_command_line(
    seaweed_bucket: str, s3_server: S3Server, nvr: Callable[..., subprocess.CompletedProcess], tiny_file: Path
) -> None:
    root = f"s3://{seaweed_bucket}/root"
    result = nvr("embed", f"--recipe={tiny_file}", f"--root={root}", **s3_server.environment(WRONG_SECRET))
    assert result.returncode == 1
    assert f"nvr: S3 at {s3_server.endpoint} refused access to {root}" in result.stderr
    assert "Traceback" not in result.stderr
    assert WRONG_SECRET not in result.stdout + result.stderr
    assert s3_server.secret not in result.stdout + result.stderr


def test_a_missing_bucket(seaweed_bucket: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    storage = open_storage("s3://no-such-bucket/a")
    for call in (
        lambda: storage.put_bytes("k", b"x"),
        lambda: storage.list("a"),
        lambda: storage.put_file(tmp_path / "f", "k"),
    ):
        with pytest.raises(NvrError, match="no bucket 'no-such-bucket'"):
            call()


# ── artefacts ────────────────────────────────────────────────────────────────────────────────────────────────────


def write_words(folder: Path) -> dict[str, Any]:
    (folder / "a.txt").write_text("alpha")
    (folder / "big.bin").write_bytes(bytes(range(256)) * (MULTIPART // 256))
    return {"words": 1}


def publish_shared(root: str, scratch: str, content: str) -> tuple[str, str]:
    """One racer of another process: everybody writes other bytes under one identity."""

    def write(folder: Path) -> dict[str, Any]:
        for number in range(5):
            (folder / f"{number}.txt").write_text(content)
        return {}

    store = Store(root, scratch=scratch)
    artifact = store.publish(SHARED, write)
    return artifact.uri, (store.fetch(artifact) / "0.txt").read_text()


def test_the_same_artefacts_have_the_same_names_and_bytes_on_s3_and_on_disk(
    remote: Store, store: Store, tiny_recipe: Callable[..., Recipe], publish_dataset: Callable[..., Artifact]
) -> None:
    made = []
    for place in (store, remote):
        dataset = publish_dataset(place, ["a passage", "another passage", "a third"], ["a query", "another query"])
        result = execute(stage("embed"), Context(tiny_recipe(), place), {"dataset": [dataset.uri]})
        assert all(uri.startswith(place.root) for uri in result.outputs["embeddings"])
        manifests = [dataset.manifest, *(place.open(uri).manifest for uri in result.outputs["embeddings"])]
        made.append([(m.fingerprint, m.content_digest, m.stats) for m in manifests])
        assert execute(stage("embed"), Context(tiny_recipe(), place), {"dataset": [dataset.uri]}).reused
    assert made[0] == made[1]
    assert list(remote.scratch.glob("work-*")) == []


def test_a_big_file_comes_back_whole(remote: Store) -> None:
    made = remote.publish(Identity("words", 1, {}), write_words)
    assert (remote.fetch(made) / "big.bin").stat().st_size == MULTIPART // 256 * 256


@pytest.mark.parametrize(
    ("damage", "said"),
    [(b"alphA", "has other bytes"), (b"alph", "has 4 bytes, the manifest says 5"), (None, "is missing")],
)
def test_damage_in_the_bucket_is_refused_on_read(
    remote: Store, tmp_path: Path, damage: bytes | None, said: str
) -> None:
    made = remote.publish(Identity("words", 1, {}), write_words)
    [key] = [k for k in remote.storage.list("words") if k.endswith("a.txt")]
    if damage is None:
        remote.storage.delete(key)
    else:
        remote.storage.put_bytes(key, damage)
    reader = Store(remote.root, scratch=str(tmp_path / "another machine"))
    if damage is None or len(damage) != made.manifest.files[0].size:
        with pytest.raises(NvrError, match=rf"artefact s3://.*: a\.txt {said}"):
            reader.check(made)  # sizes alone: nothing is fetched
    with pytest.raises(NvrError, match=rf"artefact s3://.*: a\.txt {said}"):
        reader.fetch(made)
    assert [p for p in reader.scratch.rglob("*a.txt*") if p.is_file()] == []


def test_two_processes_that_publish_at_once_end_with_one_artefact(remote: Store, tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for lap in range(5):
            racers = [
                pool.submit(publish_shared, remote.root, str(tmp_path / f"{lap}-{number}"), f"racer {number}")
                for number in range(2)
            ]
            (uri, content), (other_uri, other_content) = (racer.result() for racer in racers)
            assert uri == other_uri == remote.uri("words", SHARED.fingerprint)
            assert content == other_content  # one writer's files, whole
            assert len([k for k in remote.storage.list("words") if k.endswith(MANIFEST)]) == 1
            remote.delete(remote.open(uri))
            assert remote.storage.list("words") == []


def test_an_upload_without_its_manifest_is_not_seen_and_not_in_the_way(
    remote: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = Identity("words", 1, {})
    with monkeypatch.context() as patch:
        patch.setattr(remote.storage, "put_bytes", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remote.publish(identity, write_words)
    assert len(remote.storage.list("words")) == 2
    assert remote.find(identity) is None
    assert remote.publish(identity, write_words).manifest.stats == {"words": 1}


def test_nvr_show_reads_from_s3(
    remote: Store, s3_server: S3Server, nvr: Callable[..., subprocess.CompletedProcess]
) -> None:
    made = remote.publish(Identity("words", 1, {}), write_words)
    result = nvr("show", made.uri, f"--root={remote.root}", **s3_server.environment())
    assert result.returncode == 0, result.stderr
    assert made.manifest.content_digest[:32] in result.stdout
    assert json.dumps(made.manifest.stats) in result.stdout


# ── the champion's journal ───────────────────────────────────────────────────────────────────────────────────────


def promote_to_the_same_end(root: str, database: str, number: int) -> str | None:
    """One of two racers, each with connections of its own."""
    registry = Registry(Store(root), Tracking("e", f"sqlite:///{database}"), "retriever")
    seen = registry.standing()
    try:
        return registry.move("promote", str(number), "1", who=str(number), why="x", after=seen.moves).target
    except ChampionChangedError:
        return None


def test_the_champions_journal_lies_on_s3(remote: Store, tmp_path: Path) -> None:
    """Its order rests on conditional puts: of two racers one wins; a killed move is finished, a rollback is found again."""
    database = tmp_path / "mlflow.db"
    tracking = Tracking("e", f"sqlite:///{database}")
    tracking.client.create_registered_model("retriever")
    for number in range(3):
        tracking.client.create_model_version("retriever", source=f"s3://nowhere/{number}")
    registry = Registry(remote, tracking, "retriever")
    registry.move("promote", "1", None, who="me", why="first")
    with ThreadPoolExecutor(2) as pool:
        racers = [pool.submit(promote_to_the_same_end, remote.root, str(database), number) for number in (2, 3)]
        won = {racer.result(timeout=120) for racer in racers}
    assert len(won - {None}) == 1
    first, second = registry.history()
    assert won >= {second.champion}
    assert not registry._append(str(registry._folder()), second)  # the number is taken, whoever asks
    found = registry._entry(second, "rollback", "1", "ann", "worse on Mondays", None, "r1")
    assert registry._append(str(registry._folder()), found)  # and killed
    assert str(registry.standing().champion.version) == "1"
    assert [m.happened for m in registry.history()] == [True, True, True]
    assert registry.withdrawn(str(second.target)) == registry.history()[-1]
    assert registry.history()[-1].run == "r1"
    assert first.target == "1"
