"""Exact top-k strictly below a ceiling per row, found while scanning the corpus once.

A cheap product gives every score to within a proven bound (`screening`). What may be among the k best below the ceiling
within that bound is scored again in float64 (`exact`), and float64 alone decides, so the result is that of a float64
brute force. Memory: a few tiles of scores and k results per row.

Two scans do this: `scan_cpu` (compiled loops) and `scan_torch` (tensor operations, for CUDA).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch  # noqa: TID253 - this package owns the search; nothing light imports it

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.arrays import Blocked, Floats, Ints, Vectors
from nvr_tasks.mining.corpus import Corpus
from nvr_tasks.mining.screening import Coding, Rounded, Screen, Trial, preferred
from nvr_tasks.mining.streaming import Staged, ahead

Progress = Callable[[int, int], None]  # scores done, scores in all

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiles:
    """How a search is cut up and computed. Never changes the result.

    Attributes:
        device: torch device of the products; auto: CUDA if there is one.
        block_rows: corpus rows read at a time.
        block_queries: queries of a tile.
        screen: type of the first pass; auto: bfloat16 where the device is fast at it.
        progress: told after every tile.
    """

    device: str = "auto"
    block_rows: int = 16384
    block_queries: int = 1024
    screen: Screen = "auto"
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Raises NvrError on sizes below 1."""
        if self.block_rows < 1 or self.block_queries < 1:
            raise NvrError(f"block_rows {self.block_rows} and block_queries {self.block_queries} must be at least 1")

    def pick_device(self) -> torch.device:
        """The device. Raises NvrError if there is no such one."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise NvrError(f"device {self.device!r} was asked for, but torch sees no CUDA device: use 'auto' or 'cpu'")
        return torch.device(self.device)


@dataclass(frozen=True)
class Request:
    """Rows to search for, sorted by query: the `depth` best passages strictly below each row's ceiling."""

    query: Ints  # [R]
    ceiling: Floats  # [R], +inf: none
    depth: Ints  # [R], at least 1, at most N
    floor: Floats | None = None  # [R], scores below it are left out; None: no floor

    @property
    def below(self) -> Floats:
        """What scores must exceed, [R]: the number before the floor."""
        return np.full(len(self.query), -np.inf) if self.floor is None else np.nextafter(self.floor, -np.inf)


@dataclass(frozen=True)
class Found:
    """What a search found per row of a request.

    Attributes:
        ids: corpus rows by falling score, ties by rising id, at most one per group; −1 behind the last, [R, k].
        scores: float64, −inf behind the last, [R, k].
        above: passages, neither blocked nor below the ceiling, [R].
    """

    ids: Ints
    scores: Floats
    above: Ints

    def take(self, index: Ints, depth: int) -> Found:
        """Some rows, the best `depth` of each."""
        return Found(self.ids[index, :depth], self.scores[index, :depth], self.above[index])


class Scan(Protocol):
    """A pass over the corpus, block by block."""

    @property
    def reads_ahead(self) -> bool:
        """Whether the next block is to be read and staged while one is absorbed."""

    def round(self, block: Vectors, start: int) -> Rounded:
        """The block of the corpus rows from `start` on, checked and rounded for the first pass."""

    def error(self, y: Rounded) -> torch.Tensor:
        """Largest error of the approximate scores of each query with a rounded block, float64 [Q]."""

    def stage(self, block: Vectors, /) -> Staged:
        """Begin to bring a block to where it is worked on; in the order in which blocks are absorbed, from any thread."""

    def absorb(self, start: int, block: Staged, told: Callable[[int], None], /) -> None:
        """Let every row take what it needs from the corpus rows from `start` on; tell how many scores are done."""

    def found(self) -> Found:
        """The result, once all blocks are absorbed."""

    def close(self) -> None:
        """Let go of threads, finished or not."""


