"""Images and sounds of a source, checked and kept by content until the data set is published.

Nobody vouches for these files: their type is read off their bytes, they are decoded once to see that they can be, and what
would unpack beyond measure is refused. Names are paths below the source's folder; addresses are never fetched.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from nvr_tasks.artifacts import sha256_file
from nvr_tasks.data.archives import MAX_BYTES
from nvr_tasks.errors import NvrError
from nvr_tasks.media import FOLDER, KINDS

MAX_FILE_BYTES = 64 * 2**20
MAX_FILES = 1_000_000
MAX_SECONDS = 3600
MAX_SAMPLES = MAX_SECONDS * 48_000 * 2  # an hour of stereo
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".wav", ".flac", ".mp3")
FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "WAV": "wav", "WAVEX": "wav", "FLAC": "flac", "MP3": "mp3"}

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*:")  # of a URL, or a drive's letter

Find = Callable[[str], Path]  # a file by its path below the source's folder


def unsafe_path(name: str) -> str | None:
    """Why a name is no path below a folder; None if it is one."""
    if _ADDRESS.match(name):
        return "is an address; addresses are never fetched"
    if name.startswith("/") or "\\" in name or "\0" in name:
        return "is an absolute or foreign path"
    if ".." in PurePosixPath(name).parts:
        return "climbs out of the folder"
    return None


def is_media(name: str) -> bool:
    """Whether a path below a data set's folder can be one of its images or sounds."""
    return name.lower().endswith(SUFFIXES) and unsafe_path(name) is None


def media_digests(folder: Path) -> dict[str, str]:
    """Path below a folder → sha256, of all files that can be images or sounds."""
    paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: sha256_file(path) for name, path in sorted(paths.items()) if is_media(name)}


def below(folder: Path) -> Find:
    """Finds files below a folder; links that lead out of it are not followed."""
    root = folder.resolve()

    def find(name: str) -> Path:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise NvrError("climbs out of the folder")
        return path

    return find


