"""The scan as tensor operations, for CUDA (and, as a second opinion, for any device of torch).

Shapes: Q queries, N corpus rows, C rows of a corpus block, R rows (a query with a ceiling), k depth, S survivors.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch  # noqa: TID253 - this package owns the search; nothing light imports it

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.arrays import Blocked, Floats, Ints, Vectors
from nvr_tasks.mining.exact import pair_scores
from nvr_tasks.mining.screening import Coding, Rounded, check_block, score_error
from nvr_tasks.mining.search import Found, Request
from nvr_tasks.mining.streaming import Staged, Uploader

SURVIVORS_AT_A_TIME = 1 << 22
LARGEST_CHUNK = 64  # columns whose maximum stands for them when a first bound is looked for


class TorchScan:
    """A pass over the corpus; see `search.Scan`."""

    reads_ahead = True

    def __init__(
        self,
        query_vectors: Vectors,
        centre: Floats,
        request: Request,
        blocked: Blocked,
        groups: Ints | None,
        coding: Coding,
        block_queries: int,
        device: torch.device,
    ) -> None:
        self.device, self.coding, self.block_queries = device, coding, block_queries
        self.stage = Uploader(device)
        self.x = torch.from_numpy(query_vectors).to(device)
        self.rounded = _rounded(self.x, None, coding)
        self.centre = torch.from_numpy(centre).to(device)
        self.offset = self.x.double() @ self.centre
        self.blocked = blocked
        self.groups = groups
        self.groups_on_device = None if groups is None else torch.from_numpy(groups).to(device)
        self.first_of = request.query  # on the host, for slicing by query
        self.query = torch.from_numpy(request.query).to(device)
        self.ceiling = torch.from_numpy(request.ceiling).to(device)
        self.below = torch.from_numpy(request.below).to(device)
        self.bounded = bool(np.isfinite(request.ceiling).any())
        self.depth = int(request.depth.max(initial=1))  # of all rows: a few more than asked for do no harm
        shape = (len(request.query), self.depth)
        self.ids = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.scores = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        self.above = torch.zeros(len(request.query), dtype=torch.int64, device=device)

    def found(self) -> Found:
        """See `search.Scan`."""
        return Found(self.ids.cpu().numpy(), self.scores.cpu().numpy(), self.above.cpu().numpy())

    def close(self) -> None:
        """See `search.Scan`."""

    def absorb(self, start: int, block: Staged, told: Callable[[int], None]) -> None:
        """See `search.Scan`."""
        self._load(start, block.on_device())
        for first in range(0, len(self.x), self.block_queries):
            last = min(first + self.block_queries, len(self.x))
            self._tile(first, last)
            told((last - first) * len(self.y))

    def round(self, block: Vectors, start: int) -> Rounded:
        """A corpus block, centred and rounded. Raises as of `search`."""
        return self._round(torch.from_numpy(block).to(self.device), start)

    def _round(self, block: torch.Tensor, start: int) -> Rounded:
        y = _rounded(block, self.centre, self.coding)
        check_block(self.rounded, y, start)
        return y

    def error(self, y: Rounded) -> torch.Tensor:
        """Largest error of the approximate scores of each query with a block, float64 [Q]."""
        return score_error(self.rounded, y, float(torch.linalg.vector_norm(self.centre)))

    def _load(self, start: int, block: torch.Tensor) -> None:
        """Make a corpus block the current one."""
        self.start = start
        self.y = block
        self.rounded_y = self._round(block, start)
        self.error_Q = self.error(self.rounded_y)
        low, high = np.searchsorted(self.blocked.row, [start, start + len(block)])
        by_query = np.argsort(self.blocked.query[low:high], kind="stable")
        self.blocked_query = self.blocked.query[low:high][by_query]
        self.blocked_column = self.blocked.row[low:high][by_query] - start
        self.repeated = None  # columns whose group has an earlier one in this block
        if self.groups is not None:
            _, first = np.unique(self.groups[start : start + len(block)], return_index=True)
            if len(first) < len(block):
                repeated = np.ones(len(block), dtype=bool)
                repeated[first] = False
                self.repeated = torch.from_numpy(np.flatnonzero(repeated)).to(self.device)

    def _tile(self, first: int, last: int) -> None:
        """Score queries first to last against the current block and let every row take what it needs."""
        scores_QC = _products(self.rounded.vectors[first:last], self.rounded_y.vectors)
        low, high = np.searchsorted(self.blocked_query, [first, last])
        query = torch.from_numpy(self.blocked_query[low:high] - first).to(self.device)
        column = torch.from_numpy(self.blocked_column[low:high]).to(self.device)
        scores_QC[query, column] = -torch.inf
        begin, end = (int(i) for i in np.searchsorted(self.first_of, [first, last]))
        for part in range(begin, end, self.block_queries):
            chosen = slice(part, min(part + self.block_queries, end))
            index = self.query[chosen] - first
            # Most often every query is one row, and its scores need not be copied.
            same = len(index) == len(scores_QC) and bool((index == torch.arange(len(index), device=self.device)).all())
            self._absorb(chosen, scores_QC if same else scores_QC[index])

    def _absorb(self, chosen: slice, scores_RC: torch.Tensor) -> None:
        """Merge one tile into the running best of the `chosen` rows; scores of blocked pairs are −inf."""
        query_R = self.query[chosen]
        ceiling_R, error_R, offset_R = self.ceiling[chosen], self.error_Q[query_R], self.offset[query_R]
        kth_R = torch.maximum(self.scores[chosen, -1], self.below[chosen])  # a score must beat it
        bound_R = torch.maximum(
            kth_R - offset_R - error_R, self._first_bound(kth_R, ceiling_R - offset_R, error_R, scores_RC)
        )
        wanted_RC = scores_RC >= _down(bound_R).clamp(min=torch.finfo(torch.float32).min)[:, None]
        if self.bounded:
            over_R = _up(ceiling_R - offset_R + error_R)
            some = (scores_RC.amax(dim=1) >= over_R).nonzero(as_tuple=True)[0]  # few rows, as a rule
            over_SC = scores_RC[some] >= over_R[some, None]
            self.above[chosen] = self.above[chosen].index_add(0, some, over_SC.sum(dim=1))
            wanted_RC[some] &= ~over_SC
        # A tile in which nothing can be ruled out (say, equal scores everywhere) is worked off in slices of self.
        step = max(1, SURVIVORS_AT_A_TIME // wanted_RC.shape[1])
        if int(wanted_RC.count_nonzero()) <= SURVIVORS_AT_A_TIME:
            step = len(wanted_RC)
        for begin in range(0, len(wanted_RC), step):
            row_S, column_S = wanted_RC[begin : begin + step].nonzero(as_tuple=True)
            row_S = row_S + begin
            exact_S = pair_scores(self.x, self.y, query_R[row_S], column_S)
            if bool(((scores_RC[row_S, column_S] + offset_R[row_S] - exact_S).abs() > error_R[row_S]).any()):
                raise NvrError(
                    f"{self.coding.name} products on {self.device} are less precise than they must be: mine with device='cpu'"
                )
            below_S = exact_S < ceiling_R[row_S]
            self.above[chosen] += torch.bincount(row_S[~below_S], minlength=len(ceiling_R))
            # A score equal to the k-th loses to it: its row is higher, since blocks come in order.
            keep_S = below_S & (exact_S > kth_R[row_S])
            self._merge(chosen.start, row_S[keep_S], column_S[keep_S] + self.start, exact_S[keep_S])

    def _first_bound(
        self, kth_R: torch.Tensor, ceiling_R: torch.Tensor, error_R: torch.Tensor, scores_RC: torch.Tensor
    ) -> torch.Tensor:
        """A lower bound of the k-th best below the ceiling from this tile alone, for rows that have none yet, float64 [R].

        The maxima of disjoint chunks of columns are scores of different passages (and, with one column per group, of
        different groups), so the k-th best of them is a bound; 2ε make it one for float32 scores of any passage.
        """
        bound_R = torch.full_like(kth_R, -torch.inf)
        open_rows = torch.isneginf(kth_R).nonzero(as_tuple=True)[0]
        columns, depth = scores_RC.shape[1], self.depth
        if not len(open_rows) or columns < depth:
            return bound_R
        tile = scores_RC if len(open_rows) == len(kth_R) else scores_RC[open_rows]
        surely_below = tile < _down(ceiling_R[open_rows] - error_R[open_rows])[:, None]
        tile = torch.where(surely_below, tile, -torch.inf)
        if self.repeated is not None:
            tile[:, self.repeated] = -torch.inf
        width = max(1, min(LARGEST_CHUNK, columns // (2 * depth)))
        chunks = columns // width
        maxima = tile[:, : chunks * width].reshape(len(tile), width, chunks).amax(dim=1)
        kth = maxima.topk(depth, dim=1).values[:, -1].double()
        bound_R[open_rows] = kth - 2 * error_R[open_rows]
        return bound_R

    def _merge(self, offset: int, row_S: torch.Tensor, id_S: torch.Tensor, score_S: torch.Tensor) -> None:
        """Put new passages among the running best; S is sorted by row, then by id, ids above all known ones."""
        if not len(row_S):
            return
        touched, count = torch.unique_consecutive(row_S, return_counts=True)
        slot = torch.repeat_interleave(torch.arange(len(touched), device=self.device), count)
        place = torch.arange(len(row_S), device=self.device) - torch.repeat_interleave(count.cumsum(0) - count, count)
        shape = (len(touched), int(count.max()))
        new_scores = torch.full(shape, -torch.inf, dtype=torch.float64, device=self.device)
        new_ids = torch.full(shape, -1, dtype=torch.int64, device=self.device)
        new_scores[slot, place] = score_S
        new_ids[slot, place] = id_S
        into = touched + offset
        # Known ones first and new ones by id: a stable sort then breaks ties by the lowest id.
        ids, scores = _by_score(torch.cat([self.ids[into], new_ids], 1), torch.cat([self.scores[into], new_scores], 1))
        if self.groups_on_device is not None:
            ids, scores = one_per_group(ids, scores, self.groups_on_device)
        self.ids[into], self.scores[into] = ids[:, : self.depth], scores[:, : self.depth]


def _by_score(ids: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores, order = torch.sort(scores, dim=1, descending=True, stable=True)
    return ids.gather(1, order), scores


def one_per_group(ids: torch.Tensor, scores: torch.Tensor, groups_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop all but the first of every group from rows sorted by rank."""
    label, order = torch.sort(
        groups_N[ids.clamp(min=0)].masked_fill(ids < 0, torch.iinfo(torch.int64).max), dim=1, stable=True
    )
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = label[:, 1:] == label[:, :-1]
    drop = torch.zeros_like(again).scatter(1, order, again)
    if not bool((drop & (ids >= 0)).any()):
        return ids, scores
    return _by_score(ids.masked_fill(drop, -1), scores.masked_fill(drop, -torch.inf))


def _rounded(vectors: torch.Tensor, centre: torch.Tensor | None, coding: Coding) -> Rounded:
    """Vectors less a centre, rounded."""
    exact = vectors.double() if centre is None else vectors.double() - centre
    rounded = exact.to(coding.vectors)

    def norm(v: torch.Tensor) -> torch.Tensor:
        length: torch.Tensor = torch.linalg.vector_norm(v.double(), dim=1)
        return length

    unit = torch.ones(len(vectors), dtype=torch.float64, device=vectors.device)
    return Rounded(rounded, unit, norm(vectors), norm(rounded), norm(exact - rounded.double()))


def _products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """All dot products as float32, [Q, C]."""
    if x.dtype == torch.float32:
        return x @ y.T
    if x.device.type == "cuda":
        return torch.mm(x, y.T, out_dtype=torch.float32)
    return x.float() @ y.float().T


def _down(values: torch.Tensor) -> torch.Tensor:
    """A float32 number at most the given float64 one."""
    return torch.nextafter(values.float(), torch.tensor(-torch.inf, device=values.device))


def _up(values: torch.Tensor) -> torch.Tensor:
    """A float32 number at least the given float64 one."""
    return torch.nextafter(values.float(), torch.tensor(torch.inf, device=values.device))