def search(
    query_vectors: Vectors, corpus: Corpus, request: Request, blocked: Blocked, groups: Ints | None, tiles: Tiles
) -> Found:
    """Serve all rows in one pass over the corpus.

    Args:
        query_vectors: float32 [Q, D], finite.
        corpus: N vectors of D numbers; NaN and infinity are found on the way.
        request: what to find.
        blocked: pairs that are left out; they count nowhere.
        groups: int64 [N] or None. Of the passages of one group below the ceiling only the best (ties: the lowest row)
            is kept.
        tiles: how to cut the work up.

    Raises:
        NotFiniteError: a corpus vector has NaN or infinity in it.
        NvrError: norms so large that float32 products overflow, or a device that multiplies less precisely than it says.
    """
    device = tiles.pick_device()
    codings = preferred(tiles.screen, device, corpus.dim)
    total, done = len(query_vectors) * corpus.rows, 0

    def told(scores: int) -> None:
        nonlocal done
        done += scores
        if tiles.progress is not None:
            tiles.progress(done, total)

    with torch.inference_mode(), _full_float32():
        blocks = corpus.blocks(tiles.block_rows)
        first = next(blocks, None)
        if first is None:
            raise NvrError("corpus_vectors has no rows: there is nothing to mine from")
        scan = _open(device, codings, query_vectors, first[1], request, blocked, groups, tiles)

        def staged(numbered: tuple[int, Vectors]) -> tuple[int, Staged]:
            return numbered[0], scan.stage(numbered[1])

        every = itertools.chain([first], blocks)
        with contextlib.closing(scan), contextlib.closing(_in_turn(every, staged, scan.reads_ahead)) as coming:
            for start, block in coming:
                scan.absorb(start, block, told)
            return scan.found()


def _in_turn(
    items: Iterable[tuple[int, Vectors]],
    prepare: Callable[[tuple[int, Vectors]], tuple[int, Staged]],
    reads_ahead: bool,
) -> Generator[tuple[int, Staged]]:
    if reads_ahead:
        yield from ahead(items, prepare)
    else:
        yield from map(prepare, items)


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 and no bfloat16 inside a float32 product, whatever the process has chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _open(
    device: torch.device,
    codings: dict[Coding, float],
    query_vectors: Vectors,
    first_block: Vectors,
    request: Request,
    blocked: Blocked,
    groups: Ints | None,
    tiles: Tiles,
) -> Scan:
    """The scan for a device, in the first of some codings that is fine enough for these vectors.

    The mean of the first block is near enough that of the corpus to centre on.
    """
    centre = first_block.mean(axis=0, dtype=np.float64)
    trial = _trial(query_vectors, first_block, request)
    for coding, rate in codings.items():
        given = (query_vectors, centre, request, blocked, groups, coding, tiles.block_queries)
        scan: Scan
        if device.type == "cpu":
            from nvr_tasks.mining.scan_cpu import CpuScan

            scan = CpuScan(*given)
        else:
            from nvr_tasks.mining.scan_shards import ShardedScan
            from nvr_tasks.mining.scan_torch import TorchScan

            devices = _devices(device)
            scans = [TorchScan(*given, d) for d in devices]
            scan = scans[0] if len(scans) == 1 else ShardedScan(scans, groups)
        last = coding is list(codings)[-1]
        if last or trial.pays(coding, scan.error(scan.round(first_block, 0)), rate):
            where = f"{device}" if device.type == "cpu" else ", ".join(map(str, _devices(device)))
            log.info("searching on %s, screening in %s", where, coding.name)
            break
        log.info("%s is too coarse for these vectors", coding.name)
    return scan


def _devices(device: torch.device) -> list[torch.device]:
    """One device, or all of a kind where none is named by number: each takes a share of the corpus."""
    if device.type != "cuda" or device.index is not None:
        return [device]
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def _trial(query_vectors: Vectors, block: Vectors, request: Request) -> Trial:
    """Scores of some rows with some of a block."""
    some: Ints = np.unique(np.linspace(0, max(0, len(request.query) - 1), 256).astype(np.int64))[: len(request.query)]
    query = request.query[some]
    with np.errstate(all="ignore"):  # numbers that are not finite are told of where all are looked at
        scores = query_vectors[query] @ block[:: max(1, len(block) // 1024)].T
    return Trial(scores, request.ceiling[some], query)
