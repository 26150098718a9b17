"""Content-addressed artefacts: `<root>/<kind>/<fingerprint>/`, files first, `manifest.json` last.

An artefact exists if and only if its manifest does, so a killed writer leaves nothing that a reader can see. The
fingerprint is a digest of what the artefact is made from (kind, stage version, the config that can change the
result, input fingerprints): asking for the same thing twice finds it the second time.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import socket
import stat
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from nvr_tasks.errors import NvrError
from nvr_tasks.storage import LocalStorage, Storage, open_storage
from nvr_tasks.version import code_version

MANIFEST = "manifest.json"
CHUNK = 1 << 20

log = logging.getLogger(__name__)


def fingerprint(kind: str, version: int, config: Any, inputs: Mapping[str, str]) -> str:
    """Identity of an artefact: 32 hex digits over kind, stage version, semantic config and input fingerprints."""
    tree = {"kind": kind, "version": version, "config": config, "inputs": dict(inputs)}
    text = json.dumps(tree, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """Digest of a file, read once per process while it does not change."""
    status = path.stat()
    return _sha256_known(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _sha256_known(path: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001
    return sha256_file(path)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a reader says of damaged bytes into an error that names the file (or folder) of the artefact."""
    try:
        yield
    except (ValueError, EOFError, KeyError, NotImplementedError, OSError) as error:  # pyarrow's, numpy's and json's
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NvrError(
            f"cannot read {path}: {said}; its bytes are damaged. Run with --verify (or NVR_VERIFY=1) to have every file "
            "checked, delete the artefact's folder and run the stage that makes it again"
        ) from error


