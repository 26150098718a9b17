"""One door to every kind of source: which place it is, whether it has changed, what is in it."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from nvr_tasks.artifacts import sha256_file
from nvr_tasks.data import archives, fetch
from nvr_tasks.data.beir import files_of, is_part, read_beir
from nvr_tasks.data.bounds import Bound
from nvr_tasks.data.media_files import MediaFiles, below, media_digests
from nvr_tasks.data.raw import RawData
from nvr_tasks.data_settings import (
    BeirSource,
    HubSource,
    MtebSource,
    PackageDocsSource,
    SourceRef,
    TableSource,
    WithOrigin,
)
from nvr_tasks.errors import NvrError
from nvr_tasks.storage import S3Storage, refuse_secrets

DATA_VARIABLE = "NVR_DATA"


def resolve(entry: WithOrigin) -> SourceRef:
    """The place to read from: the mirror below $NVR_DATA when both are given, else the origin."""
    mirrors = os.environ.get(DATA_VARIABLE, "").rstrip("/")
    if not mirrors or entry.mirror is None:
        return entry.origin
    try:
        refuse_secrets(mirrors)
    except ValueError as error:
        raise NvrError(f"{DATA_VARIABLE}: {error}") from None
    if urlsplit(mirrors).scheme not in ("", "file", "s3"):
        raise NvrError(f"{DATA_VARIABLE} is {mirrors!r}: expected a folder, file:///folder or s3://bucket/prefix")
    mirror = BeirSource(type="beir", uri=f"{mirrors}/{entry.mirror}")
    scheme, path = _split(mirror.uri)
    if scheme == "file" and not Path(path).is_dir():
        raise NvrError(
            f"{DATA_VARIABLE} is set, but there is no folder {path}: add the mirror, or unset {DATA_VARIABLE} to read the origin"
        )
    return mirror


def describe(source: SourceRef) -> str:
    """The source as people name it."""
    if isinstance(source, BeirSource):
        return source.uri
    if isinstance(source, HubSource):
        return f"{source.repo}@{source.revision[:7]}"
    if isinstance(source, MtebSource):
        return f"mteb's {source.task}"
    if isinstance(source, TableSource):
        return ", ".join(source.files.values())
    return f"documentation of {', '.join(source.packages)}"


def probe(source: SourceRef) -> Any:
    """A cheap identity: equal to an earlier one only if the source still has the content it had then."""
    if isinstance(source, PackageDocsSource):
        from nvr_tasks.data import package_docs

        return package_docs.probe(source)
    if isinstance(source, HubSource):
        return source.revision  # a commit never changes
    if isinstance(source, MtebSource):
        from nvr_tasks.data import mteb_source

        return mteb_source.probe(source)
    if isinstance(source, TableSource):
        tables = {split: _probe_local(Path(path), path) for split, path in sorted(source.files.items())}
        if source.media_columns:
            folders = sorted({Path(path).parent for path in source.files.values()})
            tables |= {str(folder): media_digests(folder) for folder in folders}
        return tables
    return _probe_beir(source)


def _probe_beir(source: BeirSource) -> Any:
    scheme, path = _split(source.uri)
    if source.sha256 is not None and scheme != "file":
        return source.sha256  # nothing else will be accepted
    if scheme == "file":
        return _probe_local(Path(path), source.uri)
    if scheme == "s3" and not archives.is_archive(source.uri):
        return _list_s3(source.uri)
    version = fetch.version_of(fetch.remote(source.uri))
    # A server that tells neither version nor date leaves no way to know: equal to nothing, so it is read again.
    return {"size": version.size, "tag": version.tag or f"unknown-{uuid.uuid4().hex}"}


def read(
    source: SourceRef, work: Path, parts: Path, media: MediaFiles | None = None, bound: Bound | None = None
) -> RawData:
    """Fetch a source and read it.

    Args:
        work: private scratch folder.
        parts: shared folder of broken-off downloads, which stay there to be resumed.
        media: keeps images and sounds; without it a source that has some is refused.
        bound: how much is wanted, for sources that can be read in part; more may come.
    """
    if isinstance(source, PackageDocsSource):
        from nvr_tasks.data import package_docs

        return package_docs.read_package_docs(source, media)
    if isinstance(source, HubSource):
        from nvr_tasks.data import hub

        return hub.read_hub(source, media, bound)
    if isinstance(source, MtebSource):
        from nvr_tasks.data import mteb_source

        return mteb_source.read_mteb(source)
    if isinstance(source, TableSource):
        return _read_tables(source, media, bound)
    return _read_beir(source, work, parts, media)


def _read_beir(source: BeirSource, work: Path, parts: Path, media: MediaFiles | None) -> RawData:
    scheme, path = _split(source.uri)
    if scheme == "file" and not archives.is_archive(source.uri):
        if source.sha256 is not None:
            raise NvrError(f"{source.uri} is a folder, sha256 is for archives: remove it from the recipe")
        return read_beir(Path(path), source.uri, media)
    if scheme == "file":
        return _read_archive(_checked_file(Path(path), source), source.uri, work, media)
    if scheme == "s3" and not archives.is_archive(source.uri):
        return _read_s3_folder(source.uri, work, parts, media)
    with _temporary(work) as folder:
        archive = folder / "archive"
        fetch.download(fetch.remote(source.uri), parts, archive, source.sha256)
        return _read_archive(archive, source.uri, work, media)


def _read_tables(source: TableSource, media: MediaFiles | None, bound: Bound | None) -> RawData:
    from nvr_tasks.data.tables import Media, read_file, read_tables

    data = RawData(describe(source))
    folders = {split: below(Path(path).parent) for split, path in source.files.items()}
    read_tables(
        {split: read_file(Path(path), path) for split, path in source.files.items()},
        source,
        data,
        Media(media, folders.__getitem__) if media is not None else None,
        bound,
    )
    return data.checked()


def _split(uri: str) -> tuple[str, str]:
    """Scheme (`file` for plain paths) and path of a source's URI. Raises NvrError on other schemes."""
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        return "file", unquote(parts.path) if parts.scheme else uri
    if parts.scheme == "s3" and parts.netloc:
        return "s3", parts.path
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in fetch.LOOPBACK):
        if not archives.is_archive(parts.path):
            raise NvrError(
                f"{uri} is not an archive ({', '.join(archives.ENDINGS)}): over https only archives can be read"
            )
        return "https", parts.path
    raise NvrError(f"cannot read {uri}: use a folder, file://, s3:// or https:// (plain http only from this machine)")


