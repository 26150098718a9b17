"""Archives that nobody vouches for."""

import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nvr_tasks.data import archives
from nvr_tasks.errors import NvrError


def zip_with(name: str, data: bytes = b"x", mode: int = 0) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("set/corpus.jsonl", b"{}")
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, data)
    return out.getvalue()


def tar_with(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        good = tarfile.TarInfo("set/corpus.jsonl")
        good.size = 2
        archive.addfile(good, io.BytesIO(b"{}"))
        bad = tarfile.TarInfo(name)
        bad.type, bad.linkname = kind, link
        archive.addfile(bad)
    return out.getvalue()


def extract(tmp_path: Path, data: bytes) -> Path:
    archive, folder = tmp_path / "a", tmp_path / "in" / "out"
    archive.write_bytes(data)
    archives.extract(archive, folder, lambda _: True, "https://host/a")
    return folder


BAD = {
    "zip climbs": (lambda: zip_with("../evil"), "climbs out"),
    "zip climbs inside": (lambda: zip_with("set/../../evil"), "climbs out"),
    "zip absolute": (lambda: zip_with("/tmp/evil"), "absolute"),  # noqa: S108
    "zip backslash": (lambda: zip_with("..\\evil"), "absolute or foreign"),
    "zip drive": (lambda: zip_with("C:evil"), "absolute or foreign"),
    "zip symlink": (lambda: zip_with("set/link", b"/etc/passwd", stat.S_IFLNK | 0o777), "is a link"),
    "zip device": (lambda: zip_with("set/dev", b"", stat.S_IFCHR | 0o600), "device"),
    "tar climbs": (lambda: tar_with("../evil"), "climbs out"),
    "tar absolute": (lambda: tar_with("/tmp/evil"), "absolute"),  # noqa: S108
    "tar symlink": (lambda: tar_with("set/link", tarfile.SYMTYPE, "../../evil"), "is a link (to '../../evil')"),
    "tar hard link": (lambda: tar_with("set/link", tarfile.LNKTYPE, "/etc/passwd"), "is a link"),
    "tar fifo": (lambda: tar_with("set/pipe", tarfile.FIFOTYPE), "device"),
    "tar device": (lambda: tar_with("set/null", tarfile.CHRTYPE), "device"),
}


@pytest.mark.parametrize("case", BAD)
def test_unsafe_members_are_refused_and_nothing_is_extracted(case: str, tmp_path: Path) -> None:
    make: Callable[[], bytes]
    make, words = BAD[case]
    with pytest.raises(NvrError) as caught:
        extract(tmp_path, make())
    assert words in str(caught.value)
    assert "https://host/a" in str(caught.value)
    assert [p.name for p in tmp_path.rglob("*")] == ["a"], "nothing but the archive"


def test_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 1000)
    with pytest.raises(NvrError, match="more than 1,000 bytes"):
        extract(tmp_path, zip_with("set/bomb", b"\0" * 10_000))
    assert not (tmp_path / "in").exists()


def test_a_header_that_lies_about_the_size(tmp_path: Path) -> None:
    data = bytearray(zip_with("set/bomb", b"\0" * 100_000))
    size = (100_000).to_bytes(4, "little")
    at = -1
    while (at := data.find(size, at + 1)) >= 0:
        data[at : at + 4] = (10).to_bytes(4, "little")
    with pytest.raises(NvrError, match=r"larger than its header says|damaged"):
        extract(tmp_path, bytes(data))
    bomb = tmp_path / "in" / "out" / "set" / "bomb"
    assert not bomb.exists() or bomb.stat().st_size <= 10


@pytest.mark.parametrize("cut", [0.3, 0.9])
@pytest.mark.parametrize("make", [lambda: zip_with("set/f", b"abc" * 9999), lambda: tar_with("set/f")])
def test_cut_off_archives(tmp_path: Path, make: Callable[[], bytes], cut: float) -> None:
    data = make()
    with pytest.raises(NvrError, match=r"damaged|neither a zip nor a tar"):
        extract(tmp_path, data[: int(len(data) * cut)])


def test_not_an_archive(tmp_path: Path) -> None:
    with pytest.raises(NvrError, match="neither a zip nor a tar archive"):
        extract(tmp_path, b"<html>not found</html>")


def test_only_what_is_wanted_is_extracted(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    archive.write_bytes(zip_with("set/readme.md"))
    archives.extract(archive, tmp_path / "out", lambda n: n.endswith(".jsonl"), "a")
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["corpus.jsonl"]


def tar_of(kind: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as tape:
        entry = tarfile.TarInfo("set/corpus.jsonl")
        entry.size = 20_000
        tape.addfile(entry, io.BytesIO(os.urandom(20_000)))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2"])
@pytest.mark.parametrize("at", [0.5, 0.7, -6])
def test_flipped_bytes_in_a_compressed_tar(tmp_path: Path, kind: str, at: float) -> None:
    data = bytearray(tar_of(kind))
    place = int(len(data) * at) if at > 0 else len(data) + int(at)
    data[place] ^= 0xFF
    with pytest.raises(NvrError, match="is damaged or cut off"):
        extract(tmp_path, bytes(data))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_flipped_bytes_in_a_zip(tmp_path: Path, method: int) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as zipped:
        zipped.writestr("set/corpus.jsonl", os.urandom(20_000))
    data = bytearray(buffer.getvalue())
    data[5000:5010] = bytes(10)
    with pytest.raises(NvrError, match="is damaged or cut off"):
        extract(tmp_path, bytes(data))


def test_half_a_zip_is_called_cut_off(tmp_path: Path) -> None:
    with pytest.raises(NvrError, match="is damaged or cut off"):
        extract(tmp_path, zip_with("set/f", b"abc" * 9999)[:100])


def test_a_name_that_is_too_long_for_the_disk(tmp_path: Path) -> None:
    with pytest.raises(NvrError, match="name is too long"):
        extract(tmp_path, zip_with("set/" + "n" * 300))
