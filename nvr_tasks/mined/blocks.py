"""Candidates block by block: each task searches its block of queries, and whoever needs all of them joins the blocks.

A finished block lies in storage below `parts/<fingerprint of the candidates>/` until the candidates are published, so it
is made once, by whichever task comes first, and a task that was killed goes on behind the last one it finished.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from nvr_tasks.artifacts import Artifact, Store
from nvr_tasks.mined.scorers import Scorer
from nvr_tasks.mined.tables import CANDIDATES_FILE, read_table, write_table

if TYPE_CHECKING:
    from pathlib import Path

    from nvr_tasks.mined.task import MiningTask

log = logging.getLogger(__name__)

Block = tuple[int, int]  # first query, and the one behind the last


def blocks_of(queries: int, count: int) -> list[Block]:
    """`count` ranges of nearly equal size; empty ones where there are fewer queries."""
    return [(queries * i // count, queries * (i + 1) // count) for i in range(count)]


class CandidateBlocks:
    """The candidates of one teacher, as far as they are there."""

    def __init__(self, store: Store, scorer: Scorer, task: MiningTask, blocks: Sequence[Block]) -> None:
        self.store, self.scorer, self.task, self.blocks = store, scorer, task, blocks
        self.artifact = store.find(scorer.identity)
        self._all: pa.Table | None = None
        self._last: tuple[Block, pa.Table] | None = None  # a reranker asks for a block bit by bit

    @property
    def prefix(self) -> str:
        """Where finished blocks are kept."""
        return f"parts/{self.scorer.identity.fingerprint}"

    def table(self, start: int, stop: int) -> pa.Table:
        """Candidates of a range of queries within one block; what is missing is made, and kept unless it is everything."""
        if self.artifact is not None:
            return self.whole().slice(start, stop - start)
        begin, end = next(b for b in self.blocks if b[0] <= start and stop <= b[1])
        pieces = [
            self._piece(piece) for piece in self.scorer.pieces(begin, end) if piece[0] < stop and piece[1] > start
        ]
        first = next(piece[0] for piece in self.scorer.pieces(begin, end) if piece[1] > start)
        return _joined(pieces).slice(start - first, stop - start)

    def make(self, block: Block) -> bool:
        """See that a block is there; False if there was nothing to do."""
        if self.artifact is not None or block[0] == block[1]:
            return False
        pieces = self.scorer.pieces(*block)
        there = set(self.store.storage.list(self.prefix))
        missing = [piece for piece in pieces if self._key(piece) not in there]
        for piece in missing:
            self._piece(piece)
        return bool(missing)

    def whole(self) -> pa.Table:
        """Candidates of all queries."""
        if self._all is None:
            path = self.store.fetch(self.published()) / CANDIDATES_FILE
            self._all = read_table(path)
        return self._all

    def published(self) -> Artifact:
        """The artefact; blocks that no task has made are made now."""
        if self.artifact is None:
            self.artifact = self.store.publish(self.scorer.identity, self._write)
        self.store.storage.delete(self.prefix)
        return self.artifact

    def _write(self, folder: Path) -> dict[str, Any]:
        clock = time.perf_counter()
        table = _joined([self.table(*block) for block in self.blocks if block[0] < block[1]])
        write_table(folder / CANDIDATES_FILE, table)
        log.info(
            "%s: candidates of %s queries among %s passages in %.1f s",
            self.scorer.name,
            f"{table.num_rows:,}",
            f"{len(self.task.doc_ids):,}",
            time.perf_counter() - clock,
        )
        return candidate_stats(table, self.task, self.scorer)

    def _piece(self, piece: Block) -> pa.Table:
        if self._last is None or self._last[0] != piece:
            self._last = piece, self._kept_or_made(piece)
        return self._last[1]

    def _kept_or_made(self, piece: Block) -> pa.Table:
        key = self._key(piece)
        data = self.store.storage.get_bytes(key)
        if data is not None:
            try:
                table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
                if table.num_rows == piece[1] - piece[0]:
                    return table
            except (pa.ArrowInvalid, OSError):
                pass
            log.warning("%s is damaged; searching its queries again", key)
        table = self.scorer.score(*piece)
        if piece != (0, len(self.task.query_ids)):  # else the artefact follows at once
            buffer = io.BytesIO()
            write_table(buffer, table)
            self.store.storage.put_bytes(key, buffer.getvalue())
        return table

    def _key(self, piece: Block) -> str:
        return f"{self.prefix}/{piece[0]:09}-{piece[1]:09}.parquet"


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    # By position: what is read names the items of its lists differently.
    return pa.concat_tables([t.cast(tables[0].schema) for t in tables])


def candidate_stats(table: pa.Table, task: MiningTask, scorer: Scorer) -> dict[str, Any]:
    """What the manifest says of candidates."""
    from nvr_tasks.mined.tables import read_candidates
    from nvr_tasks.mining.arrays import BLOCKED_REASONS

    found = read_candidates(table, task, "the table that was just made")
    counts = found.judged.blocked.counts.sum(axis=0).tolist()
    return {
        "figures": {"queries": len(task.query_ids), "passages": len(task.doc_ids)},
        "positives": len(task.positives.values),
        "candidates": int((found.ids >= 0).sum()),
        "depth": scorer.identity.config["depth"],
        "left_out": dict(zip(BLOCKED_REASONS, counts, strict=True)),
        **_recall(table),
    }


def _recall(table: pa.Table) -> dict[str, Any]:
    """How much of the exact search an index found, where it was one."""
    from nvr_tasks.mined.tables import RECALL_COLUMNS
    from nvr_tasks.mining.approximate import Sampled

    if RECALL_COLUMNS[0] not in table.column_names:
        return {}
    share = Sampled(*(table[name].to_numpy() for name in RECALL_COLUMNS)).recall
    return {"recall": {"value": round(share.value, 5), "low": round(share.low, 5), "high": round(share.high, 5)}}
