"""Exact top-k strictly below a ceiling per row, found while scanning the corpus once.

A float32 matrix product gives every score to within a proven bound ε. What may be among the k best below the ceiling
within ε is scored again in float64 (`exact.pair_scores`), and float64 alone decides, so the result is that of a float64
brute force. Memory: one tile of scores and k results per row.

Shapes: Q queries, N corpus rows, C rows of a corpus block, R rows (a query with a ceiling), k depth, S survivors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch  # noqa: TID253 - this package owns the search; nothing light imports it

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.arrays import Blocked, Floats, Ints, Vectors
from nvr_tasks.mining.corpus import Corpus, NotFiniteError
from nvr_tasks.mining.exact import float32_error, pair_scores, underflow_error

Progress = Callable[[int, int], None]  # scores done, scores in all

SURVIVORS_AT_A_TIME = 1 << 22
LARGEST_CHUNK = 64  # columns whose maximum stands for them when a first bound is looked for


@dataclass(frozen=True)
class Request:
    """Rows to search for, sorted by query: the `depth` best passages strictly below each row's ceiling."""

    query: Ints  # [R]
    ceiling: Floats  # [R], +inf: none
    depth: int


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


def search(
    query_vectors: Vectors,
    corpus: Corpus,
    requests: Sequence[Request],
    blocked: Blocked,
    groups: Ints | None,
    *,
    device: str,
    block_rows: int,
    block_queries: int,
    progress: Progress | None = None,
) -> list[Found]:
    """Serve all requests in one pass over the corpus.

    Args:
        query_vectors: float32 [Q, D], finite.
        corpus: N vectors of D numbers; NaN and infinity are found on the way.
        requests: what to find.
        blocked: pairs that are left out; they count nowhere.
        groups: int64 [N] or None. Of the passages of one group below the ceiling only the best (ties: the lowest row)
            is kept.
        device: torch device of the products.
        block_rows, block_queries: size of a tile of scores. Never changes the result.
        progress: told after every tile.

    Raises:
        NotFiniteError: a corpus vector has NaN or infinity in it.
        NvrError: norms so large that float32 products overflow, or a device that multiplies less precisely than float32.
    """
    scan = _Scan(query_vectors, corpus, requests, blocked, groups, torch.device(device), block_queries)
    done, total = 0, len(query_vectors) * corpus.rows
    with torch.inference_mode(), _full_float32():
        for start, block in corpus.blocks(block_rows):
            scan.load(start, block)
            for first in range(0, len(query_vectors), block_queries):
                last = min(first + block_queries, len(query_vectors))
                scan.tile(first, last)
                done += (last - first) * len(block)
                if progress is not None:
                    progress(done, total)
    return [rows.found() for rows in scan.rows]


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 and no bfloat16 inside a float32 product, whatever the process has chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Rows:
    """The running best of one request's rows."""

    def __init__(self, request: Request, depth: int, device: torch.device) -> None:
        self.query = torch.from_numpy(request.query).to(device)
        self.ceiling = torch.from_numpy(request.ceiling).to(device)
        self.bounded = bool(np.isfinite(request.ceiling).any())
        self.depth = depth
        self.first_of = request.query  # on the host, for slicing by query
        shape = (len(request.query), depth)
        self.ids = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.scores = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        self.above = torch.zeros(len(request.query), dtype=torch.int64, device=device)

    def found(self) -> Found:
        return Found(self.ids.cpu().numpy(), self.scores.cpu().numpy(), self.above.cpu().numpy())


