"""Download one file over https or from S3, resuming what an earlier try left behind."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urljoin, urlsplit

from nvr_tasks.artifacts import CHUNK, sha256_file
from nvr_tasks.errors import NvrError
from nvr_tasks.storage import S3Storage, hide_secrets

if TYPE_CHECKING:
    from requests import Response

log = logging.getLogger(__name__)

ATTEMPTS = 5  # tries in a row that bring nothing new
BACKOFF_S = 0.5  # doubles with every such try
TIMEOUT_S = (10, 60)  # connect, silence between two packets
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Version:
    """What a server says about a file without sending it.

    Attributes:
        size: bytes, if it says.
        tag: changes whenever the bytes change (strong ETag or Last-Modified); None when the server has neither.
    """

    size: int | None
    tag: str | None


@dataclass(frozen=True)
class Body:
    """A file from `start` on."""

    start: int
    version: Version
    chunks: Iterator[bytes]


class TemporaryError(Exception):
    """A failure that another try may not meet."""


class Remote(Protocol):
    """A file somewhere else."""

    uri: str

    def version(self) -> Version:
        """Size and tag. Raises NvrError or TemporaryError."""

    def open(self, start: int, tag: str | None) -> contextlib.AbstractContextManager[Body | None]:
        """The bytes from `start` on if the file still has this tag, else from 0; None when there are none after `start`."""


def remote(uri: str) -> Remote:
    """The remote file behind an http(s) or s3 URI."""
    return S3File(uri) if uri.startswith("s3://") else HttpFile(uri)


def version_of(file: Remote) -> Version:
    """`file.version()` with retries."""
    for attempt in range(ATTEMPTS):
        try:
            return file.version()
        except TemporaryError as error:
            _pause(file, attempt, error)
    raise AssertionError  # _pause raises after the last attempt


def download(file: Remote, parts: Path, target: Path, sha256: str | None = None) -> Path:
    """Download to `target`, going on where an earlier try stopped.

    Args:
        parts: shared folder of unfinished downloads; on the disk of `target`.

    Raises:
        NvrError: not there, refused, unreachable after several tries, of another size than announced, or of another
            digest than `sha256`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    parts.mkdir(parents=True, exist_ok=True)
    name = part_name(file.uri)
    part, note = parts / f"{name}.part", parts / f"{name}.part.json"
    with (parts / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two stages that want the same file take turns
        attempt = 0
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                _continue(file, part, note)
                break
            except TemporaryError as error:
                attempt = 0 if part.exists() and part.stat().st_size > before else attempt
                _pause(file, attempt, error)
                attempt += 1
        digest = sha256_file(part)
        if sha256 is not None and digest != sha256:
            size = part.stat().st_size
            part.unlink()
            note.unlink(missing_ok=True)
            raise NvrError(
                f"{file.uri} has sha256 {digest} ({size:,} bytes), the recipe says {sha256}: the file has changed or is not the one meant"
            )
        part.replace(target)
        note.unlink(missing_ok=True)
    return target


def _continue(file: Remote, part: Path, note: Path) -> None:
    """One try: append what is missing, or start over when the remote file is not the one begun."""
    tag = json.loads(note.read_text())["tag"] if note.exists() and part.exists() else None
    start = part.stat().st_size if tag is not None else 0
    with file.open(start, tag) as body:
        if body is None:  # nothing after `start`: the earlier try had it all
            return
        if body.start:
            log.info("%s: resuming at %s bytes", file.uri, f"{body.start:,}")
        # Emptied before the note changes hands: bytes of one version are never kept under another's tag.
        with part.open("ab" if body.start else "wb") as out:
            note.write_text(json.dumps({"uri": file.uri, "tag": body.version.tag}))
            for chunk in body.chunks:
                out.write(chunk)
    size = part.stat().st_size
    if body.version.size is not None and size != body.version.size:
        if size > body.version.size:
            part.unlink()
        raise TemporaryError(f"got {size:,} of {body.version.size:,} bytes")


def _pause(file: Remote, attempt: int, error: TemporaryError) -> None:
    if attempt + 1 >= ATTEMPTS:
        raise NvrError(
            f"cannot fetch {file.uri}: {error} ({ATTEMPTS} tries): check the network and the address, then run again to go on"
        ) from None
    delay = BACKOFF_S * 2**attempt
    log.info("%s: %s; trying again in %.1f s", file.uri, error, delay)
    time.sleep(delay)


def part_name(uri: str) -> str:
    """A file name for a download of this URI."""
    name = urlsplit(uri).path.rsplit("/", 1)[-1]
    return f"{hashlib.sha256(uri.encode()).hexdigest()[:16]}-{name}"


# ── http(s) ──────────────────────────────────────────────────────────────────────────────────────────────────────


class HttpFile:
    """A file on a web server."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def version(self) -> Version:
        import requests

        with self._explained():
            hooks = {"response": self._refuse_downgrade}
            headers = {"Accept-Encoding": "identity"}
            answer = requests.head(self.uri, allow_redirects=True, timeout=TIMEOUT_S, headers=headers, hooks=hooks)
            if answer.status_code in (403, 405, 501):  # servers that refuse HEAD; presigned URLs answer 403
                answer = requests.get(self.uri, stream=True, timeout=TIMEOUT_S, headers=headers, hooks=hooks)
                answer.close()
            self._check(answer.status_code)
            return Version(_length(answer.headers.get("Content-Length")), _tag(answer.headers))

    @contextlib.contextmanager
    def open(self, start: int, tag: str | None) -> Iterator[Body | None]:
        import requests

        headers = {"Accept-Encoding": "identity"}  # sizes and ranges are those of the file, not of a compressed copy
        if start and tag is not None:
            headers |= {"Range": f"bytes={start}-", "If-Range": tag}
        hooks = {"response": self._refuse_downgrade}
        with (
            self._explained(),
            requests.get(self.uri, stream=True, timeout=TIMEOUT_S, headers=headers, hooks=hooks) as answer,
        ):
            content_range = answer.headers.get("Content-Range", "")
            if answer.status_code == 416 and start and content_range == f"bytes */{start}":
                yield None
                return
            if answer.status_code == 416 or (
                answer.status_code == 206 and not content_range.startswith(f"bytes {start}-")
            ):
                # The server's idea of ranges is not ours: begin again without one.
                with self.open(0, None) as body:
                    yield body
                return
            self._check(answer.status_code)
            size = _length(answer.headers.get("Content-Length"))
            if answer.status_code == 206:
                total = content_range.rpartition("/")[2]
                yield Body(start, Version(int(total) if total.isdigit() else None, tag), answer.iter_content(CHUNK))
            else:
                yield Body(0, Version(size, _tag(answer.headers)), answer.iter_content(CHUNK))

    def _refuse_downgrade(self, answer: Response, **_: object) -> None:
        """Called with every answer, before a redirect is followed: from https only to https."""
        if not answer.is_redirect:
            return
        target = urlsplit(urljoin(answer.url, answer.headers["Location"]))
        local = answer.url.startswith("http://") and target.hostname in LOOPBACK
        if target.scheme != "https" and not local:
            raise NvrError(
                f"{self.uri} redirects to {target.scheme}://{target.hostname}, which is not encrypted: name an https address in the recipe"
            )

    def _check(self, status: int) -> None:
        if status in (408, 425, 429) or status >= 500:
            raise TemporaryError(f"the server answered {status}")
        if status in (401, 403):
            raise NvrError(f"{self.uri} refused access ({status}): check the address and its permissions")
        if status not in (200, 206):
            raise NvrError(f"{self.uri} answered {status}: check the address in the recipe")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        import requests

        try:
            yield
        except (
            requests.exceptions.InvalidURL,
            requests.exceptions.InvalidSchema,
            requests.exceptions.TooManyRedirects,
        ) as error:
            raise NvrError(f"cannot fetch {self.uri}: {hide_secrets(str(error))}") from None
        except requests.exceptions.SSLError as error:
            raise NvrError(f"cannot fetch {self.uri}: TLS failed ({hide_secrets(str(error))})") from None
        except requests.RequestException as error:
            raise TemporaryError(type(error).__name__) from error


def _length(header: str | None) -> int | None:
    return int(header) if header and header.isdigit() else None


def _tag(headers: object) -> str | None:
    get = headers.get  # type: ignore[attr-defined]
    etag = get("ETag")
    # A weak ETag ("W/…") promises the same meaning, not the same bytes: no use for resuming.
    tag: str | None = etag if etag and not etag.startswith("W/") else get("Last-Modified")
    return tag


# ── S3 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class S3File:
    """An object in a bucket; endpoint and credentials come from the environment."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        parts = urlsplit(uri)
        self.storage, self.key = S3Storage(parts.netloc, ""), parts.path.lstrip("/")

    def version(self) -> Version:
        with self._found(), self.storage._explained(missing=self.key):
            head = self.storage.client.head_object(Bucket=self.storage.bucket, Key=self.key)
            return Version(head["ContentLength"], head["ETag"])

    @contextlib.contextmanager
    def open(self, start: int, tag: str | None) -> Iterator[Body | None]:
        from botocore.exceptions import ClientError

        client: Any = self.storage.client
        bucket = self.storage.bucket
        with self._found(), self.storage._explained(missing=self.key):
            try:
                extra = {"Range": f"bytes={start}-", "IfMatch": tag} if start and tag else {}
                got = client.get_object(Bucket=bucket, Key=self.key, **extra)
            except ClientError as error:
                code = str(error.response["Error"]["Code"])
                if code in ("InvalidRange", "416"):  # If-Match held, so the file is the one begun, and complete
                    got = None
                elif code in ("PreconditionFailed", "412"):
                    got = client.get_object(Bucket=bucket, Key=self.key)
                else:
                    raise
        if got is None:
            yield None
            return
        start = start if "ContentRange" in got else 0
        with contextlib.closing(got["Body"]):
            yield Body(start, Version(start + got["ContentLength"], got["ETag"]), self._chunks(got["Body"]))

    @staticmethod
    def _chunks(body: object) -> Iterator[bytes]:
        from botocore.exceptions import HTTPClientError, IncompleteReadError
        from urllib3.exceptions import HTTPError

        try:
            yield from body.iter_chunks(CHUNK)  # type: ignore[attr-defined]
        except (HTTPClientError, IncompleteReadError, HTTPError, OSError) as error:
            raise TemporaryError(type(error).__name__) from error

    @contextlib.contextmanager
    def _found(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise NvrError(f"there is no {self.uri}: check the address in the recipe") from None
