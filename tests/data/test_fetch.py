"""Downloads: resumed, checked, retried."""

import hashlib
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from data_helpers import Web, web_server

from nvr_tasks.data import fetch
from nvr_tasks.errors import NvrError

DATA = random.Random(1).randbytes(3_000_000)
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.001)


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server(Web({"/a.zip": DATA})) as server:
        yield server


def get(web: Web, tmp_path: Path, sha256: str | None = None) -> bytes:
    parts, target = tmp_path / "parts", tmp_path / "got"
    fetch.download(fetch.remote(f"{web.url}/a.zip"), parts, target, sha256)
    assert not list(parts.glob("*.part*"))
    return target.read_bytes()


def leftover(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """What a process leaves that was killed after `size` bytes."""
    web.drop_after = [size]
    with monkeypatch.context() as patch, pytest.raises(NvrError):
        patch.setattr(fetch, "ATTEMPTS", 1)
        fetch.download(fetch.remote(f"{web.url}/a.zip"), tmp_path / "parts", tmp_path / "got")
    assert next((tmp_path / "parts").glob("*.part")).stat().st_size == size
    web.log.clear()


def test_whole(web: Web, tmp_path: Path) -> None:
    assert get(web, tmp_path, DIGEST) == DATA
    assert web.gets() == [None]


def test_a_dropped_connection_goes_on_where_it_broke(web: Web, tmp_path: Path) -> None:
    web.drop_after = [1_048_576, 1_048_576]
    assert get(web, tmp_path, DIGEST) == DATA
    assert web.gets() == [None, "bytes=1048576-", "bytes=2097152-"]


def test_another_process_goes_on_where_the_first_was_killed(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover(web, tmp_path, monkeypatch, 2_097_152)
    assert get(web, tmp_path) == DATA
    assert web.gets() == ["bytes=2097152-"]


def test_killed_after_the_last_byte(web: Web, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    name = fetch.part_name(f"{web.url}/a.zip")
    (parts / f"{name}.part").write_bytes(DATA)
    (parts / f"{name}.part.json").write_text('{"tag": "\\"v1\\""}')
    assert get(web, tmp_path) == DATA
    assert web.gets() == [f"bytes={len(DATA)}-"]


def test_a_file_that_changed_meanwhile_starts_over(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover(web, tmp_path, monkeypatch, 1_048_576)
    web.files["/a.zip"], web.tag = DATA[::-1], '"v2"'
    assert get(web, tmp_path) == DATA[::-1]


@pytest.mark.parametrize("change", [{"ranges": False}, {"tag": None}, {"tag": 'W/"weak"'}])
def test_a_server_that_cannot_resume_starts_over(web: Web, tmp_path: Path, change: dict[str, object]) -> None:
    for name, value in change.items():
        setattr(web, name, value)
    web.drop_after = [1_048_576]
    assert get(web, tmp_path, DIGEST) == DATA


def test_server_errors_are_retried(web: Web, tmp_path: Path) -> None:
    web.fail = [503, 500, 429]
    assert get(web, tmp_path, DIGEST) == DATA


def test_retries_end(web: Web, tmp_path: Path) -> None:
    web.fail = [503] * 50
    with pytest.raises(NvrError, match=r"the server answered 503 \(5 tries\)"):
        get(web, tmp_path)
    assert len(web.log) == fetch.ATTEMPTS


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(NvrError, match=r"cannot fetch http://127.0.0.1:9/a.zip: ConnectionError"):
        fetch.version_of(fetch.remote("http://127.0.0.1:9/a.zip"))


@pytest.mark.parametrize("status", [404, 403, 401, 410])
def test_refusals_are_not_retried(web: Web, tmp_path: Path, status: int) -> None:
    web.fail = [status]
    with pytest.raises(NvrError, match=str(status)):
        get(web, tmp_path)
    assert len(web.log) == 1


def test_another_digest_is_refused_and_not_kept(web: Web, tmp_path: Path) -> None:
    with pytest.raises(NvrError, match=f"has sha256 {DIGEST} .*the recipe says {'0' * 64}"):
        get(web, tmp_path, "0" * 64)
    assert not (tmp_path / "got").exists()
    assert not list((tmp_path / "parts").glob("*.part"))


def test_version(web: Web) -> None:
    file = fetch.remote(f"{web.url}/a.zip")
    assert fetch.version_of(file) == fetch.Version(len(DATA), '"v1"')
    web.fail = [405]  # a server that does not know HEAD
    assert fetch.version_of(file) == fetch.Version(len(DATA), '"v1"')


# ── S3 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def s3(bucket: str) -> fetch.S3File:
    file = fetch.S3File(f"s3://{bucket}/deep/a.zip")
    file.storage.client.put_object(Bucket=bucket, Key="deep/a.zip", Body=DATA)
    return file


def test_s3_whole(s3: fetch.S3File, tmp_path: Path) -> None:
    assert fetch.download(s3, tmp_path / "p", tmp_path / "t", DIGEST).read_bytes() == DATA
    assert fetch.version_of(s3).size == len(DATA)


@pytest.mark.parametrize("size", [1000, len(DATA)])
def test_s3_resumes(s3: fetch.S3File, tmp_path: Path, size: int) -> None:
    parts = tmp_path / "p"
    parts.mkdir()
    name = fetch.part_name(s3.uri)
    # Bytes that differ from the object's show that they were kept, not fetched.
    (parts / f"{name}.part").write_bytes(b"\0" * size)
    tag = fetch.version_of(s3).tag
    (parts / f"{name}.part.json").write_text(json.dumps({"tag": tag}))
    got = fetch.download(s3, parts, tmp_path / "t").read_bytes()
    assert got == b"\0" * size + DATA[size:]


def test_s3_changed_meanwhile(s3: fetch.S3File, tmp_path: Path) -> None:
    parts = tmp_path / "p"
    parts.mkdir()
    name = fetch.part_name(s3.uri)
    (parts / f"{name}.part").write_bytes(b"\0" * 1000)
    (parts / f"{name}.part.json").write_text('{"tag": "\\"old\\""}')
    assert fetch.download(s3, parts, tmp_path / "t").read_bytes() == DATA


def test_s3_missing(s3: fetch.S3File, tmp_path: Path) -> None:
    missing = fetch.S3File(s3.uri + ".not")
    with pytest.raises(NvrError, match=r"there is no s3://.*a\.zip\.not"):
        fetch.download(missing, tmp_path / "p", tmp_path / "t")


def redirect(origin: str, location: str) -> requests.Response:
    answer = requests.Response()
    answer.status_code, answer.url, answer.headers["Location"] = 302, origin, location
    return answer


@pytest.mark.parametrize(
    ("origin", "location", "followed"),
    [
        ("https://host/a.zip", "https://other/a.zip", True),
        ("https://host/a.zip", "/b.zip", True),
        ("https://host/a.zip", "http://host/a.zip?sig=hush", False),
        ("https://host/a.zip", "http://127.0.0.1/a.zip", False),
        ("http://127.0.0.1:8/a.zip", "/b.zip", True),
        ("http://127.0.0.1:8/a.zip", "http://host/a.zip", False),
    ],
)
@pytest.mark.parametrize("method", ["version", "open"])
def test_a_redirect_never_leaves_https(
    monkeypatch: pytest.MonkeyPatch, origin: str, location: str, followed: bool, method: str
) -> None:
    asked = []

    def send(_: object, request: requests.PreparedRequest, **__: object) -> requests.Response:
        asked.append(request.url)
        if len(asked) == 1:
            answer = redirect(origin, location)
        else:
            answer = requests.Response()
            answer.status_code = 200
        answer.request, answer.raw, answer._content = request, io.BytesIO(), b""
        return answer

    monkeypatch.setattr("requests.adapters.HTTPAdapter.send", send)
    file = fetch.HttpFile(origin)

    def ask() -> None:
        if method == "version":
            file.version()
        else:
            with file.open(0, None):
                pass

    if followed:
        ask()
        assert len(asked) == 2
    else:
        with pytest.raises(NvrError, match="which is not encrypted") as caught:
            ask()
        assert "hush" not in str(caught.value)
        assert len(asked) == 1