class FileEntry(BaseModel):
    """One file of an artefact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int
    sha256: str


class Manifest(BaseModel):
    """What an artefact is, what it was made from and what its files must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    fingerprint: str
    stage_version: int
    config: Any
    inputs: dict[str, str]  # role → URI of the artefact it was made from
    stats: dict[str, Any]
    files: list[FileEntry]
    prefix: str = ""  # S3: the folder of this writer's files, so that two racers never mix theirs
    code_version: str = ""
    created_at: str = ""

    @property
    def content_digest(self) -> str:
        """Digest over paths and bytes: equal for two artefacts with the same content."""
        return hashlib.sha256("\n".join(f"{f.path}\0{f.sha256}" for f in self.files).encode()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """Which artefact a stage is about to make: enough to find it or to publish it."""

    kind: str
    version: int
    config: Any
    inputs: dict[str, str] = field(default_factory=dict)  # role → URI

    @property
    def fingerprint(self) -> str:
        """Inputs count by fingerprint, so the same inputs under another root are the same inputs."""
        return fingerprint(
            self.kind, self.version, self.config, {k: fingerprint_of(uri) for k, uri in self.inputs.items()}
        )


@dataclass(frozen=True)
class Artifact:
    """A published artefact."""

    uri: str
    manifest: Manifest


def fingerprint_of(uri: str) -> str:
    """Last part of an artefact URI."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


class Store:
    """All artefacts below one root.

    Args:
        root: `file://…`, a plain folder or `s3://bucket/prefix`.
        verify: check digests on every read (sizes are always checked; on S3 digests are, too).
        scratch: local folder for work in progress and, with S3, for fetched copies.
    """

    def __init__(self, root: str, *, verify: bool = False, scratch: str | None = None) -> None:
        self.storage: Storage = open_storage(root)
        self.root = self.storage.uri
        self.verify = verify
        self._scratch = scratch

    @functools.cached_property
    def scratch(self) -> Path:
        """Local folder for work in progress and fetched copies."""
        if self._scratch is not None:
            return Path(self._scratch).absolute()
        if isinstance(self.storage, LocalStorage):
            return self.storage.root / "tmp"  # same disk, so publishing is a rename
        return _private_folder(Path(tempfile.gettempdir()) / f"nvr-{os.getuid()}")

    # ── finding and reading ──────────────────────────────────────────────────────────────────────────────────

    def uri(self, kind: str, fingerprint: str) -> str:
        """Where an artefact is, or would be."""
        return f"{self.root}/{kind}/{fingerprint}"

    def find(self, identity: Identity) -> Artifact | None:
        """The artefact with this identity, if it has been published."""
        return self.get(identity.kind, identity.fingerprint)

    def get(self, kind: str, fingerprint: str) -> Artifact | None:
        """The artefact, if it has been published. Raises NvrError on a damaged manifest."""
        key = f"{kind}/{fingerprint}/{MANIFEST}"
        data = self.storage.get_bytes(key)
        if data is None:
            return None
        try:
            manifest = Manifest.model_validate_json(data)
        except ValidationError as error:
            raise NvrError(
                f"{self.root}/{key} is damaged ({error.errors()[0]['msg']}): delete the folder and run the stage again"
            ) from None
        if (manifest.kind, manifest.fingerprint) != (kind, fingerprint):
            raise NvrError(
                f"{self.root}/{key} is damaged (it describes {manifest.kind}/{manifest.fingerprint}): "
                "delete the folder and run the stage again"
            )
        return Artifact(self.uri(kind, fingerprint), manifest)

    def open(self, uri: str) -> Artifact:
        """The artefact at a URI below this root."""
        relative = uri.rstrip("/").removeprefix(self.root).strip("/")
        kind, _, name = relative.partition("/")
        if not uri.startswith(f"{self.root}/") or not name or "/" in name:
            raise NvrError(
                f"{uri} is not an artefact below {self.root} (expected {self.root}/<kind>/<fingerprint>): check the URI and --root"
            )
        artifact = self.get(kind, name)
        if artifact is None:
            raise NvrError(
                f"no artefact at {uri}: it was never finished or has been deleted; run the stage that makes {kind} again"
            )
        return artifact

    def recorded(self, uri: str) -> Artifact:
        """The artefact that a record names, below this root, which may be a copy of the one it was made in."""
        kind, fingerprint = uri.rsplit("/", 2)[1:]
        return self.open(self.uri(kind, fingerprint))

    def input_of(self, artifact: Artifact, role: str) -> Artifact:
        """What an artefact was made from."""
        return self.recorded(artifact.manifest.inputs[role])

    def fetch(self, artifact: Artifact, only: Collection[str] | None = None) -> Path:
        """A local, read-only folder with the artefact's files, or with those named in `only`.

        Raises:
            NvrError: a file is missing, has another size, or (with `verify`, and always from S3) another digest.
        """
        manifest = artifact.manifest
        entries = [e for e in manifest.files if only is None or e.path in only]
        key = f"{manifest.kind}/{manifest.fingerprint}"
        local = self.storage.local_path(key)
        if local is not None:
            for entry in entries:
                self._check(artifact, local / entry.path, entry, digest=self.verify)
            return local
        cache = self.scratch / "cache" / key
        for entry in entries:
            target = cache / entry.path
            try:
                self._check(artifact, target, entry, digest=True, once=not self.verify)
                continue
            except NvrError:
                target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            try:
                self.storage.get_file(f"{key}/{manifest.prefix}{entry.path}", partial)
                self._check(artifact, partial, entry, digest=True)
                partial.replace(target)
            except FileNotFoundError:
                raise NvrError(_damaged(artifact, entry.path, "is missing")) from None
            finally:
                partial.unlink(missing_ok=True)
        return cache

    def check(self, artifact: Artifact) -> None:
        """Raise NvrError unless the files are there in the right size, and with `verify` have the right bytes."""
        if self.verify:
            self.fetch(artifact)
            return
        folder = f"{artifact.manifest.kind}/{artifact.manifest.fingerprint}/"
        sizes = self.storage.sizes(folder)
        for entry in artifact.manifest.files:
            size = sizes.get(f"{folder}{artifact.manifest.prefix}{entry.path}")
            if size is None:
                raise NvrError(_damaged(artifact, entry.path, "is missing"))
            if size != entry.size:
                raise NvrError(_damaged(artifact, entry.path, f"has {size:,} bytes, the manifest says {entry.size:,}"))

    def read_json(self, artifact: Artifact, name: str) -> dict[str, Any]:
        """One small JSON file of an artefact. Raises NvrError if it is missing or damaged."""
        path = self.fetch(artifact, only=(name,)) / name
        with reading(path):
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return value

    @staticmethod
    def _check(artifact: Artifact, path: Path, entry: FileEntry, *, digest: bool, once: bool = False) -> None:
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise NvrError(_damaged(artifact, entry.path, "is missing")) from None
        if size != entry.size:
            raise NvrError(_damaged(artifact, entry.path, f"has {size:,} bytes, the manifest says {entry.size:,}"))
        if digest and (sha256_once if once else sha256_file)(path) != entry.sha256:
            raise NvrError(_damaged(artifact, entry.path, "has other bytes than the manifest's sha256"))

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def workdir(self, label: str, parent: Path | None = None) -> Iterator[Path]:
        """A private folder below `parent` (the scratch folder), gone afterwards; those of killed processes go first.

        While it is in use, the file `.<name>.lock` beside it is locked; the folder never exists without that file.
        """
        parent = parent or self.scratch
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        folder = parent / f"work-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}-{label}"
        with locked(parent / f".{folder.name}.lock"):
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def publish(self, identity: Identity, write: Callable[[Path], dict[str, Any]]) -> Artifact:
        """Make an artefact: `write` fills an empty folder and returns its stats; then it appears at once.

        If another writer published the same identity meanwhile, theirs is kept and returned.
        """
        with self.workdir(f"{identity.kind}-{identity.fingerprint[:8]}") as folder:
            stats = write(folder)
            return self.publish_folder(identity, folder, stats)

    def publish_folder(self, identity: Identity, folder: Path, stats: dict[str, Any]) -> Artifact:
        """Publish a finished local folder; on the local disk the folder is moved, so it must be a scratch one."""
        paths = sorted(p for p in folder.rglob("*") if p.is_file())
        entries = [
            FileEntry(path=p.relative_to(folder).as_posix(), size=p.stat().st_size, sha256=sha256_file(p))
            for p in paths
        ]
        manifest = Manifest(
            kind=identity.kind,
            fingerprint=identity.fingerprint,
            stage_version=identity.version,
            config=identity.config,
            inputs=identity.inputs,
            stats=stats,
            files=entries,
            code_version=code_version(),
            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        key = f"{identity.kind}/{identity.fingerprint}"
        target = self.storage.local_path(key)
        if target is not None:
            (folder / MANIFEST).write_bytes(_json(manifest))
            try:
                _move_into_place(folder, target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                with self.workdir(identity.kind, target.parents[1] / "tmp") as near:  # the scratch is on another disk
                    _move_into_place(shutil.copytree(folder, near / folder.name), target)
        else:
            manifest = manifest.model_copy(update={"prefix": f"files-{manifest.content_digest[:12]}/"})
            for path, entry in zip(paths, entries, strict=True):
                self.storage.put_file(path, f"{key}/{manifest.prefix}{entry.path}")
            self.storage.put_bytes(f"{key}/{MANIFEST}", _json(manifest), if_absent=True)
        published = self.find(identity)
        if published is None:
            raise NvrError(
                f"could not publish {self.uri(identity.kind, identity.fingerprint)}: is {self.root} writable?"
            )
        return published

    def delete(self, artifact: Artifact) -> None:
        """Remove an artefact, manifest first, so that it never exists without its files."""
        key = f"{artifact.manifest.kind}/{artifact.manifest.fingerprint}"
        self.storage.delete(f"{key}/{MANIFEST}")
        self.storage.delete(key)

    def discard_finished(self, prefix: str, kind: str) -> None:
        """Delete `<prefix>/<fingerprint>/` of published artefacts: left where a process was killed before tidying up."""
        for name in sorted({key.split("/")[1] for key in self.storage.list(prefix)}):
            if self.get(kind, name) is not None:
                self.storage.delete(f"{prefix}/{name}")

    # ── small mutable records beside the artefacts ───────────────────────────────────────────────────────────

    def read_record(self, key: str) -> Any | None:
        """A JSON record (`refs/…`, `runs/…`), or None."""
        data = self.storage.get_bytes(key)
        try:
            return None if data is None else json.loads(data)
        except ValueError as error:
            raise NvrError(f"{self.root}/{key} is damaged ({error}): delete it and run the stage again") from None

    def write_record(self, key: str, value: Any) -> None:
        """Replace a JSON record atomically."""
        self.storage.put_bytes(key, json.dumps(value, indent=2, ensure_ascii=False).encode())


def _private_folder(folder: Path) -> Path:
    """A folder in a place that everybody can write to, which nobody else can read or has prepared for us."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise NvrError(f"{folder} is not a folder of this user: set NVR_SCRATCH to one that is")
    if stat.S_IMODE(status.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which is gone afterwards. The system frees the lock of a process that is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another process holds %s: waiting until it is done", path)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_at(lock, path):
                continue  # swept between open and flock
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def abandoned(path: Path) -> bool:
    """Whether a lock file is one that a killed process left."""
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _is_at(lock, path)
    except OSError:  # held, not there, or another user's
        return False


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sweep(parent: Path) -> None:
    """Remove the work folders that nobody holds the lock of: their processes are gone, on whichever machine they were."""
    for path in parent.glob(".work-*.lock"):
        try:
            with path.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _is_at(lock, path):
                    continue
                folder = parent / path.name.removeprefix(".").removesuffix(".lock")
                for left in (folder, _leftover(folder)):
                    shutil.rmtree(left, ignore_errors=True)
                if not folder.exists() and not _leftover(folder).exists():
                    path.unlink(missing_ok=True)
        except OSError:  # in use, another user's, or swept by another process just now
            continue


def _leftover(folder: Path) -> Path:
    """Where a half-deleted artefact is moved that is in the way of publishing `folder`."""
    return folder.with_name(f"{folder.name}-leftover")


def _move_into_place(folder: Path, target: Path) -> None:
    """Rename a finished folder, manifest included, to its place; keep what is there if it is finished, too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            folder.rename(target)  # atomic, and fails on a folder that is not empty
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if (target / MANIFEST).exists():
            return  # another writer was first
        leftover = _leftover(folder)  # a deletion that was killed half-way
        with contextlib.suppress(FileNotFoundError):
            target.rename(leftover)
        shutil.rmtree(leftover, ignore_errors=True)


def _json(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(indent=2).encode()


def _damaged(artifact: Artifact, path: str, fact: str) -> str:
    return f"artefact {artifact.uri}: {path} {fact}; delete that folder and run the stage that makes {artifact.manifest.kind} again"
