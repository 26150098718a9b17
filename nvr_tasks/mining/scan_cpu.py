"""The scan on a CPU: every thread multiplies its own tiles and picks from them while they are in its cache.

Shapes: Q queries, C columns (corpus rows of a block), D dimensions, R rows (a query with a ceiling), k depth.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch  # noqa: TID253 - this package owns the search; nothing light imports it

from nvr_tasks.errors import NvrError
from nvr_tasks.mining import kernels
from nvr_tasks.mining.arrays import Blocked, Floats, Ints, Vectors
from nvr_tasks.mining.screening import (
    BFLOAT16,
    INT8,
    SMALLEST_INT8_DIM,
    Coding,
    Rounded,
    check_block,
    multiply,
    score_error,
    single_error,
)
from nvr_tasks.mining.search import Found, Request
from nvr_tasks.mining.streaming import Staged

TILE_COLUMNS = 4096


class CpuScan:
    """A pass over the corpus; see `search.Scan`."""

    reads_ahead = False  # every core is at work already
    stage = staticmethod(Staged)

    def __init__(
        self,
        query_vectors: Vectors,
        centre: Floats,
        request: Request,
        blocked: Blocked,
        groups: Ints | None,
        coding: Coding,
        block_queries: int,
    ) -> None:
        self.x = query_vectors
        self.rounded = rounded(query_vectors, np.zeros_like(centre), coding)
        self.centre = centre
        self.offset = query_vectors @ centre
        self.blocked = blocked
        self.coding = coding
        self.code, self.bits = {
            BFLOAT16.name: (kernels.BFLOAT16, torch.int16),
            INT8.name: (kernels.INTEGER, torch.int32),
        }.get(coding.name, (kernels.FLOAT32, torch.int32))
        self.block_queries = block_queries
        self.row_start = np.searchsorted(request.query, np.arange(len(query_vectors) + 1))
        shape = (len(request.query), int(request.depth.max(initial=1)))
        self.best = kernels.Best(
            ceiling=request.ceiling,
            below=request.below,
            depth=request.depth,
            groups=np.empty(0, np.int64) if groups is None else groups,
            ids=np.full(shape, -1, np.int64),
            scores=np.full(shape, -np.inf),
            above=np.zeros(shape[0], np.int64),
        )
        self.tile_of = threading.local()

    def close(self) -> None:
        """See `search.Scan`."""

    def absorb(self, start: int, staged: Staged, told: Callable[[int], None]) -> None:
        """See `search.Scan`."""
        block = staged.host
        y = self.round(block, start)
        error = self.error(y).numpy()
        fine = single_error(self.rounded, y).numpy()
        unit = (self.rounded.unit * y.unit[0]).numpy()
        low, high = np.searchsorted(self.blocked.row, [start, start + len(block)])
        order = np.lexsort((self.blocked.row[low:high], self.blocked.query[low:high]))
        blocked_query = self.blocked.query[low:high][order]
        blocked_column = self.blocked.row[low:high][order] - start

        def work(first: int) -> int:
            last = min(first + self.block_queries, len(self.x))
            for begin in range(0, len(block), TILE_COLUMNS):
                end = min(begin + TILE_COLUMNS, len(block))
                tile = self._tile(last - first, end - begin)
                multiply(self.rounded.vectors[first:last], y.vectors[begin:end], tile)
                here = (blocked_column >= begin) & (blocked_column < end)
                blocked_start = np.searchsorted(blocked_query[here], np.arange(first, last + 1))
                scored = kernels.Tile(
                    tile.view(self.bits).numpy(),
                    self.code,
                    unit[first:last],
                    self.x[first:last],
                    block[begin:end],
                    start + begin,
                    self.offset[first:last],
                    error[first:last],
                    self.coding.relative,
                    fine[first:last],
                    blocked_start,
                    blocked_column[here] - begin,
                    self.row_start[first : last + 1],
                )
                if not kernels.absorb(scored, self.best):
                    raise NvrError(
                        f"{self.coding.name} products on this CPU are less precise than they must be: mine with screen='float32', "
                        "and report this with the processor's name"
                    )
            return (last - first) * len(block)

        for done in _parallel(work, range(0, len(self.x), self.block_queries)):
            told(done)

    def round(self, block: Vectors, start: int) -> Rounded:
        """A corpus block, centred and rounded. Raises as of `search`."""
        y = rounded(block, self.centre, self.coding, same_unit=True)
        check_block(self.rounded, y, start)
        return y

    def error(self, y: Rounded) -> torch.Tensor:
        """Largest error of the approximate scores of each query with a block, float64 [Q]."""
        return score_error(self.rounded, y, float(np.linalg.norm(self.centre)))

    def _tile(self, rows: int, columns: int) -> torch.Tensor:
        """This thread's tile, [rows, columns]: the same memory each time."""
        memory = getattr(self.tile_of, "memory", None)
        if memory is None or len(memory) < rows * columns:
            memory = self.tile_of.memory = torch.empty(rows * columns, dtype=self.coding.products)
        return memory[: rows * columns].view(rows, columns)

    def found(self) -> Found:
        """See `search.Scan`."""
        return Found(self.best.ids, self.best.scores, self.best.above)


def rounded(vectors: Vectors, centre: Floats, coding: Coding, *, same_unit: bool = False) -> Rounded:
    """Vectors less a centre, rounded; `same_unit`: all to multiples of the same, so that their scores compare."""
    unit, full, norm, lost = np.ones(len(vectors)), *(np.empty(len(vectors)) for _ in range(3))
    width = max(vectors.shape[1], SMALLEST_INT8_DIM if coding is INT8 else 0)
    bits = np.zeros((len(vectors), width), {BFLOAT16.name: np.int16, INT8.name: np.int8}.get(coding.name, np.int32))
    if coding is INT8:
        kernels.largest(vectors, centre, unit)
        unit[:] = np.maximum((unit.max() if same_unit else unit) / 127.0, np.finfo(np.float32).tiny)
        kernels.round_integers(vectors, centre, unit, bits, full, norm, lost)
    else:
        kernels.round_floats(vectors, centre, bits, full, norm, lost)
    to = torch.from_numpy
    return Rounded(to(bits).view(coding.vectors), to(unit), to(full), to(norm), to(lost))


def _parallel(work: Callable[[int], int], items: range) -> Iterator[int]:
    """`work` over items, on as many threads as torch may use, each item on one thread."""
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1:
        yield from map(work, items)
        return
    with _single_threaded_products(), ThreadPoolExecutor(threads, initializer=_one_thread) as pool:
        yield from pool.map(work, items)


def _one_thread() -> None:
    torch.set_num_threads(1)


@contextmanager
def _single_threaded_products() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
