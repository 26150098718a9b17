"""Vectors as mining reads them: checked, float32, block by block.

Shapes: N corpus rows, Q queries, D dimensions, b rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch  # noqa: TID253 - this package owns the search; nothing light imports it

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.arrays import Ints, Vectors

UNIT_TOLERANCE = 1e-2  # float16 vectors of length 1 are off by less


class Corpus(Protocol):
    """N vectors of D numbers, read in blocks."""

    rows: int
    dim: int

    def blocks(self, block_rows: int) -> Iterator[tuple[int, Vectors]]:
        """(first row, float32 [b, D]) with b ≤ block_rows, in order."""

    def take(self, rows: Ints) -> Vectors:
        """Some vectors, float32 [len(rows), D]; `rows` sorted, each once."""


class ArrayCorpus:
    """Vectors in an array or memory map; only a block of them is in memory."""

    def __init__(self, vectors: npt.NDArray[Any]) -> None:
        self.vectors = vectors
        self.rows, self.dim = (int(n) for n in vectors.shape)

    def blocks(self, block_rows: int) -> Iterator[tuple[int, Vectors]]:
        """See Corpus."""
        for start in range(0, self.rows, block_rows):
            yield start, _float32(self.vectors[start : start + block_rows])

    def take(self, rows: Ints) -> Vectors:
        """See Corpus."""
        return _float32(self.vectors[rows])


class BlockCorpus:
    """Vectors that come as an iterable of [b, D] blocks: read once to count, once to take, once per search."""

    def __init__(self, source: Iterable[Any]) -> None:
        if iter(source) is source:
            raise NvrError(
                "corpus_vectors is an iterator that can be read only once, and mining reads it several times: give an "
                "array, a memory map, a list of blocks, or an object whose __iter__ starts again"
            )
        self.source = source
        shapes = [block.shape for block in self._checked()]
        if not shapes:
            raise NvrError("corpus_vectors has no blocks: there is nothing to mine from")
        self.rows = sum(int(shape[0]) for shape in shapes)
        self.dim = int(shapes[0][1])

    def _checked(self) -> Iterator[npt.NDArray[Any]]:
        dim = None
        for number, block in enumerate(self.source):
            array = as_matrix(block, f"block {number} of corpus_vectors")
            if dim is not None and array.shape[1] != dim:
                raise NvrError(
                    f"block {number} of corpus_vectors has {array.shape[1]} dimensions, block 0 has {dim}: one teacher only"
                )
            dim = int(array.shape[1])
            yield array

    def blocks(self, block_rows: int) -> Iterator[tuple[int, Vectors]]:
        """See Corpus."""
        first = 0
        for block in self._checked():
            for start in range(0, len(block), block_rows):
                yield first + start, _float32(block[start : start + block_rows])
            first += len(block)
        if first != self.rows:
            raise NvrError(
                f"corpus_vectors gave {self.rows:,} rows at first and {first:,} later: give the same blocks each time"
            )

    def take(self, rows: Ints) -> Vectors:
        """See Corpus."""
        taken, first = np.empty((len(rows), self.dim), dtype=np.float32), 0
        for block in self._checked():
            low, high = np.searchsorted(rows, [first, first + len(block)])
            taken[low:high] = _float32(block[rows[low:high] - first])
            first += len(block)
        return taken


class UnitCorpus:
    """A corpus whose vectors must have length 1: one that has not is refused as it is read."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.rows, self.dim = corpus, corpus.rows, corpus.dim

    def blocks(self, block_rows: int) -> Iterator[tuple[int, Vectors]]:
        """See Corpus."""
        for start, block in self.corpus.blocks(block_rows):
            check_unit(block, "corpus_vectors", start)
            yield start, block

    def take(self, rows: Ints) -> Vectors:
        """See Corpus."""
        return self.corpus.take(rows)


def open_corpus(vectors: Any) -> Corpus:
    """An array, memory map, tensor or iterable of blocks as a Corpus. Raises NvrError on wrong shapes."""
    if isinstance(vectors, np.ndarray | torch.Tensor):
        return ArrayCorpus(as_matrix(vectors, "corpus_vectors"))
    if isinstance(vectors, Iterable):
        return BlockCorpus(vectors)
    raise NvrError(f"corpus_vectors is {type(vectors).__name__}: give an array [N, D] or an iterable of blocks [b, D]")


def as_matrix(vectors: Any, name: str) -> npt.NDArray[Any]:
    """A [n, D] array of real floats with n, D ≥ 1 (not copied). Raises NvrError otherwise."""
    if isinstance(vectors, torch.Tensor):
        tensor = vectors.detach().cpu()
        vectors = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    array = vectors if isinstance(vectors, np.ndarray) else np.asarray(vectors)
    if array.ndim != 2:
        raise NvrError(f"{name} has shape {array.shape}: expected two dimensions, (rows, vector size)")
    if array.dtype.kind != "f":
        raise NvrError(f"{name} has type {array.dtype}: expected float32 or float16 vectors")
    if 0 in array.shape:
        raise NvrError(f"{name} is empty, shape {array.shape}: give at least one row and one dimension")
    return array


def take_finite(corpus: Corpus, rows: Ints) -> Vectors:
    """Some vectors of a corpus, as `Corpus.take`. Raises NotFiniteError, naming the row, if a number is NaN or infinite."""
    vectors = corpus.take(rows)
    for at in np.flatnonzero(~np.isfinite(vectors).all(axis=1))[:1]:
        raise NotFiniteError("corpus_vectors", int(rows[at]))
    return vectors


def check_finite(vectors: Vectors, name: str, first: int = 0) -> None:
    """Raise NvrError, naming the row, if a number is NaN or infinite."""
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise NotFiniteError(name, first + row)


def check_unit(vectors: Vectors, name: str, first: int = 0) -> None:
    """Raise NvrError, naming the row, if a vector is not of length 1."""
    check_finite(vectors, name, first)
    lengths = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(np.abs(lengths - 1) > UNIT_TOLERANCE)
    if len(wrong):
        raise NvrError(
            f"similarity is cosine, but {name} row {first + int(wrong[0])} has length {lengths[wrong[0]]:.4g}: divide every "
            "vector by its length, or pass similarity='dot' if dot products are meant"
        )


class NotFiniteError(NvrError):
    """A vector has NaN or infinity in it."""

    def __init__(self, name: str, row: int) -> None:
        super().__init__(f"{name} row {row} has NaN or infinite numbers: embed that text again")
        self.name, self.row = name, row


def _float32(block: npt.NDArray[Any]) -> Vectors:
    """A writable, contiguous float32 copy; float16 is exact, float64 is rounded."""
    return np.array(block, dtype=np.float32, order="C")
