"""Every kind of place gives the same data set, and tells when it has changed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Web, as_tar, as_zip, web_server, write_beir

from nvr_tasks.data import fetch, sources
from nvr_tasks.data.beir import read_beir
from nvr_tasks.data_settings import BeirSource, BenchmarkTask, TrainingSource
from nvr_tasks.errors import NvrError


def beir(uri: str | Path, sha256: str | None = None) -> BeirSource:
    return BeirSource(type="beir", uri=str(uri), sha256=sha256)


def read(source: BeirSource, tmp_path: Path) -> Any:
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    data = sources.read(source, work, tmp_path / "parts")
    assert list(work.iterdir()) == [], "nothing is left behind"
    return data.documents, data.queries, data.qrels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_beir(tmp_path / "data" / "set")


@pytest.fixture
def expected(folder: Path) -> Any:
    data = read_beir(folder, "s")
    return data.documents, data.queries, data.qrels


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as server:
        yield server


@pytest.mark.parametrize("make", [as_zip, as_tar, lambda f: as_zip(f, ""), lambda f: as_tar(f, "./")])
def test_archives_in_every_place(
    make: Callable[[Path], bytes], folder: Path, expected: Any, web: Web, tmp_path: Path, bucket: str
) -> None:
    data = make(folder)
    name = "set.zip" if data[:2] == b"PK" else "set.tar.gz"
    local = tmp_path / name
    local.write_bytes(data)
    assert read(beir(local), tmp_path) == expected
    assert read(beir(local.as_uri()), tmp_path) == expected
    web.files[f"/{name}"] = data
    assert read(beir(f"{web.url}/{name}"), tmp_path) == expected
    file = fetch.S3File(f"s3://{bucket}/x/{name}")
    file.storage.client.put_object(Bucket=bucket, Key=f"x/{name}", Body=data)
    assert read(beir(file.uri), tmp_path) == expected


def test_folders_in_every_place(folder: Path, expected: Any, tmp_path: Path, bucket: str) -> None:
    assert read(beir(folder), tmp_path) == expected
    assert read(beir(folder.as_uri()), tmp_path) == expected
    client = fetch.S3File(f"s3://{bucket}/x").storage.client
    for path in (p for p in folder.rglob("*") if p.is_file()):
        client.upload_file(str(path), bucket, f"sets/one/{path.relative_to(folder)}")
    client.put_object(Bucket=bucket, Key="sets/one/README.md", Body=b"not data")
    uri = f"s3://{bucket}/sets/one"
    assert read(beir(uri), tmp_path) == expected
    before = sources.probe(beir(uri))
    assert sources.probe(beir(uri)) == before
    client.put_object(Bucket=bucket, Key="sets/one/README.md", Body=b"changed, still not data")
    assert sources.probe(beir(uri)) == before
    client.put_object(Bucket=bucket, Key="sets/one/qrels/test.tsv", Body=b"changed")
    assert sources.probe(beir(uri)) != before
    with pytest.raises(NvrError, match=f"no data set at s3://{bucket}/sets/two"):
        sources.probe(beir(f"s3://{bucket}/sets/two"))


def test_a_wrong_s3_secret(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    from botocore.client import BaseClient
    from botocore.exceptions import ClientError

    def refuse(self: object, operation: str, *_: object) -> None:
        raise ClientError({"Error": {"Code": "SignatureDoesNotMatch", "Message": ""}}, operation)

    monkeypatch.setattr(BaseClient, "_make_api_call", refuse)
    for uri in (f"s3://{bucket}/set", f"s3://{bucket}/set.zip"):
        with pytest.raises(NvrError, match=r"refused access .* AWS_SECRET_ACCESS_KEY"):
            sources.probe(beir(uri))


def test_a_dropped_connection_is_resumed(
    folder: Path, expected: Any, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.001)
    web.files["/set.zip"] = data = as_zip(folder)
    web.drop_after = [len(data) // 2]
    assert read(beir(f"{web.url}/set.zip"), tmp_path) == expected


def test_probe_of_a_web_archive(web: Web) -> None:
    web.files["/set.zip"] = b"x" * 10
    source = beir(f"{web.url}/set.zip")
    first = sources.probe(source)
    assert sources.probe(source) == first == {"size": 10, "tag": '"v1"'}
    web.tag = '"v2"'
    assert sources.probe(source) != first
    web.tag = None
    assert sources.probe(source) != sources.probe(source), "nothing to know it by: never equal"
    web.headers["Last-Modified"] = "Mon, 01 Jan 2024 00:00:00 GMT"
    assert sources.probe(source) == sources.probe(source)
    assert {method for method, _, _ in web.log} == {"HEAD"}, "no byte of it is read"


def test_a_declared_digest_needs_no_network() -> None:
    assert sources.probe(beir("https://nowhere.invalid/a.zip", "0" * 64)) == "0" * 64


def test_probe_of_a_folder_sees_bytes_not_dates(folder: Path) -> None:
    before = sources.probe(beir(folder))
    (folder / "corpus.jsonl").touch()
    (folder / "notes.txt").write_text("not data")
    assert sources.probe(beir(folder)) == before
    with (folder / "corpus.jsonl").open("a") as file:
        file.write("\n")
    assert sources.probe(beir(folder)) != before


def test_a_local_archive_with_a_digest(folder: Path, expected: Any, tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "set.zip"
    path.write_bytes(as_zip(folder))
    assert read(beir(path, hashlib.sha256(path.read_bytes()).hexdigest()), tmp_path) == expected
    with pytest.raises(NvrError, match=f"the recipe says {'0' * 64}"):
        sources.read(beir(path, "0" * 64), tmp_path, tmp_path)
    with pytest.raises(NvrError, match="is a folder, sha256 is for archives"):
        sources.read(beir(folder, "0" * 64), tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("ftp://host/a.zip", "cannot read ftp://host/a.zip"),
        ("http://example.org/a.zip", "plain http only from this machine"),
        ("https://example.org/folder", "is not an archive"),
        ("/no/such/folder", "there is no such folder"),
        ("/no/such.zip", "there is no such file"),
        ("file:///no/such/folder", "there is no such folder"),
    ],
)
def test_places_that_cannot_be_read(uri: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(NvrError, match=words):
        sources.read(beir(uri), tmp_path, tmp_path)
    with pytest.raises(
        NvrError, match=words.replace("folder", "folder( or archive)?").replace("file", "(file|folder or archive)")
    ):
        sources.probe(beir(uri))


def test_an_archive_without_a_data_set_or_with_two(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(as_zip(folder / "qrels", "set/qrels/"))
    with pytest.raises(NvrError, match=r"expected one folder with corpus.jsonl\[.gz\], found none"):
        sources.read(beir(path), tmp_path, tmp_path)


def entry(origin: Path, mirror: str | None = "mine") -> TrainingSource:
    return TrainingSource.model_validate(
        {"name": "a", "origin": {"type": "beir", "uri": str(origin)}, "mirror": mirror}
    )


def test_mirror(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVR_DATA", raising=False)
    assert sources.resolve(entry(folder)) == beir(folder)
    monkeypatch.setenv("NVR_DATA", str(folder.parent) + "/")
    assert sources.resolve(entry(folder, None)) == beir(folder), "a source without mirror is read from its origin"
    assert sources.resolve(entry(Path("/elsewhere"), "set")) == beir(folder)
    monkeypatch.setenv("NVR_DATA", folder.parent.as_uri())
    assert sources.resolve(entry(Path("/elsewhere"), "set")) == beir(folder.as_uri())
    with pytest.raises(NvrError, match=f"NVR_DATA is set, but there is no folder {folder.parent}/mine"):
        sources.resolve(entry(folder))
    monkeypatch.setenv("NVR_DATA", "https://example.org/data")
    with pytest.raises(NvrError, match=r"NVR_DATA is 'https://example.org/data': expected a folder"):
        sources.resolve(entry(folder))
    monkeypatch.setenv("NVR_DATA", "s3://bucket/data")
    assert sources.resolve(entry(folder)) == beir("s3://bucket/data/mine")


def test_credentials_in_nvr_data_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVR_DATA", "s3://key:hush@bucket/sets")
    entry = BenchmarkTask.model_validate({"task": "Docs", "origin": {"type": "beir", "uri": "docs"}, "mirror": "docs"})
    with pytest.raises(NvrError, match=r"^NVR_DATA: s3://\*\*\*@bucket/sets carries credentials"):
        sources.resolve(entry)
