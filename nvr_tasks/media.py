"""Images and sounds beside texts: how a data set names one, and what a model is given for it.

Between download and model, what a model sees stays a string: a reference to the file, then the text. The file's digest is in
it, so equal strings are equal inputs, which is all that keys of vectors, groups of duplicates and batches ask for. A
reference begins with a control character, and `normalise` takes those out of every text that comes from outside, so no
text can pass for one. It becomes sentence-transformers' input, `{"image": path, "text": …}`, where the model is called.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nvr_tasks.errors import NvrError

KINDS = {"image": ("png", "jpg", "webp"), "audio": ("wav", "flac", "mp3")}  # kind → endings of files as they are kept
NAMES = {"image": "images", "audio": "sounds"}
FOLDER = "media"  # of a `dataset` artefact
START, END = "\x02", "\x03"

_ENDINGS = "|".join(f"{kind}/[0-9a-f]{{64}}\\.(?:{'|'.join(endings)})" for kind, endings in KINDS.items())
_REFERENCE = re.compile(f"{START}({_ENDINGS}){END}(.*)", re.DOTALL)


def refer(media: str, text: str) -> str:
    """What a model sees of a file (`<kind>/<sha256>.<ending>`; empty: none) and a text."""
    return f"{START}{media}{END}{text}" if media else text


def parted(seen: str) -> tuple[str, str]:
    """File and text of what a model sees; the file is empty where there is none."""
    found = _REFERENCE.fullmatch(seen)
    return (found[1], found[2]) if found else ("", seen)


def kind_of(media: str) -> str:
    """`image` or `audio`."""
    return media.partition("/")[0]


def shown(seen: str) -> str:
    """What a model sees, for people."""
    media, text = parted(seen)
    return f"[{kind_of(media)} {Path(media).name[:12]}…] {text}".rstrip() if media else text


def more_than_text(model: Any) -> bool:
    """Whether a sentence-transformers model reads anything but text."""
    return bool(set(getattr(model, "modalities", ["text"])) - {"text", "message"})


def in_messages(model: Any) -> bool:
    """Whether a model reads texts as messages of a chat template; a prompt is then a turn of its own, which nothing tells apart."""
    return "message" in getattr(model, "modalities", ())


def inputs_of(model: Any, folder: Path | None) -> Callable[[Any], Any]:
    """What makes sentence-transformers' input of what a model sees.

    A model that reads images gets texts as `{"text": …}`: of a bare string that looks like a path or an address of an image,
    sentence-transformers would fetch that.

    Args:
        model: a sentence-transformers model.
        folder: of a data set's files, for texts in which there may be references; without it, every string is a text.
    """
    if not more_than_text(model):
        return lambda seen: seen

    def given(seen: Any) -> Any:
        if not isinstance(seen, str):
            return seen  # made before
        media, text = parted(seen) if folder is not None else ("", seen)
        if folder is None or not media:
            return {"text": text}
        # The file first: an input that is too long is cut at its end, and no image survives being cut.
        return {kind_of(media): str(folder / media)} | ({"text": text} if text else {})

    return given


def bound_images(model: Any, pixels: int | None) -> None:
    """Have a model's processor make images smaller that have more pixels, in place; it is saved with the model. None: as it does.

    Raises:
        NvrError: the processor takes no such bound.
    """
    if pixels is None:
        return
    images: Any = getattr(getattr(model[0], "processor", None), "image_processor", None)
    if not type(images).__name__.startswith("Qwen"):  # others give all images one size, or mean sides by the same words
        raise NvrError(
            f"image_pixels is {pixels:,}, but the processor of this model ({type(images).__name__}) takes no such bound: remove it"
        )
    bounds = {"shortest_edge": min(pixels, dict(images.size)["shortest_edge"]), "longest_edge": pixels}
    images.size = type(images.size)(**bounds)


def modality_of(seen: Any) -> str | tuple[str, ...]:
    """The modality of what a model sees, in sentence-transformers' words: `text`, `image` or `("image", "text")`."""
    if not isinstance(seen, str):  # the library's input, made before
        names = tuple(sorted(str(name) for name in seen))
        return names[0] if len(names) == 1 else names
    media, text = parted(seen)
    if not media:
        return "text"
    return tuple(sorted((kind_of(media), "text"))) if text else kind_of(media)


def refuse_unread(who: str, model: Any, seen: Iterable[tuple[str, str]]) -> None:
    """Raise NvrError unless a model reads all that a data set has.

    Args:
        who: the model, as people name it.
        model: a sentence-transformers model.
        seen: (source, what a model sees of a query or passage), all of them.
    """
    counts = Counter((source, modality_of(text)) for source, text in seen if text.startswith(START))
    for (source, modality), number in sorted(counts.items(), key=str):
        if more_than_text(model) and model.supports(modality):
            continue
        parts = (modality,) if isinstance(modality, str) else modality
        kind = next(part for part in parts if part != "text")
        beside = " beside their texts" if "text" in parts else ""
        raise NvrError(
            f"{who} reads {_modalities(model)} only, but {number:,} texts of source {source} have {NAMES[kind]}{beside}: use a model "
            "that reads both, or leave that source out"
        )


def refuse_mixture(who: str, model: Any, seen: Iterable[str]) -> None:
    """Raise NvrError if texts that share batches are of several modalities, and a model takes one at a time."""
    if more_than_text(model) and not model.supports("message"):
        found = sorted({str(modality_of(text)) for text in seen})
        if len(found) > 1:
            raise NvrError(
                f"{who} reads {_modalities(model)}, but one of them at a time, and texts that share its batches are of several kinds "
                f"({', '.join(found)}): use a model with a chat template, or sources of one kind"
            )


def _modalities(model: Any) -> str:
    names = (m if isinstance(m, str) else "+".join(m) for m in getattr(model, "modalities", ["text"]))
    return ", ".join(name for name in names if name != "message")