def _probe_local(path: Path, uri: str) -> dict[str, str]:
    if path.is_file():
        return {path.name: sha256_file(path)}
    if not path.is_dir():
        raise NvrError(f"no data set at {uri}: there is no such folder or archive")
    return {file.relative_to(path).as_posix(): sha256_file(file) for file in files_of(path)}


def _checked_file(path: Path, source: BeirSource) -> Path:
    if not path.is_file():
        raise NvrError(f"no data set at {source.uri}: there is no such file")
    digest = sha256_file(path)
    if source.sha256 is not None and digest != source.sha256:
        raise NvrError(
            f"{source.uri} has sha256 {digest}, the recipe says {source.sha256}: the file has changed or is not the one meant"
        )
    return path


@contextmanager
def _temporary(work: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=work))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read_archive(archive: Path, uri: str, work: Path, media: MediaFiles | None) -> RawData:
    """The data set lies at the top of the archive or in one folder of it."""
    with _temporary(work) as folder:
        archives.extract(archive, folder, _is_wanted, uri)
        tops = sorted({p.parent for p in folder.rglob("corpus.jsonl*")})
        if len(tops) != 1:
            found = ", ".join(str(t.relative_to(folder)) for t in tops) or "none"
            raise NvrError(f"{uri}: expected one folder with corpus.jsonl[.gz], found {found}")
        return read_beir(tops[0], uri, media)


def _is_wanted(name: str) -> bool:
    parts = [p for p in name.split("/") if p not in ("", ".")]
    if "__MACOSX" in parts:
        return False
    return any(is_part("/".join(parts[i:])) for i in range(min(len(parts), 2)))


def _s3(uri: str) -> tuple[S3Storage, str]:
    parts = urlsplit(uri)
    return S3Storage(parts.netloc, ""), parts.path.strip("/")


def _list_s3(uri: str) -> dict[str, str]:
    """Name → ETag of the data set's objects."""
    storage, prefix = _s3(uri)
    names = [key.removeprefix(f"{prefix}/") for key in storage.list(prefix)]
    found = {}
    for name in filter(is_part, names):
        version = fetch.version_of(fetch.S3File(f"s3://{storage.bucket}/{prefix}/{name}"))
        found[name] = f"{version.tag} {version.size}"
    if not found:
        raise NvrError(
            f"no data set at {uri}: expected corpus.jsonl[.gz], queries.jsonl[.gz] and qrels/<split>.tsv below it"
        )
    return found


def _read_s3_folder(uri: str, work: Path, parts: Path, media: MediaFiles | None) -> RawData:
    storage, prefix = _s3(uri)
    with _temporary(work) as folder:
        for name in _list_s3(uri):
            file = fetch.S3File(f"s3://{storage.bucket}/{prefix}/{name}")
            fetch.download(file, parts, folder / name)
        return read_beir(folder, uri, media)
