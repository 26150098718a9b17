"""Where artefacts live: `file://` folders and `s3://` buckets behind one small interface of keys and bytes.

S3 goes through boto3 (managed multipart transfers); endpoint, region and credentials come from the environment
(`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, …), never from a recipe.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

from nvr_tasks.errors import NvrError

if TYPE_CHECKING:
    from botocore.exceptions import ClientError
    from mypy_boto3_s3 import S3Client


class Storage(Protocol):
    """A flat space of keys (`kind/fingerprint/file`) below one root URI."""

    uri: str

    def local_path(self, key: str) -> Path | None:
        """The file or folder behind `key` when it is on this machine's disk, else None."""

    def put_file(self, local: Path, key: str) -> None:
        """Copy a local file to `key`; the key appears whole or not at all."""

    def get_file(self, key: str, local: Path) -> None:
        """Copy `key` to a local file. Raises FileNotFoundError."""

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write `data` atomically. With `if_absent`, False (and no change) when the key exists already."""

    def get_bytes(self, key: str) -> bytes | None:
        """Content of `key`, or None where there is none."""

    def list(self, prefix: str) -> list[str]:
        """Keys below the folder `prefix`, sorted."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of every key below the folder `prefix`."""

    def delete(self, prefix: str) -> None:
        """Remove the key `prefix` and every key below it; fine if there is none."""


_SIGNATURE = r"(?:[^?&=\s]*(?:signature|token|secret|passw|credential|access.?key|api.?key)[^?&=\s]*|sig|key|auth)"
_USERINFO = re.compile(r"(?<=://)[^/?#\s]*@")
_SECRET_VALUE = re.compile(rf"([?&]{_SIGNATURE}=)[^&#\s'\"]*", re.IGNORECASE)


def refuse_secrets(uri: str) -> None:
    """Raise ValueError on a URI that carries a secret: URIs end in logs, manifests, records and MLflow."""
    if _USERINFO.search(uri) or _SECRET_VALUE.search(uri):
        raise ValueError(
            f"{hide_secrets(uri)} carries credentials, and addresses are logged and recorded: take them out and give them in the "
            "environment (AWS_*) or ~/.netrc, or use a public or already authenticated mirror"
        )


def hide_secrets(text: str) -> str:
    """The text with what is secret in its URIs left out."""
    return _SECRET_VALUE.sub(r"\1***", _USERINFO.sub("***@", text))


def open_storage(uri: str) -> Storage:
    """The storage behind a root URI (`file://…`, a plain path, or `s3://bucket[/prefix]`)."""
    try:
        refuse_secrets(uri)
    except ValueError as error:
        raise NvrError(str(error)) from None
    parts = urlsplit(uri)
    if uri.strip() and (parts.scheme == "" or (parts.scheme == "file" and parts.netloc in ("", "localhost"))):
        # A shell leaves the tilde of `--root=~/x` alone.
        path = Path.home() / uri[2:] if uri == "~" or uri.startswith("~/") else Path(uri)
        return LocalStorage((Path(unquote(parts.path)) if parts.scheme else path).resolve())  # one name for one place
    if parts.scheme == "s3" and parts.netloc:
        return S3Storage(parts.netloc, parts.path.strip("/"))
    raise NvrError(
        f"cannot store artefacts at {uri!r}: use a folder, file:///folder or s3://bucket/prefix (NVR_ROOT or --root)"
    )


