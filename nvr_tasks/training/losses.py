"""The loss of a training stage: InfoNCE over the negatives that the stage admits.

sentence-transformers' losses serve wherever they can. What they lack is here: negatives of a query that are its own
mined ones only (as in NV-Embed's second stage), and false-negative masking with any number of mined negatives by scores
that the teacher has given already, where GISTEmbedLoss takes one negative and runs the teacher in every step.

Shapes: B pairs of this process, W processes, n mined negatives per pair, D dimensions of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch  # noqa: TID253 - only the training loop imports this module
from sentence_transformers import SentenceTransformer, util  # noqa: TID253
from sentence_transformers.multi_vector_encoder.losses import (  # noqa: TID253
    CachedMultiVectorMultipleNegativesRankingLoss,
    MultiVectorMultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.losses import (  # noqa: TID253
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn  # noqa: TID253

from nvr_tasks.errors import NvrError
from nvr_tasks.training_settings import FalseNegatives, StageSettings, TrainingStage


@dataclass(frozen=True)
class TeacherVectors:
    """The teacher's unit vectors of all queries and passages of a data set, float32 [Q, D] and [N, D]; may be memory-mapped."""

    queries: npt.NDArray[np.float32]
    passages: npt.NDArray[np.float32]


@dataclass(frozen=True)
class TeacherScores:
    """What the teacher thinks of the texts of a stage's examples.

    Attributes:
        vectors: its vectors of the data set.
        rows: per example, rows of its query, its positive and its negatives, [E, 2 + n].
    """

    vectors: TeacherVectors
    rows: npt.NDArray[np.int64]

    def between(self, examples: Tensor, others: Tensor) -> Tensor:
        """Scores of the examples' queries with all passages of others, float32 [B, (1 + n)·len(others)], passage-major."""
        queries = np.array(self.vectors.queries[self.rows[examples.cpu().numpy(), 0]])
        passages = np.array(self.vectors.passages[self.rows[others.cpu().numpy(), 1:].T.reshape(-1)])
        return torch.from_numpy(queries) @ torch.from_numpy(passages).T


@dataclass(frozen=True)
class Admission:
    """Which passages of a batch are negatives of which of its queries.

    Attributes:
        in_batch: passages of other pairs are.
        rule: the ceiling that a negative's teacher score must stay below; None: no rule.
        scores: the teacher's scores, for the rule.
        gather: passages of all processes are in the batch.
    """

    in_batch: bool
    rule: FalseNegatives | None = None
    scores: TeacherScores | None = None
    gather: bool = False

    def loss(self, queries: Tensor, documents: list[Tensor], examples: Tensor, scale: float) -> Tensor:
        """Mean InfoNCE of the B local queries.

        Args:
            queries: [B, d].
            documents: positives, then the n columns of negatives, [B, d] each.
            examples: number of the example in each row, [B].
            scale: 1 / τ.
        """
        count, offset, all_examples = len(queries), 0, examples
        if self.gather and self.in_batch:
            documents = [util.all_gather_with_grad(d) for d in documents]
            all_examples = util.all_gather(examples)
            offset = util.get_rank() * count
        positive = torch.arange(offset, offset + count, device=queries.device)
        rows = torch.arange(count, device=queries.device)
        if self.in_batch:
            logits = util.cos_sim(queries, torch.cat(documents))
            barred = self._barred(examples, all_examples, positive)
        else:
            logits = torch.stack([util.pairwise_cos_sim(queries, d) for d in documents], dim=1)
            barred = self._barred(examples, all_examples, positive)
            if barred is not None:  # of the B × (1 + n)·B scores, those of a query's own passages
                own = positive[:, None] + torch.arange(len(documents), device=barred.device)[None] * count
                barred = barred.gather(1, own)
            positive = torch.zeros_like(rows)
        if barred is not None:
            logits = logits.masked_fill(barred.to(logits.device), -torch.inf)
        return nn.functional.cross_entropy(logits * scale, positive)

    def _barred(self, examples: Tensor, others: Tensor, positive: Tensor) -> Tensor | None:
        """Where a score is at or above the query's ceiling, bool [B, (1 + n)·len(others)]; never the positive's."""
        if self.rule is None or self.scores is None:
            return None
        scores = self.scores.between(examples, others).to(positive.device)
        rows = torch.arange(len(examples), device=positive.device)
        best = scores[rows, positive]
        off = self.rule.value * best.abs() if self.rule.margin == "relative" else self.rule.value
        barred = scores >= (best - off)[:, None]  # kept strictly below, as in mining (arXiv:2407.15831 §3.1)
        barred[rows, positive] = False
        return barred