class MediaFiles:
    """The files of a data set in the making.

    Args:
        folder: scratch folder; files lie in it as `<kind>/<sha256>.<ending>`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes = 0
        self.known: dict[str, str] = {}  # "kind sha256" → as it is kept

    def keep(self, values: Mapping[str, Any], where: str, find: Find) -> str:
        """Keep the file that a row names, if it names one: `<kind>/<sha256>.<ending>`, or nothing.

        Args:
            values: kind → the row's value: a path, or bytes, or `datasets`' struct of bytes and path.
            where: the row, as people name it.
            find: opens paths.

        Raises:
            NvrError: the row has an image and a sound; the file is missing, too large, of another type or damaged.
        """
        given = {kind: value for kind, value in values.items() if value not in (None, "")}
        if len(given) > 1:
            raise NvrError(f"{where}: it has both {' and '.join(given)}, and one of them is read: remove the other")
        for kind, value in given.items():
            content, name = _content(value, kind, where, find)
            return self._kept(kind, content, f"{where}: {kind}{name}")
        return ""

    def _kept(self, kind: str, content: bytes, where: str) -> str:
        digest = hashlib.sha256(content).hexdigest()
        key = f"{kind} {digest}"
        if key not in self.known:
            ending = (_check_image if kind == "image" else _check_audio)(content, where)
            self.bytes += len(content)
            if self.bytes > MAX_BYTES or len(self.known) >= MAX_FILES:
                raise NvrError(
                    f"{where}: the images and sounds of this data set are more than {MAX_BYTES:,} bytes or {MAX_FILES:,} files: "
                    "use fewer"
                )
            path = self.folder / kind / f"{digest}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            self.known[key] = f"{kind}/{path.name}"
        return self.known[key]

    def publish(self, media: Iterable[str], folder: Path) -> None:
        """Put files into the folder of a `dataset` artefact."""
        for name in sorted(set(media)):
            target = folder / FOLDER / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self.folder / name, target)
            except OSError:  # another disk
                shutil.copyfile(self.folder / name, target)


def _content(value: Any, kind: str, where: str, find: Find) -> tuple[bytes, str]:
    """Bytes of a file, and its name, in front of what is said of it."""
    if isinstance(value, Mapping):
        name = f" {value['path']!r}" if isinstance(value.get("path"), str) else ""
        value = value.get("bytes")  # a path in there is one of the machine that made the table
        if not isinstance(value, bytes):
            raise NvrError(f"{where}: {kind}{name} has no bytes: keep the file in the table, or give its path as text")
    else:
        name = f" {value!r}"
    if isinstance(value, bytes):
        if len(value) > MAX_FILE_BYTES:
            raise _too_large(f"{where}: {kind}{name}", len(value))
        return value, name if len(name) < 200 else ""
    if not isinstance(value, str):
        raise NvrError(f"{where}: {kind} is {value!r}, expected the path of a file below the source's folder")
    said = f"{where}: {kind} {value!r}"
    if reason := unsafe_path(value):
        raise NvrError(f"{said} {reason}: give a path below the source's folder")
    try:
        path = find(value)
    except NvrError as error:
        raise NvrError(f"{said} {error}: give a path below the source's folder") from None
    if not path.is_file():
        raise NvrError(f"{said} is not there: add the file, or remove the document")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise _too_large(said, path.stat().st_size)
    return path.read_bytes(), name


def _too_large(said: str, size: int) -> NvrError:
    return NvrError(f"{said} has {size:,} bytes, and at most {MAX_FILE_BYTES:,} are read: make it smaller")


def _check_image(content: bytes, where: str) -> str:
    """The ending of a whole image of a known type that is not larger than PIL itself holds for safe.

    Of an animation, models read the first frame.
    """
    from PIL import Image, UnidentifiedImageError

    known = [name for name, ending in FORMATS.items() if ending in KINDS["image"]]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=known) as image:
                image.load()
                if image.format not in FORMATS:  # MPO, of which Pillow's reader of JPEG knows
                    raise NvrError(f"{where} is {image.format}, and PNG, JPEG or WebP is read: convert it")
                return FORMATS[image.format]
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise NvrError(
            f"{where} would unpack to more than {Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller, or remove the document"
        ) from None
    except UnidentifiedImageError:
        raise NvrError(
            f"{where} is no PNG, JPEG or WebP image: convert it, or fetch it again if it is damaged"
        ) from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
    ) as error:  # as PIL's readers say that bytes are wrong
        raise NvrError(f"{where} is damaged ({error}): fetch it again, or remove the document") from None


def _check_audio(content: bytes, where: str) -> str:
    """The ending of a whole sound of a known type and bearable length."""
    try:
        import soundfile
    except ImportError:
        raise NvrError(
            f"{where} is a sound, and soundfile, which reads those, is not installed: pip install soundfile soxr"
        ) from None

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as sound:
            if FORMATS.get(sound.format) not in KINDS["audio"]:
                raise NvrError(f"{where} is {sound.format_info}, and WAV, FLAC or MP3 is read: convert it")
            if sound.frames * sound.channels > MAX_SAMPLES:
                raise NvrError(f"{where} would unpack to more than {MAX_SAMPLES:,} samples: make it smaller")
            left = min(MAX_SECONDS * sound.samplerate, MAX_SAMPLES // sound.channels)
            frames = 0
            while len(block := sound.read(1 << 18, dtype="float32", always_2d=True)):
                frames += len(block)
                if frames > left:
                    raise NvrError(f"{where} is longer than {MAX_SECONDS:,} seconds or {MAX_SAMPLES:,} samples: cut it")
            if frames == 0 or frames < sound.frames:
                raise NvrError(f"{where} is cut off ({frames:,} of {sound.frames:,} samples): fetch it again")
            return FORMATS[sound.format]
    except soundfile.LibsndfileError as error:
        raise NvrError(f"{where} is no WAV, FLAC or MP3 file, or it is damaged ({error}): fetch it again") from None
