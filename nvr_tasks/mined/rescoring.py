"""A reranker's scores of candidates and positives.

What is scored together is of one query: the batches, and with them the last bits of a score, depend on the query alone
and not on how queries were divided over tasks.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch  # noqa: TID253 - only what runs a model imports this module

from nvr_tasks.config import Runtime
from nvr_tasks.errors import NvrError
from nvr_tasks.mining import Candidates
from nvr_tasks.mining.arrays import Floats
from nvr_tasks.models import load_cross_encoder
from nvr_tasks.settings import CrossEncoder, Reranker

BATCH_TOKENS = {
    "cpu": 16384,
    "cuda": 131072,
}  # of a forward pass, padding included; not a setting: it touches last bits
SECONDS_PER_LINE = 15.0

log = logging.getLogger(__name__)


class PassageScorer(ABC):
    """A reranker that scores the passages of one query at a time, and tells how fast."""

    def __init__(self, reranker: Reranker) -> None:
        self.called = f"{reranker.kind} {reranker.name}"
        self.dtype = getattr(torch, reranker.dtype)
        self.scored, self.begun = 0, time.monotonic()
        self.told = self.begun

    @torch.inference_mode()
    def score(self, query: str, passages: Sequence[str]) -> Floats:
        """Outputs for (query, passage) pairs, float64 [n]. Raises NvrError if one is not a finite number."""
        found = self._outputs(query, passages)
        bad = np.flatnonzero(~np.isfinite(found))
        if len(bad):
            raise NvrError(
                f"{self.called} gave {found[bad[0]]} for the query {query[:80]!r}: its weights are damaged or the "
                "dtype overflows: check the model, or set its dtype to float32"
            )
        self._tell(len(passages))
        return found

    @abstractmethod
    def _outputs(self, query: str, passages: Sequence[str]) -> Floats:
        """What the model gives for each pair, float64 [n]."""

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(device.type, self.dtype)

    def _tell(self, count: int) -> None:
        self.scored += count
        now = time.monotonic()
        if now - self.told >= SECONDS_PER_LINE:
            self.told = now
            log.info("%s: %s pairs · %.0f pairs/s", self.called, f"{self.scored:,}", self.scored / (now - self.begun))


class PairScorer(PassageScorer):
    """A cross-encoder that gives the output of its one unit, before any activation."""

    def __init__(self, reranker: CrossEncoder, runtime: Runtime) -> None:
        super().__init__(reranker)
        self.model, self.longest = load_cross_encoder(reranker, runtime), reranker.max_tokens

    def _outputs(self, query: str, passages: Sequence[str]) -> Floats:
        device = self.model.device
        # Long passages side by side, so that little is padding; ties by place, so that batches hang on nothing else.
        order = sorted(range(len(passages)), key=lambda i: (-len(passages[i]), i))
        step = max(1, BATCH_TOKENS[device.type] // self.longest)
        found = np.empty(len(passages))
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            with self._precision(device):
                scores = self.model.predict(
                    [(query, passages[i]) for i in rows],
                    batch_size=len(rows),
                    activation_fn=torch.nn.Identity(),
                    show_progress_bar=False,
                    convert_to_numpy=True,
                )
            found[rows] = np.asarray(scores, dtype=np.float64)
        return found


def rescored(
    table: pa.Table,
    model: PassageScorer,
    depth: int,
    queries: Sequence[str],
    rows: Mapping[str, int],
    passages: Sequence[str],
) -> pa.Table:
    """A table of candidates with the model's scores: the `depth` best ones anew, by falling score, ties by passage.

    Args:
        table: candidates of `queries`, as in `candidates.parquet`.
        model: scores pairs.
        depth: candidates that are scored per query.
        queries: their texts.
        rows: corpus row of each document id.
        passages: text per corpus row.
    """
    ids, scores, positive_scores = [], [], []
    lines = zip(queries, table["positive_ids"].to_pylist(), table["candidate_ids"].to_pylist(), strict=True)
    for query, positives, candidates in lines:
        chosen = candidates[:depth]
        numbers = [rows[doc] for doc in (*positives, *chosen)]
        found = model.score(query, [passages[n] for n in numbers])
        own, others = found[: len(positives)], found[len(positives) :]
        order = np.lexsort((np.array(numbers[len(positives) :], dtype=np.int64), -others))
        positive_scores.append(own.tolist())
        ids.append([chosen[i] for i in order])
        scores.append(others[order].tolist())
    new = {
        "positive_scores": pa.array(positive_scores, pa.list_(pa.float64())),
        "candidate_ids": pa.array(ids, pa.list_(pa.string())),
        "candidate_scores": pa.array(scores, pa.list_(pa.float64())),
    }
    return pa.table({name: new.get(name, table[name]) for name in table.column_names})


def on_scale(candidates: Candidates, scale: str) -> Candidates:
    """Candidates of a reranker on the scale that thresholds refer to: `probability` is the sigmoid of what is stored."""
    if scale != "probability":
        return replace(candidates, rescored=True)
    scores = np.where(candidates.ids >= 0, sigmoid(candidates.scores), -np.inf)
    # Far out, different outputs round to one probability: ties go to the lower row, here as everywhere.
    order = np.lexsort((np.where(candidates.ids >= 0, candidates.ids, np.iinfo(np.int64).max), -scores), axis=1)
    return replace(
        candidates,
        positive_scores=sigmoid(candidates.positive_scores),
        ids=np.take_along_axis(candidates.ids, order, axis=1),
        scores=np.take_along_axis(scores, order, axis=1),
        rescored=True,
    )


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + e⁻ˣ), elementwise, without overflow."""
    small = np.exp(-np.abs(x))
    y: Floats = np.where(x >= 0, 1.0, small) / (1.0 + small)
    return y
