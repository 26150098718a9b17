"""Several devices, each with its share of the corpus: blocks go round, results are merged.

Every device holds all queries and the best of its own blocks. Of the k best of the whole corpus (one per group) each is
among the k best of the blocks that its device saw, so the merge of the devices' lists is the list of a single scan, ties by
id included.

Shapes: R rows (a query with a ceiling), k depth, G devices.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch  # noqa: TID253 - this package owns the search; nothing light imports it

from nvr_tasks.mining.arrays import Ints, Vectors
from nvr_tasks.mining.scan_torch import TorchScan, one_per_group
from nvr_tasks.mining.screening import Rounded
from nvr_tasks.mining.search import Found
from nvr_tasks.mining.streaming import Staged


class ShardedScan:
    """A pass over the corpus on several devices; see `search.Scan`."""

    reads_ahead = True

    def __init__(self, scans: Sequence[TorchScan], groups: Ints | None) -> None:
        self.scans, self.groups = scans, groups
        self.pools = [ThreadPoolExecutor(1) for _ in scans]
        self.running: list[Future[None] | None] = [None] * len(scans)
        self.staged = self.absorbed = 0
        self.telling = threading.Lock()

    def round(self, block: Vectors, start: int) -> Rounded:
        """See `search.Scan`."""
        return self.scans[0].round(block, start)

    def error(self, y: Rounded) -> torch.Tensor:
        """See `search.Scan`."""
        return self.scans[0].error(y)

    def stage(self, block: Vectors) -> Staged:
        """See `search.Scan`; blocks are absorbed in the order in which they are staged, so both go round alike."""
        scan = self.scans[self.staged % len(self.scans)]
        self.staged += 1
        return scan.stage(block)

    def absorb(self, start: int, block: Staged, told: Callable[[int], None]) -> None:
        """See `search.Scan`; returns when the device's block before this one is done."""
        at = self.absorbed % len(self.scans)
        self.absorbed += 1
        before = self.running[at]
        if before is not None:
            before.result()

        def tell(scores: int) -> None:
            with self.telling:
                told(scores)

        @torch.inference_mode()  # is a thread's own
        def work() -> None:
            self.scans[at].absorb(start, block, tell)

        self.running[at] = self.pools[at].submit(work)

    def found(self) -> Found:
        """See `search.Scan`."""
        for future in self.running:
            if future is not None:
                future.result()
        return merged([scan.found() for scan in self.scans], self.groups)

    def close(self) -> None:
        """See `search.Scan`."""
        for pool in self.pools:
            pool.shutdown(wait=True, cancel_futures=True)


def merged(parts: Sequence[Found], groups: Ints | None) -> Found:
    """What one scan would have found in the blocks of all."""
    depth = parts[0].ids.shape[1]
    ids = np.concatenate([p.ids for p in parts], axis=1)
    scores = np.concatenate([p.scores for p in parts], axis=1)
    order = np.lexsort((np.where(ids >= 0, ids, np.iinfo(np.int64).max), -scores), axis=1)
    ids, scores = np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
    if groups is not None:
        one, best = one_per_group(torch.from_numpy(ids), torch.from_numpy(scores), torch.from_numpy(groups))
        ids, scores = one.numpy(), best.numpy()
    above: Ints = np.sum([p.above for p in parts], axis=0, dtype=np.int64)
    return Found(ids[:, :depth], scores[:, :depth], above)