class AdmittedLoss(MultipleNegativesRankingLoss):
    """InfoNCE over the admitted negatives; labels are the numbers of the examples."""

    def __init__(self, model: SentenceTransformer, admission: Admission, scale: float) -> None:
        super().__init__(model, scale=scale, gather_across_devices=admission.gather)
        self.admission = admission

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Mean InfoNCE; embeddings are [B, d] of the queries, the positives and each column of negatives."""
        return self.admission.loss(embeddings[0], embeddings[1:], labels, self.scale)


class CachedAdmittedLoss(CachedMultipleNegativesRankingLoss):
    """The same with gradient caching (arXiv:2101.06983)."""

    def __init__(self, model: SentenceTransformer, admission: Admission, scale: float, rows: int) -> None:
        super().__init__(model, scale=scale, mini_batch_size=rows, gather_across_devices=admission.gather)
        self.admission = admission

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Mean InfoNCE over all mini-batches; its gradient goes back to their embeddings."""
        assert labels is not None  # noqa: S101 - the trainer gives them with every batch
        columns = [torch.cat(parts) for parts in reps]
        loss = self.admission.loss(columns[0], columns[1:], labels, self.scale)
        if with_backward:
            loss.backward()  # type: ignore[no-untyped-call]
            loss = loss.detach()
        return loss


def refuse_widths(model: Any, stage: TrainingStage) -> None:
    """Raise NvrError unless the widest Matryoshka dimension, where there are any, is the width of the model's vectors.

    Without that one the loss would see their beginnings alone, and never the vectors that are registered, scored and served.
    """
    if not stage.matryoshka_dims:
        return
    width, widest = model.get_embedding_dimension(), max(stage.matryoshka_dims)
    if width is not None and widest != width:
        raise NvrError(
            f"matryoshka_dims of stage {stage.name} go up to {widest}, but the student's vectors have {width} dimensions: give "
            f"{width} and what is below it"
        )


def make_loss(
    model: Any, stage: StageSettings, *, scores: TeacherScores | None = None, processes: int = 1
) -> tuple[nn.Module, bool]:
    """The loss of a stage that `refuse_widths` admits, and whether it wants the numbers of the examples as labels."""
    scale, gather, rows = 1 / stage.temperature, processes > 1, stage.cached_batch
    if not isinstance(model, SentenceTransformer):  # MaxSim; its scores are sums over query tokens
        if rows:
            return CachedMultiVectorMultipleNegativesRankingLoss(
                model, scale=scale, mini_batch_size=rows, gather_across_devices=gather
            ), False
        return MultiVectorMultipleNegativesRankingLoss(model, scale=scale, gather_across_devices=gather), False
    own = not stage.in_batch_negatives or stage.false_negatives is not None
    loss: nn.Module
    if own:
        admission = Admission(stage.in_batch_negatives, stage.false_negatives, scores, gather)
        loss = CachedAdmittedLoss(model, admission, scale, rows) if rows else AdmittedLoss(model, admission, scale)
    elif rows:
        loss = CachedMultipleNegativesRankingLoss(
            model, scale=scale, mini_batch_size=rows, gather_across_devices=gather
        )
    else:
        loss = MultipleNegativesRankingLoss(model, scale=scale, gather_across_devices=gather)
    if stage.matryoshka_dims:
        loss = MatryoshkaLoss(model, loss, list(stage.matryoshka_dims))
    return loss, own
