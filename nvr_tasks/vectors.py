"""The `embeddings` artefact: which vector belongs to which text.

embeddings/<fp>/  vectors.npy  float32 [n, D]
                  keys.npy     uint8 [n, 16], sorted: digest of (prompt, longest input, text) per row

A key says everything beside the model that a vector depends on, so vectors of one teacher can serve any data set.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nvr_tasks.artifacts import reading
from nvr_tasks.errors import NvrError

KEY_BYTES = 16
UNIT_TOLERANCE = 1e-3  # by which the length of a stored vector may differ from 1
Keys = npt.NDArray[np.uint8]  # [n, 16]
Vectors = npt.NDArray[np.float32]  # [n, D]


def text_keys(texts: Sequence[str], prompt: str | Sequence[str], max_tokens: int) -> Keys:
    """Keys of texts under a prompt (or one each) and a longest input in tokens, shape [n, 16]."""
    prompts = itertools.repeat(prompt, len(texts)) if isinstance(prompt, str) else prompt
    joined = b"".join(
        hashlib.blake2b(f"{max_tokens}\0{before}\0{text}".encode(), digest_size=KEY_BYTES).digest()
        for before, text in zip(prompts, texts, strict=True)
    )
    return np.frombuffer(joined, dtype=np.uint8).reshape(len(texts), KEY_BYTES)


def find_rows(sorted_keys: Keys, keys: Keys) -> npt.NDArray[np.int64]:
    """Row in `sorted_keys` of each key, −1 where it is absent. Shapes [n, 16], [m, 16] → [m]."""
    if len(sorted_keys) == 0:
        return np.full(len(keys), -1, dtype=np.int64)
    have, want = _scalars(sorted_keys), _scalars(keys)
    rows = np.searchsorted(have, want)
    rows[rows == len(have)] = 0
    return np.where(have[rows] == want, rows, -1).astype(np.int64)


def sort_order(keys: Keys) -> npt.NDArray[np.int64]:
    """The order that sorts keys by their bytes."""
    return np.argsort(_scalars(keys), kind="stable").astype(np.int64)


def _scalars(keys: Keys) -> npt.NDArray[np.bytes_]:
    """Keys as one byte string each, shape [n]; numpy compares these whole (and pads both sides alike)."""
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").reshape(-1)


def allocate(path: Path, shape: tuple[int, int]) -> np.memmap[Any, np.dtype[np.float32]]:
    """A new .npy file, memory-mapped, with all its space on disk.

    Without it, a full disk would end the process with SIGBUS when a page is first written.

    Raises:
        OSError: the disk has no space for it.
    """
    array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    with path.open("r+b") as file:
        try:
            _occupy(file, array.offset, path.stat().st_size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
    return array


def _occupy(file: BinaryIO, start: int, end: int) -> None:
    """Give a file, which may be sparse from `start` on, all its space on disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, end)
        return
    zeros = bytes(1 << 20)  # macOS: zeros are written, which takes the space as well
    file.seek(start)
    for at in range(start, end, len(zeros)):
        file.write(zeros[: end - at])
    file.flush()


def load_keys(folder: Path) -> Keys:
    """Keys of an `embeddings` artefact, [n, 16]."""
    with reading(folder / "keys.npy"):
        keys: Keys = np.load(folder / "keys.npy", allow_pickle=False)
        return keys


def load_vectors(folder: Path) -> Vectors:
    """Vectors of an `embeddings` artefact, memory-mapped, [n, D]."""
    with reading(folder / "vectors.npy"):
        vectors: Vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
        return vectors


def gather(folders: Sequence[Path], keys: Keys, out: Path | None = None) -> Vectors:
    """Vectors of the given keys, in their order, from the shards of one teacher. Shape [m, D].

    Args:
        folders: local folders of `embeddings` artefacts.
        keys: [m, 16].
        out: write into this .npy file and return it memory-mapped, for more vectors than memory holds.

    Raises:
        NvrError: a key is in no shard, two shards disagree on D, or a vector is finite but no unit vector.
    """
    shards = [(load_keys(f), load_vectors(f)) for f in folders]
    dims = {int(v.shape[1]) for _, v in shards if len(v)}
    if len(dims) > 1:
        raise NvrError(f"shards of one teacher have different dimensions {sorted(dims)}: embed again with one teacher")
    dim = dims.pop() if dims else 0
    shape = (len(keys), dim)
    vectors: Vectors = np.empty(shape, np.float32) if out is None else allocate(out, shape)
    left = len(keys)
    for folder, (shard_keys, shard_vectors) in zip(folders, shards, strict=True):
        rows = find_rows(shard_keys, keys)
        hit = np.flatnonzero(rows >= 0)
        for start in range(0, len(hit), 65536):
            part = hit[start : start + 65536]
            vectors[part] = shard_vectors[rows[part]]
            _refuse_other_lengths(vectors[part], folder)
        left -= len(hit)
    if left > 0:
        raise NvrError(
            f"{left:,} of {len(keys):,} texts have no vector in {len(folders)} embedding shards: run `nvr embed` for all shards"
        )
    return vectors


def _refuse_other_lengths(vectors: Vectors, folder: Path) -> None:
    """Raise NvrError on a vector whose length is not 1, as `embed` wrote them; a search names what is not finite."""
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    wrong = np.flatnonzero(np.isfinite(norms) & (np.abs(norms - 1) > UNIT_TOLERANCE))
    if len(wrong):
        raise NvrError(
            f"the embeddings in {folder} are damaged ({len(wrong):,} vectors are no unit vectors, one has length "
            f"{norms[wrong[0]]:.3g}): delete that folder and run `nvr embed` again"
        )