class _Scan:
    """One pass over the corpus."""

    def __init__(
        self,
        query_vectors: Vectors,
        corpus: Corpus,
        requests: Sequence[Request],
        blocked: Blocked,
        groups: Ints | None,
        device: torch.device,
        block_queries: int,
    ) -> None:
        self.device = device
        self.x = torch.from_numpy(query_vectors).to(device)
        self.x_norm = torch.linalg.vector_norm(self.x, dim=1, dtype=torch.float64)
        self.blocked = blocked
        self.groups = groups
        self.groups_on_device = None if groups is None else torch.from_numpy(groups).to(device)
        self.error = float32_error(corpus.dim)
        self.tiny = underflow_error(corpus.dim)
        self.block_queries = block_queries
        self.rows = [_Rows(r, min(r.depth, corpus.rows), device) for r in requests]

    def load(self, start: int, block: Vectors) -> None:
        """Make a corpus block the current one."""
        self.start = start
        self.y = torch.from_numpy(block).to(self.device)
        norms = torch.linalg.vector_norm(self.y, dim=1, dtype=torch.float64)
        if not bool(torch.isfinite(norms).all()):
            raise NotFiniteError("corpus_vectors", start + int((~torch.isfinite(norms)).nonzero()[0]))
        self.y_norm = float(norms.max())
        if float(self.x_norm.max()) * self.y_norm > 1e37:
            raise NvrError(
                f"vectors with norms of {float(self.x_norm.max()):.3g} (query) and {self.y_norm:.3g} (corpus) overflow "
                "float32 products: normalise them"
            )
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

    def tile(self, first: int, last: int) -> None:
        """Score queries first to last against the current block and let every request take what it needs."""
        scores_QC = self.x[first:last] @ self.y.T
        low, high = np.searchsorted(self.blocked_query, [first, last])
        query = torch.from_numpy(self.blocked_query[low:high] - first).to(self.device)
        column = torch.from_numpy(self.blocked_column[low:high]).to(self.device)
        scores_QC[query, column] = -torch.inf
        for rows in self.rows:
            begin, end = (int(i) for i in np.searchsorted(rows.first_of, [first, last]))
            for part in range(begin, end, self.block_queries):
                chosen = slice(part, min(part + self.block_queries, end))
                index = rows.query[chosen] - first
                # Most often every query is one row, and its scores need not be copied.
                same = len(index) == len(scores_QC) and bool(
                    (index == torch.arange(len(index), device=self.device)).all()
                )
                self._absorb(rows, chosen, scores_QC if same else scores_QC[index])

    def _absorb(self, rows: _Rows, chosen: slice, scores_RC: torch.Tensor) -> None:
        """Merge one tile into the running best of `rows[chosen]`; scores of blocked pairs are −inf."""
        ceiling_R = rows.ceiling[chosen]
        error_R = self.error * self.x_norm[rows.query[chosen]] * self.y_norm + self.tiny
        kth_R = rows.scores[chosen, -1]  # a score must beat it; −inf while fewer than k are known
        bound_R = torch.maximum(kth_R - error_R, self._first_bound(kth_R, ceiling_R, error_R, scores_RC, rows.depth))
        wanted_RC = scores_RC >= _down(bound_R).clamp(min=torch.finfo(torch.float32).min)[:, None]
        if rows.bounded:
            over_R = _up(ceiling_R + error_R)
            some = (scores_RC.amax(dim=1) >= over_R).nonzero(as_tuple=True)[0]  # few rows, as a rule
            over_SC = scores_RC[some] >= over_R[some, None]
            rows.above[chosen] = rows.above[chosen].index_add(0, some, over_SC.sum(dim=1))
            wanted_RC[some] &= ~over_SC
        # A tile in which nothing can be ruled out (say, equal scores everywhere) is worked off in slices of rows.
        step = max(1, SURVIVORS_AT_A_TIME // wanted_RC.shape[1])
        if int(wanted_RC.count_nonzero()) <= SURVIVORS_AT_A_TIME:
            step = len(wanted_RC)
        for begin in range(0, len(wanted_RC), step):
            row_S, column_S = wanted_RC[begin : begin + step].nonzero(as_tuple=True)
            row_S = row_S + begin
            exact_S = pair_scores(self.x, self.y, rows.query[chosen][row_S], column_S)
            if bool(((scores_RC[row_S, column_S] - exact_S).abs() > error_R[row_S]).any()):
                raise NvrError(
                    f"float32 products on {self.device} are less precise than float32 allows: mine with device='cpu'"
                )
            below_S = exact_S < ceiling_R[row_S]
            rows.above[chosen] += torch.bincount(row_S[~below_S], minlength=len(ceiling_R))
            # A score equal to the k-th loses to it: its row is higher, since blocks come in order.
            keep_S = below_S & (exact_S > kth_R[row_S])
            self._merge(rows, chosen.start, row_S[keep_S], column_S[keep_S] + self.start, exact_S[keep_S])

    def _first_bound(
        self, kth_R: torch.Tensor, ceiling_R: torch.Tensor, error_R: torch.Tensor, scores_RC: torch.Tensor, depth: int
    ) -> torch.Tensor:
        """A lower bound of the k-th best below the ceiling from this tile alone, for rows that have none yet, float64 [R].

        The maxima of disjoint chunks of columns are scores of different passages (and, with one column per group, of
        different groups), so the k-th best of them is a bound; 2ε make it one for float32 scores of any passage.
        """
        bound_R = torch.full_like(kth_R, -torch.inf)
        open_rows = torch.isneginf(kth_R).nonzero(as_tuple=True)[0]
        columns = scores_RC.shape[1]
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

    def _merge(self, rows: _Rows, offset: int, row_S: torch.Tensor, id_S: torch.Tensor, score_S: torch.Tensor) -> None:
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
        ids, scores = _by_score(torch.cat([rows.ids[into], new_ids], 1), torch.cat([rows.scores[into], new_scores], 1))
        if self.groups_on_device is not None:
            ids, scores = one_per_group(ids, scores, self.groups_on_device)
        rows.ids[into], rows.scores[into] = ids[:, : rows.depth], scores[:, : rows.depth]


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


def _down(values: torch.Tensor) -> torch.Tensor:
    """A float32 number at most the given float64 one."""
    return torch.nextafter(values.float(), torch.tensor(-torch.inf, device=values.device))


def _up(values: torch.Tensor) -> torch.Tensor:
    """A float32 number at least the given float64 one."""
    return torch.nextafter(values.float(), torch.tensor(torch.inf, device=values.device))
