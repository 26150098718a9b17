"""Storage: one contract for folders and S3, and what is said when the store does not answer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from storage_contract import MULTIPART, StorageContract

from nvr_tasks.errors import NvrError
from nvr_tasks.storage import LocalStorage, S3Storage, Storage, open_storage


class TestFolder(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return open_storage((tmp_path / "the root").as_uri())


class TestS3(StorageContract):
    @pytest.fixture
    def storage(self, bucket: str) -> Storage:
        return open_storage(f"s3://{bucket}/some/prefix")

    # moto checks If-None-Match and stores in two steps; tests/integration/test_s3.py races on a real server.
    test_of_racing_threads_one_wins = None
    test_of_racing_processes_one_wins = None

    def test_big_files_go_up_in_parts(self, storage: Storage, bucket: str, tmp_path: Path) -> None:
        assert isinstance(storage, S3Storage)
        (tmp_path / "big").write_bytes(bytes(MULTIPART))
        storage.put_file(tmp_path / "big", "big")
        etag = storage.client.head_object(Bucket=bucket, Key="some/prefix/big")["ETag"]
        assert etag.strip('"').endswith("-2")

    def test_more_keys_than_one_page(self, storage: Storage) -> None:
        assert isinstance(storage, S3Storage)
        for number in range(1001):
            storage.put_bytes(f"many/{number:04}", b"")
        assert len(storage.list("many")) == 1001
        storage.delete("many")
        assert storage.list("many") == []

    def test_a_refused_deletion_is_an_error(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        assert isinstance(storage, S3Storage)
        storage.put_bytes("kept", b"x")
        answer = {"Errors": [{"Key": "kept", "Code": "AccessDenied", "Message": "Access Denied"}]}
        monkeypatch.setattr(storage.client, "delete_objects", lambda **_: answer)
        with pytest.raises(NvrError, match=r"did not delete .*kept: Access Denied"):
            storage.delete("kept")


# ── roots ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_root_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_storage("some where").uri == (tmp_path / "some where").as_uri()
    assert open_storage((tmp_path / "some where").as_uri()).uri == (tmp_path / "some where").as_uri()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_storage("~/artifacts").uri == (tmp_path / "home" / "artifacts").as_uri()
    assert open_storage(f"{tmp_path}/there/../some where").uri == (tmp_path / "some where").as_uri()
    assert open_storage("s3://bucket").uri == "s3://bucket"
    assert open_storage("s3://bucket/a/b/").uri == "s3://bucket/a/b"


@pytest.mark.parametrize("root", ["gs://bucket/a", "https://host/a", "s3://", "s3:///a"])
def test_other_roots_are_refused(root: str) -> None:
    with pytest.raises(NvrError, match=r"cannot store artefacts at .*: use a folder, file:///folder or s3://bucket"):
        open_storage(root)


# ── a folder under attack ────────────────────────────────────────────────────────────────────────────────────────


def test_a_killed_writer_leaves_the_old_value(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "root")
    storage.put_bytes("a/k", b"old")
    script = (
        "import sys, time, os, pathlib, nvr_tasks.storage as s\n"
        "os.fsync = lambda _: (print('writing', flush=True), time.sleep(60))\n"
        "s.LocalStorage(pathlib.Path(sys.argv[1])).put_bytes('a/k', b'new')\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(storage.root)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        writer.send_signal(signal.SIGKILL)
    assert storage.get_bytes("a/k") == b"old"
    assert storage.list("a") == ["a/k"]


def test_a_failed_copy_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path / "root")
    (tmp_path / "source").write_bytes(b"x" * 100)

    def half(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:50])
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("shutil.copyfile", half)
    with pytest.raises(OSError, match="No space left"):
        storage.put_file(tmp_path / "source", "a/k")
    assert [p for p in storage.root.rglob("*") if p.is_file()] == []


# ── S3 that does not serve ───────────────────────────────────────────────────────────────────────────────────────

Call = Callable[[Storage, Path], object]
CALLS: dict[str, Call] = {
    "get_bytes": lambda s, _: s.get_bytes("a/k"),
    "put_bytes": lambda s, _: s.put_bytes("a/k", b"x"),
    "claim": lambda s, _: s.put_bytes("a/k", b"x", if_absent=True),
    "list": lambda s, _: s.list("a"),
    "delete": lambda s, _: s.delete("a"),
    "put_file": lambda s, file: s.put_file(file, "a/k"),
    "get_file": lambda s, file: s.get_file("a/k", file.with_name("back")),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    return path


@pytest.mark.parametrize("name", CALLS)
def test_an_unreachable_endpoint(name: str, bucket: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, but nobody listens
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setattr(time, "sleep", lambda _: None)  # between the tries
        with pytest.raises(NvrError, match=r"cannot reach the S3 endpoint http://127.* is AWS_ENDPOINT_URL right\?"):
            CALLS[name](open_storage(f"s3://{bucket}"), file)


@pytest.mark.parametrize("name", [n for n in CALLS if n != "get_file"])
def test_a_missing_bucket(name: str, bucket: str, file: Path) -> None:
    with pytest.raises(NvrError, match=r"no bucket 'no-such-bucket' at http.*: create it, or correct NVR_ROOT"):
        CALLS[name](open_storage("s3://no-such-bucket/a"), file)


def test_no_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(NvrError, match=r"no S3 credentials for s3://.*: set AWS_ACCESS_KEY_ID"):
        open_storage(f"s3://{bucket}").get_bytes("a")


def test_an_endpoint_that_is_no_url(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(NvrError, match="AWS_ENDPOINT_URL must be like http://host:port"):
        open_storage(f"s3://{bucket}").get_bytes("a")


def test_a_bucket_name_that_cannot_be(bucket: str) -> None:
    with pytest.raises(NvrError, match="Invalid bucket name"):
        open_storage("s3://not a bucket").get_bytes("a")


def test_a_root_with_credentials_is_refused() -> None:
    with pytest.raises(NvrError, match=r"^s3://\*\*\*@bucket/x carries credentials"):
        open_storage("s3://key:hush@bucket/x")


@pytest.mark.parametrize("uri", ["", " ", "file://relative/path", "s3://", "ftp://x/y"])
def test_a_root_that_names_no_place_is_refused(uri: str) -> None:
    with pytest.raises(NvrError, match="use a folder, file:///folder or s3://bucket/prefix"):
        open_storage(uri)


def test_a_folder_that_others_delete_meanwhile_is_no_error(tmp_path: Path) -> None:
    """Stages tidy up side by side, as the cells of an ablation do."""
    storage = LocalStorage(tmp_path)
    for _ in range(20):
        for number in range(60):
            storage.put_bytes(f"parts/{number % 7}/{number}", b"x")
        with ThreadPoolExecutor(4) as pool:
            work = [pool.submit(do, "parts") for do in (storage.delete, storage.list) * 2]
        for done in work:
            done.result()
        assert storage.list("parts") == []
