"""Scores of a late-interaction model: MaxSim of a query's token vectors with those of each passage."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch  # noqa: TID253 - only what runs a model imports this module

from nvr_tasks.config import Runtime
from nvr_tasks.media import inputs_of
from nvr_tasks.mined.rescoring import PassageScorer
from nvr_tasks.mining.arrays import Floats
from nvr_tasks.models import load_late_interaction
from nvr_tasks.settings import LateInteractionTeacher

KEPT_BYTES = 2**30  # of passages' token vectors
PASSAGES_AT_A_TIME = 64  # of a query; not a setting: it touches last bits


class MaxSimScorer(PassageScorer):
    """A late-interaction model (sentence-transformers' MultiVectorEncoder).

    Every text is a batch of its own. Beside others it would be padded, and its last bits would hang on which passages
    queries share, and so on how queries are divided over tasks; alone, a passage's vectors can be kept for all queries
    that ask for it. It costs no arithmetic, since nothing is padding; a GPU is idle between short texts.
    """

    def __init__(self, reranker: LateInteractionTeacher, runtime: Runtime) -> None:
        super().__init__(reranker)
        self.model, self.mean = load_late_interaction(reranker, runtime), reranker.scale == "mean"
        self.given = inputs_of(self.model, None)
        self.kept: OrderedDict[str, torch.Tensor] = OrderedDict()  # the longest unused one first
        self.kept_bytes = 0

    def _outputs(self, query: str, passages: Sequence[str]) -> Floats:
        asked = [self._encoded(self.model.encode_query, query)]
        scores = []
        for start in range(0, len(passages), PASSAGES_AT_A_TIME):
            found = [self._passage(text) for text in passages[start : start + PASSAGES_AT_A_TIME]]
            scores.append(self.model.similarity(asked, found, length_normalize=self.mean)[0])
        values: Floats = torch.cat(scores).double().cpu().numpy()
        return values

    def _passage(self, text: str) -> torch.Tensor:
        """Token vectors [tokens, width]; those used last are kept, up to KEPT_BYTES."""
        vectors = self.kept.pop(text, None)
        if vectors is None:
            vectors = self._encoded(self.model.encode_document, text)
            self.kept_bytes += vectors.nbytes
            while self.kept and self.kept_bytes > KEPT_BYTES:
                self.kept_bytes -= self.kept.popitem(last=False)[1].nbytes
        self.kept[text] = vectors
        return vectors

    def _encoded(self, encode: Callable[..., Any], text: str) -> torch.Tensor:
        with self._precision(self.model.device):
            vectors: torch.Tensor = encode([self.given(text)], show_progress_bar=False)[0]
        return vectors.float()