class LocalStorage:
    """Keys are files below a folder; writes go to a temporary name first."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = root.as_uri()

    def local_path(self, key: str) -> Path:
        return self.root / key

    def put_file(self, local: Path, key: str) -> None:
        with self._temporary(key) as temporary:
            shutil.copyfile(local, temporary)
            temporary.replace(self.root / key)

    def get_file(self, key: str, local: Path) -> None:
        shutil.copyfile(self.root / key, local)

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        with self._temporary(key) as temporary:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if if_absent:
                try:
                    os.link(temporary, self.root / key)  # unlike rename, fails where the name is taken
                except FileExistsError:
                    return False
            else:
                temporary.replace(self.root / key)
            return True

    def get_bytes(self, key: str) -> bytes | None:
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, prefix: str) -> list[str]:
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str) -> dict[str, int]:
        found = {}
        for folder, _, names in os.walk(
            self.root / prefix
        ):  # unlike rglob, not disturbed by what others delete meanwhile
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    if not name.startswith(".tmp-"):
                        found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return found

    def delete(self, prefix: str) -> None:
        path = self.root / prefix
        while path.is_dir():
            try:
                shutil.rmtree(path)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):  # somebody deletes or writes the same
                    raise
        path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _temporary(self, key: str) -> Iterator[Path]:
        folder = (self.root / key).parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".tmp-{uuid.uuid4().hex}"
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


class S3Storage:
    """Keys are objects below `s3://bucket/prefix`."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    @cached_property
    def client(self) -> S3Client:
        import boto3
        from botocore.config import Config

        # Standard retries cover a store that restarts; checksums are on by default (botocore ≥ 1.36) where the store has them.
        try:
            client: S3Client = boto3.client(
                "s3", config=Config(retries={"mode": "standard", "max_attempts": 6}, connect_timeout=10)
            )
        except ValueError as error:  # botocore's answer to an endpoint that is no URL
            raise NvrError(f"cannot open {self.uri}: {error}; AWS_ENDPOINT_URL must be like http://host:port") from None
        return client

    def local_path(self, key: str) -> None:  # noqa: ARG002
        return None

    def put_file(self, local: Path, key: str) -> None:
        with self._explained():
            self.client.upload_file(str(local), self.bucket, self.prefix + key)

    def get_file(self, key: str, local: Path) -> None:
        with self._explained(missing=key):
            self.client.download_file(self.bucket, self.prefix + key, str(local))

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        from botocore.exceptions import ClientError

        extra: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}
        with self._explained():
            try:
                self.client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data, **extra)
            except ClientError as error:
                # 409: another conditional put of this key is in flight, so this one has lost as well.
                if if_absent and error.response["Error"]["Code"] in (
                    "PreconditionFailed",
                    "412",
                    "ConditionalRequestConflict",
                    "409",
                ):
                    return False
                raise
        return True

    def get_bytes(self, key: str) -> bytes | None:
        try:
            with self._explained(missing=key):
                return self.client.get_object(Bucket=self.bucket, Key=self.prefix + key)["Body"].read()
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> list[str]:
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str) -> dict[str, int]:
        start = f"{self.prefix}{prefix.rstrip('/')}/"
        with self._explained():
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start)
            return {o["Key"].removeprefix(self.prefix): o["Size"] for page in pages for o in page.get("Contents", [])}

    def delete(self, prefix: str) -> None:
        keys = [prefix, *self.list(prefix)]
        with self._explained():
            for start in range(0, len(keys), 1000):
                batch = [{"Key": self.prefix + key} for key in keys[start : start + 1000]]
                answer = self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": batch, "Quiet": True})  # type: ignore[typeddict-item]
                for error in answer.get("Errors", []):  # reported inside a successful answer
                    raise NvrError(
                        f"S3 did not delete {self.uri}/{error.get('Key', '')}: {error.get('Message', error.get('Code'))}"
                    )

    @contextlib.contextmanager
    def _explained(self, missing: str | None = None) -> Iterator[None]:
        """Turn boto's errors into ones that say what to mend; a missing `missing` is a FileNotFoundError."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError, NoCredentialsError

        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        try:
            yield
        except NoCredentialsError:
            raise NvrError(
                f"no S3 credentials for {self.uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a role)"
            ) from None
        except EndpointConnectionError:
            raise NvrError(
                f"cannot reach the S3 endpoint {endpoint} of {self.uri}: is it up, and is AWS_ENDPOINT_URL right?"
            ) from None
        except ClientError as error:
            raise self._explain(error, endpoint, missing) from None
        except (Boto3Error, BotoCoreError) as error:
            if isinstance(error.__context__, ClientError):  # what a managed transfer wraps
                raise self._explain(error.__context__, endpoint, missing) from None
            raise NvrError(f"S3 at {endpoint} failed on {self.uri}: {error}") from error

    def _explain(self, error: ClientError, endpoint: str, missing: str | None) -> Exception:
        """What an answer of the store means for the user."""
        code = str(error.response.get("Error", {}).get("Code", ""))
        if missing is not None and code in ("NoSuchKey", "404", "NotFound"):
            return FileNotFoundError(f"{self.uri}/{missing}")
        if code == "NoSuchBucket":
            return NvrError(f"no bucket {self.bucket!r} at {endpoint}: create it, or correct NVR_ROOT ({self.uri})")
        if code in ("SignatureDoesNotMatch", "InvalidAccessKeyId", "AccessDenied", "403", "Forbidden", "ExpiredToken"):
            return NvrError(
                f"S3 at {endpoint} refused access to {self.uri} ({code}): "
                "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket policy"
            )
        return NvrError(f"S3 at {endpoint} failed on {self.uri}: {error}")
