"""Unpack an archive that nobody vouches for: only plain files, only inside the folder, only so many bytes."""

from __future__ import annotations

import contextlib
import errno
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from nvr_tasks.errors import NvrError

MAX_BYTES = 64 * 2**30  # extracted, in all; the largest BEIR set (BioASQ) has about 20 GiB
MAX_MEMBERS = 100_000
ENDINGS = (".zip", ".tar.gz", ".tgz", ".tar")
STARTS = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # of zip, gzip, bzip2 and xz files


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    unsafe: str | None  # why it must not be extracted
    folder: bool
    open: Callable[[], IO[bytes] | None]


def is_archive(uri: str) -> bool:
    """Whether a URI names an archive rather than a folder."""
    return uri.lower().endswith(ENDINGS)


def extract(archive: Path, folder: Path, wanted: Callable[[str], bool], where: str) -> None:
    """Extract the members whose path `wanted` accepts. Every member is checked before the first byte is written.

    Args:
        wanted: takes the member's path inside the archive.
        where: the archive, as people name it.

    Raises:
        NvrError: a member is absolute, climbs out (`..`), is a link or a device; the archive is damaged, encrypted, no
            archive, or larger than `MAX_BYTES` when extracted. Nothing is left in `folder` then.
    """
    with _damage(where):
        total = 0
        for number, member in enumerate(_members(archive, where), 1):
            unsafe = _unsafe_name(member.name) or member.unsafe
            if unsafe:
                raise NvrError(f"{where} is not safe to extract: {member.name!r} {unsafe}; nothing was extracted")
            total += member.size
            if total > MAX_BYTES or number > MAX_MEMBERS:
                raise NvrError(
                    f"{where} would extract to more than {MAX_BYTES:,} bytes or {MAX_MEMBERS:,} files; nothing was extracted"
                )
        left = MAX_BYTES
        for member in _members(archive, where):
            if member.folder or not wanted(member.name):
                continue
            target = folder / PurePosixPath(member.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            left -= _copy(member, target, min(left, member.size), where)


def _copy(member: _Member, target: Path, limit: int, where: str) -> int:
    """Copy at most what the member's header announces: a bomb's header lies."""
    written = 0
    source = member.open()
    if source is None:
        raise NvrError(f"{where}: {member.name!r} has no content")
    with source, target.open("wb") as out:
        while chunk := source.read(1 << 20):
            written += len(chunk)
            if written > limit:
                out.close()
                target.unlink()
                raise NvrError(f"{where}: {member.name!r} is larger than its header says ({limit:,} bytes); refused")
            out.write(chunk)
    return written


def _unsafe_name(name: str) -> str | None:
    path = PurePosixPath(name)
    if path.is_absolute() or "\\" in name or (len(name) > 1 and name[1] == ":"):
        return "is an absolute or foreign path"
    if ".." in path.parts:
        return "climbs out of the folder"
    return "is no file name" if "\0" in name or not name else None


def _members(archive: Path, where: str) -> Iterator[_Member]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                opener: Callable[[], IO[bytes] | None] = partial(zipped.open, info)
                yield _Member(info.filename, info.file_size, _unsafe_zip(info), info.is_dir(), opener)
        return
    if not tarfile.is_tarfile(archive):
        if _starts_like_one(archive):
            raise zipfile.BadZipFile("it begins like an archive, but cannot be read as one")
        raise NvrError(
            f"{where} is neither a zip nor a tar archive ({archive.stat().st_size:,} bytes): check the address"
        )
    with tarfile.open(archive) as tape:
        for entry in tape:
            opener = partial(tape.extractfile, entry)
            yield _Member(entry.name, entry.size, _unsafe_tar(entry), entry.isdir(), opener)
        _check_end(tape, where)


def _starts_like_one(archive: Path) -> bool:
    with archive.open("rb") as file:
        return file.read(8).startswith(STARTS)


def _check_end(tape: tarfile.TarFile, where: str) -> None:
    """tarfile takes a cut-off or garbled header for the end of the archive, so look whether the end is there."""
    stream = tape.fileobj
    assert stream is not None  # noqa: S101
    stream.seek(tape.offset)
    marker = stream.read(tarfile.BLOCKSIZE)
    if marker != bytes(tarfile.BLOCKSIZE):
        raise NvrError(f"{where} is damaged or cut off (no end of archive at byte {tape.offset:,}): fetch it again")
    while stream.read(1 << 20):  # a compressed stream checks its own sum at its end
        pass


def _unsafe_zip(info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "is a link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a device or another special file"
    return "is encrypted" if info.flag_bits & 0x1 else None


def _unsafe_tar(entry: tarfile.TarInfo) -> str | None:
    if entry.issym() or entry.islnk():
        return f"is a link (to {entry.linkname!r})"
    return None if entry.isfile() or entry.isdir() else "is a device or another special file"


@contextlib.contextmanager
def _damage(where: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, NotImplementedError) as error:
        raise _damaged(where, error) from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise NvrError(f"{where} has a member whose name is too long for this disk: repack the archive") from None
        if error.errno is None:  # how gzip and bz2 say that a stream is broken
            raise _damaged(where, error) from None
        raise


def _damaged(where: str, error: Exception) -> NvrError:
    return NvrError(f"{where} is damaged or cut off ({str(error) or type(error).__name__}): fetch it again")
